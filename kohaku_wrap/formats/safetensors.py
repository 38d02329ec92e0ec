"""The layout of safetensors files: their headers read strictly and written in a fixed form."""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.formats.disguises import START_BYTES, name_disguise
from kohaku_wrap.wording import is_utf8

LENGTH_BYTES = 8
HEADER_LIMIT_BYTES = 100_000_000
HEADER_ALIGNMENT_BYTES = 8
TOKENS_LIMIT = 2_000_000
FAULTS_SHOWN = 8
FAULT_LENGTH = 400
DIMENSIONS_LIMIT = 64

TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[,\[{]', re.DOTALL)
"""A JSON string, also one that the text ends in, or a mark that a value follows."""

BITS_OF_DTYPE = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Source: the `Dtype` of the safetensors crate, version 0.8."""

FLOAT_DTYPES = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2")
"""The types that a formula can compute with."""


def shorten(text: str) -> str:
    """Both ends of a text that is too long for a message: names of tensors have no limit."""
    half = FAULT_LENGTH // 2
    return text if len(text) <= FAULT_LENGTH else f"{text[:half]}…{text[-half:]}"


class MalformedFile(KwrapError):
    """A file that is not a whole and consistent safetensors file."""

    advice = "The file is damaged or was cut short: fetch it again, or save it anew with safetensors."

    def __init__(self, path: Path, faults: Iterable[str], advice: str = "") -> None:
        listed = list(faults)
        shown = [shorten(fault) for fault in listed[:FAULTS_SHOWN]]
        if len(listed) > len(shown):
            shown.append(f"and {len(listed) - len(shown):,} faults more")
        text = f"{path}: {shown[0]}" if len(listed) == 1 else "\n  ".join([f"{path}: {len(listed):,} faults", *shown])
        super().__init__(text, advice or self.advice)


class OtherKindOfFile(MalformedFile):
    """A file that does not begin as safetensors files do."""

    advice = "Give a .safetensors file: a checkpoint, a network, or a part of a model."


class PickledFile(KwrapError):
    """A pickled checkpoint, which could run any code when it is opened."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path}: this is a pickled file (.ckpt, .pt, .bin); kwrap never unpickles, because that can run code",
            "Use the .safetensors file of the same model, or convert it in a place that you trust: "
            "torch.load(path, weights_only=True), then safetensors.torch.save_file.",
        )


@dataclass(frozen=True)
class TensorSpot:
    """Where one tensor lies in a file."""

    dtype: str
    """The name that the header gives, such as `F16`."""

    shape: tuple[int, ...]
    """Sizes, outermost first; empty for a single number."""

    begin: int
    """First byte, counted from the start of the data."""

    end: int
    """The byte after the last."""

    shares: tuple[TensorSpot, ...] = ()
    """Where equal shares of its rows lie, if it is read from several tensors of a file."""

    is_transposed: bool = False
    """Whether the file holds the matrix with rows and columns exchanged; `shape` is that of use."""

    @property
    def size_bytes(self) -> int:
        return self.end - self.begin

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself."""

    path: Path
    """The file."""

    tensors: dict[str, TensorSpot]
    """In the order of the data."""

    metadata: dict[str, str]
    """The free strings under `__metadata__`."""

    data_start: int
    """Where the data begins in the file, in bytes."""

    size_bytes: int
    """The whole file."""


def read_header(path: Path) -> Header:
    """The header of a safetensors file, checked in full; the data is not read.

    Raises PickledFile, OtherKindOfFile, or MalformedFile with every fault found.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise OtherKindOfFile(path, ["not a regular file"])
    with path.open("rb") as stream:
        size_bytes = os.fstat(stream.fileno()).st_size
        start = stream.read(LENGTH_BYTES)
        first = stream.read(1)
        # A header of 640 bytes begins as a pickle of protocol 2 does.
        pickled = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and first != b"{"
        if start[:4] == b"PK\x03\x04" or pickled:
            raise PickledFile(path)
        if start and (first != b"{" or int.from_bytes(start, "little") > HEADER_LIMIT_BYTES):
            what, _, advice = name_disguise(start + first + stream.read(START_BYTES)).partition("; ")
            if what:
                advice = f"{advice.capitalize()}." if advice else ""
                raise OtherKindOfFile(path, [f"not a safetensors file but {what}"], advice)
        if len(start) < LENGTH_BYTES:
            raise MalformedFile(path, [f"{len(start)} bytes are too few for a safetensors file"])
        (header_bytes,) = struct.unpack("<Q", start)
        claim = f"the header claims {header_bytes:,} bytes"
        if header_bytes > size_bytes - LENGTH_BYTES and first != b"{":
            raise OtherKindOfFile(path, ["not a safetensors file"])
        if header_bytes > HEADER_LIMIT_BYTES:
            raise MalformedFile(path, [f"{claim}; more than {HEADER_LIMIT_BYTES:,} are not allowed"])
        if header_bytes > size_bytes - LENGTH_BYTES:
            left = size_bytes - LENGTH_BYTES
            raise MalformedFile(path, [f"{claim}, but only {left:,} follow its length"])
        text = (first + stream.read(header_bytes - 1)) if header_bytes else b""
    data_start = LENGTH_BYTES + header_bytes
    tensors, metadata = parse_header(path, text, size_bytes - data_start)
    return Header(path, tensors, metadata, data_start, size_bytes)


def parse_header(path: Path, text: bytes, data_bytes: int) -> tuple[dict[str, TensorSpot], dict[str, str]]:
    """The tensors, in the order of the data, and the metadata of a header's JSON.

    `data_bytes`: how many bytes follow the header. Raises MalformedFile.
    """
    document = load_json(path, text)
    faults: list[str] = []
    metadata = document.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # as the safetensors crate reads null
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        faults.append("__metadata__ must map strings to strings")
        metadata = {}
    if not all(is_utf8(text) for pair in metadata.items() for text in pair):
        faults.append("__metadata__ holds text that is not UTF-8")
    spots: dict[str, TensorSpot] = {}
    for name, entry in document.items():
        fault = fault_of_entry(entry) if is_utf8(name) else "its name is not UTF-8"
        if fault:
            faults.append(f"{name!r}: {fault}")
            continue
        spots[name] = TensorSpot(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
        fault = fault_of_size(spots[name], data_bytes)
        if fault:
            faults.append(f"{name!r}: {fault}")
    ordered = dict(sorted(spots.items(), key=lambda item: (item[1].begin, item[1].end)))
    if not faults:
        faults = faults_of_order(ordered, data_bytes)
    if faults:
        raise MalformedFile(path, faults)
    return ordered, metadata


class DuplicateKey(ValueError):
    """A name that stands twice in one JSON object."""


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise DuplicateKey(name)
        found[name] = value
    return found


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def load_json(path: Path, text: bytes) -> dict[str, Any]:
    """The header's JSON object; a name that stands twice, at any depth, is refused."""
    if not text.startswith(b"{"):
        raise MalformedFile(path, ["the header does not begin with '{': this is not a safetensors file"])
    if has_too_many_tokens(text):
        raise MalformedFile(path, [f"the header holds more than {TOKENS_LIMIT:,} words and brackets"])
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedFile(path, [f"the header is not UTF-8 (byte {error.start})"]) from None
    try:
        document = json.loads(decoded, object_pairs_hook=refuse_duplicates, parse_constant=refuse_constant)
    except DuplicateKey as duplicate:
        raise MalformedFile(path, [f"the key {duplicate.args[0]!r} stands twice in the header"]) from None
    except RecursionError:
        raise MalformedFile(path, ["the header's JSON is nested too deeply"]) from None
    except ValueError as error:
        raise MalformedFile(path, [f"the header is not valid JSON: {error}"]) from None
    if not isinstance(document, dict):
        raise MalformedFile(path, ["the header is not a JSON object"])
    return document


def has_too_many_tokens(text: bytes) -> bool:
    """Whether JSON would take gigabytes when it is parsed, as no real header does; long strings are no harm."""
    if sum(text.count(mark) for mark in (b",", b"[", b"{", b'"')) <= TOKENS_LIMIT:
        return False
    return any(number >= TOKENS_LIMIT for number, _ in enumerate(TOKEN.finditer(text)))


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def fault_of_entry(entry: object) -> str:
    """What is wrong with the types in one tensor's entry, or an empty string."""
    if not isinstance(entry, dict):
        return "its entry is not an object"
    wanted = {"dtype", "shape", "data_offsets"}
    if missing := sorted(wanted - entry.keys()):
        return f"{', '.join(missing)} missing"
    if unknown := sorted(entry.keys() - wanted):
        return f"unknown field {unknown[0]!r}"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS_OF_DTYPE:
        return f"unknown dtype {reprlib.repr(dtype)}"
    if not isinstance(shape, list) or not all(is_count(size) for size in shape):
        return f"its shape {reprlib.repr(shape)} is not a list of whole numbers ≥ 0"
    if len(shape) > DIMENSIONS_LIMIT:
        return f"its shape has {len(shape)} dimensions; {DIMENSIONS_LIMIT} are allowed"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_count(offset) for offset in offsets):
        return f"its data_offsets {reprlib.repr(offsets)} are not two whole numbers ≥ 0"
    return ""


def fault_of_size(spot: TensorSpot, data_bytes: int) -> str:
    """Why one tensor's bytes cannot be what its shape and the file say, or an empty string."""
    if spot.begin > spot.end:
        return f"its data ends before it begins ({spot.begin}, {spot.end})"
    if spot.end > data_bytes:
        return f"its data ends at byte {spot.end:,}, but the file holds {data_bytes:,} bytes of data"
    bits = spot.elements * BITS_OF_DTYPE[spot.dtype]
    if bits % 8:
        return f"{spot.dtype} {list(spot.shape)} takes {bits:,} bits, which are no whole bytes"
    if bits != spot.size_bytes * 8:
        return f"{spot.dtype} {list(spot.shape)} takes {bits // 8:,} bytes, not {spot.size_bytes:,}"
    return ""


def faults_of_order(ordered: Mapping[str, TensorSpot], data_bytes: int) -> list[str]:
    """Overlaps and holes between the tensors, and bytes after the last."""
    faults = []
    reached, before = 0, ""
    for name, spot in ordered.items():
        if spot.begin > reached:
            faults.append(f"hole of {spot.begin - reached:,} bytes before {name!r}")
        elif spot.begin < reached:
            faults.append(f"{name!r} overlaps {before!r} by {reached - spot.begin:,} bytes")
        if spot.end >= reached:
            reached, before = spot.end, name
    if reached < data_bytes:
        faults.append(f"{data_bytes - reached:,} trailing bytes after the last tensor")
    return faults


def lay_out_tensors(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> dict[str, TensorSpot]:
    """Spots without holes for (name, dtype, shape) in the given order.

    If that order would leave a tensor unaligned to its element, wider elements come first.
    """
    listed = list(tensors)

    def place() -> dict[str, TensorSpot]:
        spots, position = {}, 0
        for name, dtype, shape in listed:
            end = position + (math.prod(shape) * BITS_OF_DTYPE[dtype] + 7) // 8
            spots[name] = TensorSpot(dtype, shape, position, end)
            position = end
        return spots

    spots = place()
    if any(spot.begin * 8 % BITS_OF_DTYPE[spot.dtype] for spot in spots.values()):
        listed.sort(key=lambda tensor: -BITS_OF_DTYPE[tensor[1]])
        spots = place()
    return spots


def encode_header(tensors: Mapping[str, TensorSpot], metadata: Mapping[str, str], least_bytes: int = 0) -> bytes:
    """The length and the JSON of a header, padded with spaces to whole words, and to `least_bytes` in all.

    Raises KwrapError if it would be longer than readers accept.
    """
    document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, spot in tensors.items():
        document[name] = {"dtype": spot.dtype, "shape": list(spot.shape), "data_offsets": [spot.begin, spot.end]}
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text = text.ljust(least_bytes - LENGTH_BYTES)
    text += b" " * (-len(text) % HEADER_ALIGNMENT_BYTES)
    if len(text) > HEADER_LIMIT_BYTES:
        raise KwrapError(
            f"the header of the output would take {len(text):,} bytes; readers accept {HEADER_LIMIT_BYTES:,}",
            "Strip the metadata of the inputs and merge again.",
        )
    return struct.pack("<Q", len(text)) + text
