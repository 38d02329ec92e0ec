"""The kinds of judges, and a judge: ONNX files that look at pictures as their makers publish it.

Nothing is fetched. Source of the layouts and of what happens to a picture: deepghs/ccip_onnx and deepghs' classifiers
as dghs-imgutils 0.19 reads them, SmilingWolf/wd-swinv2-tagger-v3 by its own example.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from kohaku_wrap.errors import KwrapError, refusing

OWN_FILE = "judge.toml"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
HALVES = (0.5, 0.5, 0.5)
WORST_TO_BEST = ("worst", "low", "normal", "good", "great", "best", "masterpiece")
"""Labels of an aesthetic judge."""

Features = npt.NDArray[np.float32]


class BadJudge(KwrapError):
    """A folder that is no judge, or not of the kind that is needed."""


class UnreadablePicture(KwrapError):
    """A picture that no judge can look at."""


@dataclass(frozen=True)
class Kind:
    """One kind of judge, and how its published files take a picture."""

    name: str
    """As `judge.toml` calls it."""

    measures: str
    """What for, in a few words."""

    files: tuple[str, ...]
    """All that the folder must hold; the first one is the model that looks at pictures."""

    published: str
    """Where such files are."""

    size: int
    """Pixels of both sides that the model looks at."""

    resize: str = "stretch"
    """`stretch` both sides, or `pad` to a white square first."""

    interpolation: str = "bilinear"
    """`bilinear` or `bicubic`."""

    layout: str = "nchw"
    """Of the input: `nchw`, or `nhwc`."""

    channels: str = "rgb"
    """`rgb`, or `bgr`."""

    scale: float = 255.0
    """What pixels are divided by."""

    mean: tuple[float, ...] = HALVES
    """Taken away after that, a channel."""

    deviation: tuple[float, ...] = HALVES
    """Divided by after that, a channel."""

    output: str = ""
    """The output that is read; empty for the first."""

    labels: tuple[str, ...] = ()
    """Of the output, where the folder's files do not say them."""

    threshold: float | None = None
    """From which on a tag counts; of ccip the largest difference of one character, where no file says it."""


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "ccip", "whether two pictures show one character",
            ("model_feat.onnx", "model_metrics.onnx", "metrics.json"),
            "deepghs/ccip_onnx, each folder of it; ccip-caformer-24-randaug-pruned is usual", 384,
            mean=CLIP_MEAN, deviation=CLIP_DEVIATION,
        ),
        Kind(
            "tagger", "which tags a picture shows", ("model.onnx", "selected_tags.csv"),
            "SmilingWolf/wd-swinv2-tagger-v3", 448, "pad", "bicubic", "nhwc", "bgr", 1.0, (0.0,) * 3, (1.0,) * 3,
            threshold=0.35,
        ),
        Kind(
            "aesthetic", "how good it looks, from worst to masterpiece", ("model.onnx", "meta.json"),
            "deepghs/anime_aesthetic, each folder of it", 448,
        ),
        Kind(
            "corruption", "whether it is broken", ("model.onnx", "meta.json"),
            "deepghs/ai_image_corrupted, each folder of it", 384,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Judge:
    """A folder of ONNX files that can look at pictures."""

    folder: Path
    """Where its files lie."""

    kind: Kind
    """What it measures, and how it takes a picture."""

    title: str
    """What it is called in every output."""

    model: str
    """The file that looks at pictures."""

    labels: tuple[str, ...]
    """Of its output; empty for features."""

    sha256: Mapping[str, str] = field(default_factory=dict)
    """Of each of its files."""

    threads: int = 1
    """Of the processor; another number may change last bits."""

    @cached_property
    def places(self) -> dict[str, int]:
        """Where each label stands in the output, by its name with underscores."""
        return {label.replace(" ", "_"): number for number, label in enumerate(self.labels)}

    @property
    def digest(self) -> str:
        """Of all that decides what it says of a picture."""
        spec = {**asdict(self.kind), "threshold": None, "sha256": self.sha256[self.model]}
        return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """For results."""
        import onnxruntime

        return {
            "kind": self.kind.name,
            "title": self.title,
            "sha256": dict(self.sha256),
            "threshold": self.kind.threshold,
            "size": self.kind.size,
            "onnxruntime": onnxruntime.__version__,
            "providers": self.session.get_providers(),
            "threads": self.threads,
        }

    def open_session(self, file: str) -> Any:
        """onnxruntime's session of one file. Raises BadJudge."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [each for each in wanted if each in onnxruntime.get_available_providers()]
        with self.blaming(file, "not an ONNX model"):
            return onnxruntime.InferenceSession(str(self.folder / file), options, providers=providers)

    @contextmanager
    def blaming(self, file: str, what: str) -> Iterator[None]:
        """Raise BadJudge where onnxruntime cannot do what is inside with a file."""
        try:
            yield
        except Exception as error:  # its own classes have no common one
            why = " ".join(str(error).split())[:200]
            raise BadJudge(f"{self.folder / file}: {what} ({why})", "Get the file again.") from None

    @cached_property
    def session(self) -> Any:
        """That of the model that looks at pictures. Raises BadJudge where it takes another input."""
        session = self.open_session(self.model)
        inputs, side, kind = session.get_inputs(), self.kind.size, self.kind
        shape = [1, 3, side, side] if kind.layout == "nchw" else [1, side, side, 3]
        has = list(inputs[0].shape)
        fits = len(inputs) == 1 and len(has) == 4 and all(
            not isinstance(one, int) or one == other for one, other in zip(has, shape, strict=True)
        )  # fmt: skip
        if not fits:
            needs = f"[N, {', '.join(map(str, shape[1:]))}]"
            raise BadJudge(
                f"{self.folder / self.model}: {len(inputs)} inputs, the first of shape {has}; "
                f"a judge of kind {kind.name} takes one of {needs}",
                f'Say what it takes in {self.folder / OWN_FILE}: size = N, layout = "nchw" or "nhwc". '
                "One picture is given at a time: its number must be 1 or left open in the file.",
            )
        if inputs[0].type != "tensor(float)":
            raise BadJudge(
                f"{self.folder / self.model}: takes {inputs[0].type}; a judge takes tensor(float), 32-bit numbers",
                "Export the model with an input of that type.",
            )
        names = [output.name for output in session.get_outputs()]
        if kind.output and kind.output not in names:
            raise BadJudge(
                f"{self.folder / self.model}: no output {kind.output!r}; it has {', '.join(names)}",
                f'Name one of them in {self.folder / OWN_FILE}: output = "{names[0]}".',
            )
        return session

    def run(self, file: str, session: Any, output: str, values: Features) -> Features:
        """One output of a file for its one input. Raises BadJudge where it cannot be computed."""
        with self.blaming(file, f"computes nothing from {list(values.shape)}"):
            (found,) = session.run([output], {session.get_inputs()[0].name: values})
            return np.asarray(found, dtype=np.float32)

    def look_at(self, path: Path) -> Features:
        """(outputs,) what the model says of one picture, looked at alone. Raises UnreadablePicture, BadJudge."""
        pixels = prepare_picture(path, self.kind)[None]
        name = self.kind.output or self.session.get_outputs()[0].name
        row = self.run(self.model, self.session, name, pixels).reshape(-1)
        if self.labels and len(row) != len(self.labels):
            raise BadJudge(
                f"{self.folder / self.model}: {len(row):,} outputs for {len(self.labels):,} labels",
                "The files of the folder are not of one model: get them again.",
            )
        return row

    @cached_property
    def metric(self) -> Any:
        """Of kind ccip: the session of the metric."""
        return self.open_session("model_metrics.onnx")

    def compare(self, features: Features) -> Features:
        """(pictures, pictures) differences of their features, from 0 on; of kind ccip."""
        file = "model_metrics.onnx"
        differences = self.run(file, self.metric, self.metric.get_outputs()[0].name, features)
        if differences.shape != (len(features), len(features)):
            raise BadJudge(
                f"{self.folder / file}: {differences.shape} differences of {len(features)} pictures",
                "Get the file again.",
            )
        return differences


def prepare_picture(path: Path, kind: Kind) -> Features:
    """The picture as a judge of this kind takes it: on white, resized, scaled. Raises UnreadablePicture."""
    again = "Remove it, or draw it again."
    damaged = refusing(UnreadablePicture, f"{path}: cannot be read", again, SyntaxError, Image.DecompressionBombError)
    with damaged, Image.open(path) as opened:
        image = flatten_on_white(opened)
        if kind.resize == "pad":
            side = max(image.size)
            square = Image.new("RGB", (side, side), (255, 255, 255))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        method = Image.Resampling.BICUBIC if kind.interpolation == "bicubic" else Image.Resampling.BILINEAR
        pixels = np.asarray(image.resize((kind.size, kind.size), method), dtype=np.float32)
    if kind.channels == "bgr":
        pixels = pixels[:, :, ::-1]
    mean, deviation = (np.array(each, dtype=np.float32) for each in (kind.mean, kind.deviation))
    scaled = (pixels / np.float32(kind.scale) - mean) / deviation
    return np.ascontiguousarray(scaled.transpose(2, 0, 1) if kind.layout == "nchw" else scaled, dtype=np.float32)


def flatten_on_white(image: Image.Image) -> Image.Image:
    """The picture in RGB, transparent parts white."""
    if "A" in image.getbands() or "transparency" in image.info:
        with_alpha = image.convert("RGBA")
        white = Image.new("RGBA", with_alpha.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, with_alpha).convert("RGB")
    return image.convert("RGB")
