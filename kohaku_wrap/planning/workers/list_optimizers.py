"""The arguments of the optimizers that the trainer knows, from their real signatures, printed as one JSON document.

Run as `python -m kohaku_wrap.planning.workers.list_optimizers [module.Class …]`; with names, only those are read.
What sd-scripts calls each and the class behind it, at 48d368f, stand in `config/options_optimizers.json` itself.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any

from kohaku_wrap.config.code_names import load_signatures
from kohaku_wrap.processes import answer
from kohaku_wrap.trainer.installed import plain_name
from kohaku_wrap.trainer.requirements import find_version

NOT_ARGUMENTS = ("self", "params", "lr")
"""What the trainer passes itself."""


def list_arguments(path: str) -> list[str] | None:
    """The keyword arguments of a class; None where it cannot be imported or takes any."""
    module, _, name = path.rpartition(".")
    try:
        optimizer: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None
    parameters = inspect.signature(optimizer.__init__).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters if parameter.name not in NOT_ARGUMENTS]


def list_optimizers() -> dict[str, Any]:
    """Class, version and arguments of each optimizer by its name."""
    wanted = {path: path for path in sys.argv[1:]} or {
        entry["name"]: entry["class"] for entry in load_signatures().values()
    }
    return {
        name: {
            "class": path,
            "version": find_version(plain_name(path.split(".")[0])),
            "arguments": list_arguments(path),
        }
        for name, path in wanted.items()
    }


if __name__ == "__main__":
    answer(list_optimizers)
