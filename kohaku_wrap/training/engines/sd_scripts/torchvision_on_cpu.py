"""Let the ordinary torchvision import beside a torch without CUDA.

PyPI's torchvision is built for CUDA: its operators fail to load beside a CPU torch, and the fakes that it
registers for two of them then have nothing to stand for. Declared first, they do no harm: training calls neither.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

import torch

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

DECLARED: list[Any] = []
"""Kept alive: the declarations end with the object that made them."""


def import_torchvision() -> None:
    """Import torchvision if it is there, declaring its missing operators where that is what it takes."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision.transforms")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        # torch leaves this class without type information.
        library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for operator in OPERATORS:
            library.define(operator)
        DECLARED.append(library)
        importlib.import_module("torchvision.transforms")
