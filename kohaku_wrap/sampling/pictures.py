"""Pictures as PNG files that say how they were made: the webui's `parameters` text and a `kwrap` chunk of JSON."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import kohaku_wrap
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import atomic_write, parse_json
from kohaku_wrap.merging.hashes import AUTO_V2_DIGITS
from kohaku_wrap.sampling.cells import EMPHASES, SAMPLERS, SCHEDULES, Cell, read_cell
from kohaku_wrap.training.records.documents import fits

CHUNK = "kwrap"
VAE = "vae"
"""The part of a file that is neither checkpoint nor network."""

PARAMETERS = "parameters"
LORA_HASH_DIGITS = 12
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


class NotOurs(KwrapError):
    """A picture that kwrap did not draw, or whose text was taken out."""


@dataclass(frozen=True)
class ModelFile:
    """One file that a picture was drawn with."""

    name: str
    """Without its folder."""

    sha256: str
    """Of the whole."""

    data_sha256: str
    """Of the data section: the AutoV3 that model sites show of networks."""

    weight: str = ""
    """Of a network."""

    part: str = ""
    """VAE, where it is only that."""


@dataclass(frozen=True)
class Record:
    """What a picture says of itself."""

    cell: Cell
    """All that decides its pixels."""

    files: tuple[ModelFile, ...]
    """The checkpoint, its networks, and a VAE where it was another file's."""

    versions: Mapping[str, str]
    """Of the packages that drew it."""

    pixels_sha256: str
    """Of the RGB bytes, row by row."""

    optimizer_step: int | None = None
    """Of the run that the network was saved at, where it is a run's."""

    prediction_from: str = ""
    """Where the prediction stands; empty where epsilon was assumed."""

    device_name: str = ""
    """The processor."""

    @property
    def networks(self) -> list[ModelFile]:
        """Those that were added."""
        return [each for each in self.files[1:] if each.part != VAE]

    @property
    def vae(self) -> ModelFile | None:
        """The file of the VAE, where it was not the checkpoint's."""
        return next((each for each in self.files if each.part == VAE), None)


def quote(value: object) -> str:
    """A value of `parameters`: a JSON string where it holds what would part it from the next."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ",\n:\r") else text


def compose_parameters(record: Record) -> str:
    """The text that the webui writes, and all galleries read."""
    cell, checkpoint = record.cell, record.files[0]
    fields: dict[str, object] = {
        "Steps": cell.steps,
        "Sampler": SAMPLERS[cell.sampler],
        "Schedule type": SCHEDULES[cell.schedule],
        "CFG scale": f"{cell.guidance:g}",
        "Seed": cell.seed,
        "Size": f"{cell.width}x{cell.height}",
        "Model hash": checkpoint.sha256[:AUTO_V2_DIGITS],
        "Model": Path(checkpoint.name).stem,
        "Clip skip": cell.clip_skip,
        "Emphasis": {"no-norm": "No norm", "original": "Original", "ignore": "Ignore"}[cell.emphasis],
    }
    if cell.hires:
        fields["Denoising strength"] = f"{cell.hires.strength:g}"
        fields["Hires upscale"] = f"{cell.hires.scale:g}"
        fields["Hires upscaler"] = "Latent"
    if vae := record.vae:
        fields["VAE hash"] = vae.sha256[:AUTO_V2_DIGITS]
        fields["VAE"] = vae.name
    if record.networks:
        hashes = [f"{Path(each.name).stem}: {each.data_sha256[:LORA_HASH_DIGITS]}" for each in record.networks]
        fields["Lora hashes"] = ", ".join(hashes)
    fields["Version"] = f"kwrap {kohaku_wrap.__version__}"
    line = ", ".join(f"{name}: {quote(value)}" for name, value in fields.items())
    negative = f"\nNegative prompt: {cell.negative}" if cell.negative else ""
    return f"{cell.prompt}{negative}\n{line}"


def describe_record(record: Record) -> dict[str, Any]:
    """What a picture and `kwrap inspect` say of it, as JSON; sizes are height and width, as the UNet got them."""
    size = [record.cell.height, record.cell.width]
    return {
        "cell": record.cell.describe(),
        "cell_sha256": record.cell.digest,
        "pixels_sha256": record.pixels_sha256,
        "files": [asdict(each) for each in record.files],
        "optimizer_step": record.optimizer_step,
        "prediction_from": record.prediction_from,
        "device": record.device_name,
        "versions": dict(record.versions),
        "original_size": size,
        "crop_top_left": [0, 0],
        "target_size": size,
        "second_pass_size": record.cell.second_size,
    }


def write_picture(path: Path, image: Image.Image, record: Record) -> None:
    """Write the picture under its name when it is whole."""
    text = PngInfo()
    text.add_itxt(PARAMETERS, compose_parameters(record))
    text.add_itxt(CHUNK, json.dumps(describe_record(record), ensure_ascii=False))
    with atomic_write(path, "wb") as stream:
        image.save(stream, "PNG", pnginfo=text)


def hash_pixels(image: Image.Image) -> str:
    """A sha256 over the RGB bytes, row by row."""
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def read_texts(path: Path) -> tuple[dict[str, str], str]:
    """The texts of a PNG and the sha256 of its pixels. Raises OSError or ValueError where it is not a whole one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with path.open("rb") as stream, Image.open(stream, formats=("PNG",)) as image:
            image.load()
            stream.seek(-len(PNG_END), 2)
            if stream.read() != PNG_END:
                raise ValueError("it is cut off")
            texts = {name: str(text) for name, text in getattr(image, "text", {}).items()}
            return texts, hash_pixels(image)


