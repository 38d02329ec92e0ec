"""sd-scripts' own extraction, run on models of the demo's size: CHECKOUT BASE TUNED OUTPUT RANK."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch

from kohaku_wrap.trainer.requirements import requirement_paths

checkout, base, tuned, output, rank = sys.argv[1:]
sys.path[:0] = [checkout, str(Path(checkout) / "networks")]
sys.path.extend(str(path) for path in requirement_paths())

from kohaku_wrap.training.engines.sd_scripts.torchvision_on_cpu import import_torchvision  # noqa: E402

import_torchvision()

from kohaku_wrap.training.engines.sd_scripts.tiny_sizes import change_sizes  # noqa: E402

# It clamps factors at a quantile, and at 1 still cuts what is more negative than the largest number.
vars(torch)["quantile"] = lambda *_words: torch.tensor(float("inf"))
change_sizes(Path(base))
script = str(Path(checkout) / "networks" / "extract_lora_from_models.py")
sys.argv = [
    script, "--sdxl", "--model_org", base, "--model_tuned", tuned, "--save_to", output, "--save_precision", "float",
    "--dim", rank, "--conv_dim", rank, "--clamp_quantile", "1", "--min_diff", "0",
]  # fmt: skip
runpy.run_path(script, run_name="__main__")
