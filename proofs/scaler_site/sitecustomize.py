"""Gives accelerate a GradScaler that begins too high, so that its first steps are skipped; on a CPU, too.

Python imports it where KWRAP_PROVE_SCALE is set and this folder is on PYTHONPATH, as `make gpu` does for two of its
runs. On a CPU, which has no fp16 training, the scaler and fp16 autocast stand in for a GPU's.
"""

import importlib.abc
import importlib.util
import os
import sys

MODULE = "accelerate.accelerator"
BACKOFF = 2.0**-16
"""One skipped step or two bring any scale down to a usual one."""


def change_accelerator(module):
    """Let every Accelerator of the module take the scaler."""
    import torch

    make = module.Accelerator.__init__

    def begin(self, *arguments, **keywords):
        make(self, *arguments, **keywords)
        device = self.device.type
        if device == "cpu":
            self.native_amp = True
            self.state._mixed_precision = "fp16"
        if device == "cpu" or self.scaler is not None:
            scale = float(os.environ["KWRAP_PROVE_SCALE"])
            self.scaler = torch.amp.GradScaler(device, init_scale=scale, backoff_factor=BACKOFF)

    module.Accelerator.__init__ = begin


class Finder(importlib.abc.MetaPathFinder):
    """Finds the one module as Python would, and changes it when it is loaded."""

    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            change_accelerator(module)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("KWRAP_PROVE_SCALE"):
    sys.meta_path.insert(0, Finder())
