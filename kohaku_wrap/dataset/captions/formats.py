"""Captions in the forms that trainers read: lines of JSON, entries of a cache, rows of a digest, text files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_wrap.arrays import BoolArray, Int32Array, Int64Array
from kohaku_wrap.formats.caption_writer import bytes_of

CACHE_FILE = "metadata_cache.json"
"""What sd-scripts reads with `cache_info`: {path: {"caption", "resolution"}}."""

LINES_FILE = "captions.jsonl"
ENTRY_SEPARATOR = b",\n"
TEXT_PART = ".caption.txt.part"
"""Name of a text that will replace another; one a shard, so that a killed call leaves no more."""


def shard_paths(ids: Int64Array, extensions: pa.Array) -> pa.Array:
    """NNNN/ID.ext of each post; `extensions` is dictionary-encoded, and what is odd in one is left out."""
    shards = pa.array([f"{number:04d}/" for number in range(1000)])
    cleaned = [
        "".join(one for one in text if one.isascii() and one.isalnum()) for text in extensions.dictionary.to_pylist()
    ]
    endings = pa.array([f".{text}" if text else "" for text in cleaned], type=pa.string())
    return pc.binary_join_element_wise(
        shards.take(pa.array(ids % 1000)), pa.array(ids).cast(pa.string()), endings.take(extensions.indices), ""
    )


def escape_json(texts: pa.Array) -> pa.Array:
    """Each text as it stands between the quotes of a JSON string; the texts hold no control characters."""
    data = np.frombuffer(texts.buffers()[2] or b"", dtype=np.uint8)
    if (data > 126).any() or (data < 32).any():
        return pa.array([json.dumps(text)[1:-1] for text in texts.to_pylist()], type=pa.string())
    if (data == ord("\\")).any():
        texts = pc.replace_substring(texts, "\\", "\\\\")
    if (data == ord('"')).any():
        texts = pc.replace_substring(texts, '"', '\\"')
    return texts


def path_prefix(folder: Path) -> str:
    """The folder's absolute path with a slash, as it stands between the quotes of a JSON string."""
    return json.dumps(folder.absolute().as_posix().rstrip("/") + "/")[1:-1]


def size_texts(widths: Int32Array, heights: Int32Array) -> pa.Array:
    """Width and height of each image as JSON has them between brackets."""
    return pc.binary_join_element_wise(pa.array(widths).cast(pa.string()), pa.array(heights).cast(pa.string()), ", ")


def json_lines(prefix: str, files: pa.Array, escaped: pa.Array, widths: Int32Array, heights: Int32Array) -> pa.Buffer:
    """A line of `captions.jsonl` for each file; `image_size` stands in those whose width is not 0."""
    sizes = pc.binary_join_element_wise(', "image_size": [', size_texts(widths, heights), "]", "")
    sizes = pc.if_else(pa.array(widths > 0), sizes, "")
    return bytes_of(
        pc.binary_join_element_wise(
            f'{{"image_path": "{prefix}', files, '", "caption": "', escaped, '"', sizes, "}\n", ""
        )
    )


def cache_entries(
    prefix: str, files: pa.Array, escaped: pa.Array, widths: Int32Array, heights: Int32Array
) -> pa.Buffer:
    """An entry of `metadata_cache.json` for each file, each after ENTRY_SEPARATOR."""
    before, sizes = f'{ENTRY_SEPARATOR.decode()}"{prefix}', size_texts(widths, heights)
    return bytes_of(
        pc.binary_join_element_wise(before, files, '": {"caption": "', escaped, '", "resolution": [', sizes, "]}", "")
    )


def write_text_files(folder: Path, files: pa.Array, captions: pa.Array, has_text: BoolArray) -> tuple[int, int]:
    """Write each caption beside its image where it is not there yet; how many were written and how many kept.

    One line without an end, as HakuBooru writes it. Another text is replaced whole; a new one is written in place,
    which is twice as fast. Where the disk is full the begun file is removed.
    """
    written = 0
    root = os.fspath(folder)
    for name, caption, exists in zip(files.to_pylist(), captions.to_pylist(), has_text.tolist(), strict=True):
        final = path = f"{root}/{name[: name.rindex('.')]}.txt"
        content = caption.encode()
        if exists:
            if Path(final).read_bytes() == content:
                continue
            path = f"{root}/{name[: name.rindex('/') + 1]}{TEXT_PART}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            if os.write(descriptor, content) != len(content):
                raise OSError(28, os.strerror(28), path)
        except OSError:
            Path(path).unlink()
            raise
        finally:
            os.close(descriptor)
        if exists:
            Path(path).replace(final)
        written += 1
    return written, len(files) - written
