"""Headers of safetensors files: byte for byte, and every planted fault with its own message."""

from __future__ import annotations

import gzip
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from kohaku_wrap.formats.safetensors import (
    HEADER_LIMIT_BYTES,
    MalformedFile,
    OtherKindOfFile,
    PickledFile,
    encode_header,
    lay_out_tensors,
    parse_header,
    read_header,
)


def write_raw(path: Path, header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> Path:
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: int = 0, end: int = 4, dtype: Any = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


FAULTS: dict[str, tuple[bytes | dict[str, Any], bytes, str]] = {
    "hole": ({"a": entry(), "b": entry(8, 12)}, bytes(12), "hole of 4 bytes before 'b'"),
    "hole at the start": ({"a": entry(4, 8)}, bytes(8), "hole of 4 bytes before 'a'"),
    "overlap": ({"a": entry(), "b": entry(2, 6)}, bytes(6), "'b' overlaps 'a' by 2 bytes"),
    "same place": ({"a": entry(), "b": entry()}, bytes(4), "'b' overlaps 'a' by 4 bytes"),
    "trailing bytes": ({"a": entry()}, bytes(7), "3 trailing bytes after the last tensor"),
    "data cut short": ({"a": entry()}, bytes(3), "ends at byte 4, but the file holds 3 bytes"),
    "size lies": ({"a": entry(shape=(2,))}, bytes(4), r"F32 \[2\] takes 8 bytes, not 4"),
    "backwards": ({"a": entry(4, 0)}, bytes(4), "ends before it begins"),
    "duplicate key": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
        "the key 'a' stands twice",
    ),
    "duplicate field": (
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
        "the key 'dtype' stands twice",
    ),
    "unknown dtype": ({"a": entry(dtype="F128")}, bytes(4), "unknown dtype 'F128'"),
    "dtype of another type": ({"a": entry(dtype=32)}, bytes(4), "unknown dtype 32"),
    "shape of text": ({"a": entry(shape="1")}, bytes(4), "its shape '1' is not a list"),
    "negative shape": ({"a": entry(shape=(-1,))}, bytes(4), r"its shape \[-1\] is not a list of whole numbers"),
    "shape with a truth value": ({"a": entry(shape=[True])}, bytes(4), "is not a list of whole numbers"),
    "fractional offset": (
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4.0]}},
        bytes(4),
        "are not two whole numbers",
    ),
    "three offsets": (
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}},
        bytes(4),
        "are not two whole numbers",
    ),
    "entry is a number": ({"a": 1}, b"", "its entry is not an object"),
    "missing field": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), "data_offsets missing"),
    "unknown field": ({"a": {**entry(), "extra": 1}}, bytes(4), "unknown field 'extra'"),
    "metadata with a number": ({"__metadata__": {"x": 1}, "a": entry()}, bytes(4), "must map strings to strings"),
    "a list": (b"[1]", b"", "does not begin with '{'"),
    "not JSON": (b'{"a":', b"", "is not valid JSON"),
    "half a byte": ({"a": entry(0, 2, "F4", (3,))}, bytes(2), "takes 12 bits, which are no whole bytes"),
    "too many values": (b'{"a":[' + b"[]," * 1_000_000 + b"[]]}", b"", "more than 2,000,000 words and brackets"),
    "too many words": (b'{"a":[' + b'"",' * 1_000_000 + b"1]}", b"", "more than 2,000,000 words and brackets"),
    "endless word": (b'{"a":"' + b'\\",' * 1_000_000 + b"\\", b"", "is not valid JSON"),
    "NaN": (b'{"a": NaN}', b"", "NaN is not JSON"),
    "not UTF-8": (b'{"\xff":1}', b"", "is not UTF-8"),
    "half a character": (b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4), "not UTF-8"),
    "nested deeply": (b'{"a":' + b"[" * 100_000, b"", "nested too deeply|not valid JSON"),
    "huge number": (b'{"a":' + b"9" * 5000 + b"}", b"", "is not valid JSON"),
    "many dimensions": ({"a": entry(shape=(1,) * 65)}, bytes(4), "65 dimensions"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_planted_fault_has_its_own_message(tmp_path: Path, fault: str) -> None:
    header, data, message = FAULTS[fault]
    with pytest.raises(MalformedFile, match=message):
        read_header(write_raw(tmp_path / "planted.safetensors", header, data))


def test_header_lengths_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "lie.safetensors"
    with pytest.raises(MalformedFile, match="claims 1,000 bytes, but only 6 follow"):
        read_header(write_raw(path, b'{"a":1', length=1000))
    with pytest.raises(MalformedFile, match="claims 200,000,000 bytes; more than 100,000,000 are not allowed"):
        read_header(write_raw(path, b"{}", length=2 * HEADER_LIMIT_BYTES))
    with pytest.raises(MalformedFile, match="claims 18,446,744,073,709,551,615 bytes"):
        read_header(write_raw(path, b"{}", length=2**64 - 1))
    path.write_text("# notes about a training\n")
    with pytest.raises(MalformedFile, match="not a safetensors file") as refused:
        read_header(path)
    assert "claims" not in str(refused.value)
    path.write_bytes(b"abc")
    with pytest.raises(MalformedFile, match="3 bytes are too few"):
        read_header(path)


@pytest.mark.parametrize(
    ("start", "what", "advice"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 6938040682\n", "a Git LFS", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html><title>404</title>", "a web page", "Fetch the file again"),
        (b"\xef\xbb\xbf\n <html {lang=en}>", "a web page", "Fetch the file again"),
        (b"<head>", "a web page", "Fetch the file again"),
        (b'{"data":{"code":401}}', "a JSON text", "Fetch the file again"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML text", "Fetch the file again"),
        (gzip.compress(b"a checkpoint", mtime=0), "compressed with gzip", "Decompress it first"),
    ],
)
def test_leftovers_of_a_download_are_named(tmp_path: Path, start: bytes, what: str, advice: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(start)
    with pytest.raises(OtherKindOfFile, match=f"model.safetensors: not a safetensors file but {what}") as refused:
        read_header(path)
    assert advice in refused.value.next_step


def test_a_header_as_long_as_the_mark_of_gzip_is_read(tmp_path: Path) -> None:
    text = b'{"__metadata__": {}}'.ljust(int.from_bytes(b"\x1f\x8b", "little"))
    assert read_header(write_raw(tmp_path / "long.safetensors", text)).tensors == {}
    with pytest.raises(MalformedFile, match="claims 35,615 bytes"):
        read_header(write_raw(tmp_path / "cut.safetensors", text[:99], length=len(text)))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(OtherKindOfFile, match="not a regular file"):
        read_header(tmp_path / "pipe.safetensors")


def test_long_metadata_and_long_names_are_no_harm(tmp_path: Path) -> None:
    held = {"ss_tag_frequency": '{"a": [' + "1," * 2_000_000}
    path = write_raw(tmp_path / "a.safetensors", {"__metadata__": held, "b": entry()}, bytes(4))
    assert read_header(path).metadata == held
    with pytest.raises(MalformedFile, match=r"'b+…b+': unknown dtype 'X'") as refused:
        read_header(write_raw(path, {"b" * 1_000_000: entry(dtype="X")}, bytes(4)))
    assert len(str(refused.value)) < 1000


def test_all_faults_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    header = {"a": entry(dtype="F128"), "b": entry(shape="x"), "c": 5}
    with pytest.raises(MalformedFile, match=r"(?s)3 faults.*'a'.*'b'.*'c'"):
        read_header(write_raw(tmp_path / "x.safetensors", header, bytes(4)))


@pytest.mark.parametrize("start", [b"PK\x03\x04rest", b"\x80\x02}q\x00."])
def test_pickles_are_refused_with_advice(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(start)
    with pytest.raises(PickledFile, match="never unpickles") as caught:
        read_header(path)
    assert "safetensors" in caught.value.next_step


def test_the_bytes_of_a_small_file() -> None:
    spots = lay_out_tensors([("w", "F16", (2, 1)), ("b", "F16", (1,))])
    header = encode_header(spots, {"k": "v"})
    text = (
        b'{"__metadata__":{"k":"v"},"w":{"dtype":"F16","shape":[2,1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"F16","shape":[1],"data_offsets":[4,6]}}'
    )
    padding = -len(text) % 8
    assert header == struct.pack("<Q", len(text) + padding) + text + b" " * padding


def test_tensors_stay_aligned_when_an_order_would_break_it() -> None:
    spots = lay_out_tensors([("half", "F16", (1,)), ("ids", "I64", (2,)), ("byte", "U8", (1,))])
    assert [(name, spot.begin) for name, spot in spots.items()] == [("ids", 0), ("half", 16), ("byte", 18)]


def test_the_library_reads_what_is_written_and_the_other_way(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray] = {
        "x": np.arange(6, dtype=np.float32).reshape(2, 3),
        "n": np.array(7, dtype=np.int64),
        "z": np.zeros((0, 4)),
    }
    save_file(arrays, tmp_path / "a.safetensors", metadata={"hello": "world"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.metadata == {"hello": "world"}
    assert {name: spot.shape for name, spot in header.tensors.items()} == {"x": (2, 3), "n": (), "z": (0, 4)}
    data = (tmp_path / "a.safetensors").read_bytes()[header.data_start :]
    (tmp_path / "b.safetensors").write_bytes(encode_header(header.tensors, header.metadata) + data)
    again = load_file(tmp_path / "b.safetensors")
    assert all(np.array_equal(again[name], array) for name, array in arrays.items())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "F16"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F16", "I64", "U8", "X"]) | json_values,
     "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
     "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values}
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=6), entries | json_values, max_size=4), st.integers(0, 64))
@pytest.mark.fuzz
def test_any_json_is_a_header_or_refused(document: dict[str, Any], data_bytes: int) -> None:
    check_parse(json.dumps(document).encode(), data_bytes)


@given(st.binary(max_size=200).map(lambda tail: b"{" + tail) | st.binary(max_size=50), st.integers(0, 64))
@pytest.mark.fuzz
def test_any_bytes_are_a_header_or_refused(text: bytes, data_bytes: int) -> None:
    check_parse(text, data_bytes)


VALID = (
    b'{"__metadata__":{"k":"v"},"a":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},'
    b'"b":{"dtype":"I64","shape":[],"data_offsets":[12,20]}}'
)


@given(st.lists(st.tuples(st.integers(0, len(VALID)), st.integers(0, 6), st.binary(max_size=4)), max_size=3))
@pytest.mark.fuzz
def test_a_damaged_header_is_read_or_refused(damages: list[tuple[int, int, bytes]]) -> None:
    text = VALID
    for place, removed, added in damages:
        text = text[:place] + added + text[place + removed :]
    check_parse(text, 20)


def check_parse(text: bytes, data_bytes: int) -> None:
    try:
        tensors, _ = parse_header(Path("fuzz"), text, data_bytes)
    except MalformedFile as error:
        str(error).encode()
    else:
        assert sum(spot.size_bytes for spot in tensors.values()) == data_bytes


@pytest.mark.parametrize("header_bytes", [640, 896, 1152, 1408, 65536 + 640])
def test_no_length_of_a_header_looks_like_a_pickle(tmp_path: Path, header_bytes: int) -> None:
    path = tmp_path / "a.safetensors"
    spots = lay_out_tensors([("w", "F32", (1,))])
    short = len(encode_header(spots, {"x": ""})) - 8
    content = encode_header(spots, {"x": "y" * (header_bytes - short)})
    path.write_bytes(content + bytes(4))
    assert content[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    assert list(read_header(path).tensors) == ["w"]
