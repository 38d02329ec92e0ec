"""What there is to compute with, told without loading torch, and how a picture is computed where nobody says."""

from __future__ import annotations

import os
from pathlib import Path

from kohaku_wrap.config.base_model import read_sizes
from kohaku_wrap.formats.safetensors import read_header
from kohaku_wrap.formats.sdxl import LATENT_PIXELS
from kohaku_wrap.processes import asked_threads, count_cores
from kohaku_wrap.sampling.cells import Compute
from kohaku_wrap.sampling.sizes import find_sizes

GPU_BATCH = 4
"""Rows of a forward on a GPU, where --batch does not say it."""


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is there and not hidden from this process."""
    return not hides_gpus(os.environ.get("CUDA_VISIBLE_DEVICES")) and Path("/dev/nvidiactl").exists()


def hides_gpus(visible: str | None) -> bool:
    """Whether CUDA_VISIBLE_DEVICES, None where it is not set, names no GPU: what stands behind a -1 does not count."""
    return visible is not None and visible.split(",")[0].strip() in ("", "-1")


def choose_compute(
    device: str | None, dtype: str | None, vae_dtype: str | None, batch: int | None, threads: int | None
) -> Compute:
    """As asked for; what is left open follows from the machine and its variables, never from how many processes."""
    chosen = device or ("cuda" if has_gpu() else "cpu")
    on_gpu = chosen == "cuda"
    return Compute(
        chosen, dtype or ("fp16" if on_gpu else "fp32"), vae_dtype or "fp32", batch or (GPU_BATCH if on_gpu else 1),
        threads or asked_threads() or count_cores(),
    )  # fmt: skip


def usual_size(model: Path) -> tuple[int, int]:
    """The size that a model is made for: 1024 × 1024 for SDXL. Raises BadBaseModel."""
    side = int(read_sizes(find_sizes(read_header(model)))["unet"].get("sample_size", 128)) * LATENT_PIXELS
    return side, side
