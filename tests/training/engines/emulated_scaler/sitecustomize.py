"""Put on PYTHONPATH by tests: a GradScaler on the CPU, and predictions that are no number, in the workers' processes.

EMULATED_SCALE: the scaler's first scale; without it there is none. NAN_FROM, NAN_TO: the first and the last call of the
UNet, counted from 1 in each process, whose prediction is NaN. NAN_GRADIENT: the call whose gradient alone is NaN.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any


def give_scaler(module: Any) -> None:
    """What accelerate makes under fp16 on a GPU."""
    import torch

    if "EMULATED_SCALE" not in os.environ:
        return
    made = module.Accelerator.__init__

    def make(self: Any, *arguments: Any, **keywords: Any) -> None:
        made(self, *arguments, **keywords)
        self.native_amp = True
        self.scaler = torch.amp.GradScaler("cpu", init_scale=float(os.environ["EMULATED_SCALE"]))

    module.Accelerator.__init__ = make


def spoil(kind: Any, name: str) -> None:
    """Let a method return NaN in calls NAN_FROM to NAN_TO, and what has no gradient in call NAN_GRADIENT."""
    method, calls = getattr(kind, name), 0

    def predict(self: Any, *arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        predicted = method(self, *arguments, **keywords)
        if calls == int(os.environ.get("NAN_GRADIENT", 0)):
            predicted.register_hook(lambda gradient: gradient * float("nan"))
        first, last = (int(os.environ.get(each, sys.maxsize)) for each in ("NAN_FROM", "NAN_TO"))
        return predicted * float("nan") if first <= calls <= last else predicted

    setattr(kind, name, predict)


HOOKS: dict[str, Callable[[Any], None]] = {
    "accelerate.accelerator": give_scaler,
    "kohaku_wrap.training.engines.builtin.loss": lambda module: spoil(module.LossOfBatch, "predict_noise"),
    "sdxl_train_network": lambda module: spoil(module.SdxlNetworkTrainer, "call_unet"),
}


class Finder(importlib.abc.MetaPathFinder):
    """Changes a module right after it was executed."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in HOOKS:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_change(module: Any) -> None:
                execute(module)
                HOOKS[name](module)

            spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


if os.environ.keys() & {"EMULATED_SCALE", "NAN_GRADIENT"}:
    sys.meta_path.insert(0, Finder())