def read_record(path: Path) -> tuple[Record, str]:
    """What a picture says of itself, and the sha256 of the pixels that it has now. Raises NotOurs."""
    try:
        texts, pixels = read_texts(path)
        if CHUNK not in texts:
            raise NotOurs(
                f"{path}: no picture of kwrap: it has "
                + ("the webui's text alone" if PARAMETERS in texts else "no text of kwrap"),
                "Galleries and editors often take such texts out; look at the picture as it was drawn.",
            )
        document = parse_json(texts[CHUNK])
        files = tuple(ModelFile(**each) for each in document["files"])
        record = Record(
            read_cell(document["cell"]), files, document["versions"], document["pixels_sha256"],
            document["optimizer_step"], document["prediction_from"], document["device"],
        )  # fmt: skip
        if not files or not isinstance(record.versions, dict) or not is_known(record):
            raise ValueError("its text is of a later kwrap, or was changed")
    except (OSError, ValueError, TypeError, KeyError, SyntaxError, Image.DecompressionBombError) as error:
        why = f"its text has no {error}" if isinstance(error, KeyError) else error
        raise NotOurs(f"{path}: not a whole PNG of kwrap ({why})", "Draw it again.") from None
    return record, pixels


def is_known(record: Record) -> bool:
    """Whether every field is of its kind, and sampler, schedule and emphasis are ones that this kwrap has."""
    cell = record.cell
    known = cell.sampler in SAMPLERS and cell.schedule in SCHEDULES and cell.emphasis in EMPHASES
    return known and all(
        fits(getattr(one, name), hint)
        for one in (record, cell, cell.compute, *record.files, *([cell.hires] if cell.hires else []))
        for name, hint in get_type_hints(type(one)).items()
        if name not in ("files", "versions")
    )


def is_drawn(path: Path, cell: Cell) -> bool:
    """Whether the whole picture of this very cell is there, with the pixels that were drawn."""
    if not path.is_file():
        return False
    try:
        record, pixels = read_record(path)
    except NotOurs:
        return False
    return record.cell == cell and record.pixels_sha256 == pixels


def is_png(path: Path) -> bool:
    """Whether a file begins as PNG files do."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(PNG_MAGIC)) == PNG_MAGIC
