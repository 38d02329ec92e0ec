"""One picture to draw: all that decides its pixels, and the name that follows from it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

FORMAT = 1
"""Of a cell's description; whoever changes its meaning raises it."""

SAMPLERS = {"euler-a": "Euler a", "dpmpp-2m": "DPM++ 2M", "dpmpp-2m-sde": "DPM++ 2M SDE"}
"""What the option calls them, and what the webui does."""

SCHEDULES = {"exponential": "Exponential", "karras": "Karras", "uniform": "Uniform"}
EMPHASES = ("no-norm", "original", "ignore")
SLUG_LENGTH = 40
HASH_DIGITS = 12
MOST_SEED = (1 << 63) - 1
MOST_STEPS = 1000
"""SDXL knows no more time steps."""


@dataclass(frozen=True)
class Compute:
    """How the numbers are computed: bits differ between two of these."""

    device: str = "cpu"
    """cpu or cuda."""

    dtype: str = "fp32"
    """Of the UNet and the text encoders."""

    vae_dtype: str = "fp32"
    """Of the decoder; SDXL's overflows in fp16."""

    batch: int = 1
    """Rows of every forward of the UNet; what is missing is filled up."""

    threads: int = 1
    """Of the processor, in each process."""


@dataclass(frozen=True)
class Hires:
    """A second pass at a larger size."""

    scale: float
    """Of both sides, over the first pass."""

    strength: float = 0.5
    """The share of the steps that is done again."""


@dataclass(frozen=True)
class Cell:
    """One picture of a sheet. Paths, names and labels are no part of it."""

    model: str
    """The sha256 of the checkpoint, with `+WEIGHT*SHA256` for each network that is added."""

    prompt: str
    """In the webui's grammar, its style included."""

    negative: str
    """The same for what guidance leads away from."""

    seed: int
    """Of all its noise."""

    width: int
    """Pixels of the first pass; a multiple of 8."""

    height: int
    """The same."""

    tokenizers: str
    """A digest of both."""

    steps: int = 24
    """Of the sampler."""

    guidance: float = 5.0
    """CFG scale; 1 leaves out the negative prompt."""

    sampler: str = "euler-a"
    """A key of SAMPLERS."""

    schedule: str = "exponential"
    """A key of SCHEDULES."""

    clip_skip: int = 2
    """The hidden layer of both encoders that is used, from the last; SDXL is trained with the last but one."""

    emphasis: str = "no-norm"
    """How weights of a prompt act: one of EMPHASES."""

    lenient: bool = False
    """Whether an open bracket reaches to the end of the prompt."""

    prediction: str = "epsilon"
    """What the UNet predicts: epsilon or v."""

    zero_terminal_snr: bool = False
    """Whether the noise schedule ends in pure noise."""

    hires: Hires | None = None
    """The second pass, where there is one."""

    compute: Compute = Compute()
    """How it is computed."""

    def describe(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {"format": FORMAT, **asdict(self)}

    @property
    def second_size(self) -> tuple[int, int] | None:
        """Height and width of the second pass, to the nearest 8 pixels."""
        if self.hires is None:
            return None
        height, width = (max(8, round(side * self.hires.scale / 8) * 8) for side in (self.height, self.width))
        return height, width

    @property
    def digest(self) -> str:
        """A sha256 over all of it."""
        text = json.dumps(self.describe(), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def name(self) -> str:
        """The picture's file name, which follows from the content: the first words, the seed, a part of the digest."""
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:SLUG_LENGTH].strip("-")
        return f"{words or 'picture'}_{self.seed}_{self.digest[:HASH_DIGITS]}.png"

    @property
    def group(self) -> tuple[Any, ...]:
        """Cells that can be rows of one batch have the same one, where their prompts have as many chunks."""
        fields = {**asdict(self), "prompt": "", "negative": "", "seed": 0}
        return tuple(str(value) for value in fields.values())


def read_cell(document: Mapping[str, Any]) -> Cell:
    """The cell of a description. Raises ValueError, TypeError or KeyError for another document."""
    fields = dict(document)
    if fields.pop("format") != FORMAT:
        raise ValueError(f"format {document['format']}")
    hires = fields.pop("hires")
    compute = Compute(**fields.pop("compute"))
    return Cell(**fields, hires=Hires(**hires) if hires else None, compute=compute)
