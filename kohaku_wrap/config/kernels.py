"""The kernels that a run trains with, chosen once and the same for every rank, attempt and machine.

LyCORIS 4.x picks a back end by what is installed, times its kernels and keeps the choice in the user's home; torch may
take kernels whose sums come in another order each time. Each changes the last bits of the weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kohaku_wrap.errors import UsageError

BACKEND_VARIABLE = "LYCORIS_KERNEL_BACKEND"
BACKENDS = ("torch", "compile", "triton", "tilelang")
"""LyCORIS' own names; the first is always there and computes with torch's own operators."""

DETERMINISTIC_VARIABLE = "KWRAP_DETERMINISTIC"
"""1: ask torch for deterministic kernels on a GPU too, with the engine sd-scripts; slower."""

CACHE_FOLDER = "kernels"
"""Within the run's folder: what LyCORIS would keep in the user's home."""


def choose_kernels(*, on_cpu: bool) -> dict[str, Any]:
    """The lock's table `kernels`: by the caller's variables where they are set. Raises UsageError."""
    backend = (os.environ.get(BACKEND_VARIABLE) or BACKENDS[0]).lower()
    if backend not in BACKENDS:
        raise UsageError(
            f"{BACKEND_VARIABLE}={backend}: a run is made with one back end for all its ranks and attempts",
            f"Unset it, or name one: {', '.join(BACKENDS)}.",
        )
    deterministic = os.environ.get(DETERMINISTIC_VARIABLE, "")
    if deterministic not in ("", "0", "1"):
        raise UsageError(f"{DETERMINISTIC_VARIABLE}={deterministic}: not 0 or 1", "Set it to 1, or unset it.")
    return {
        "lycoris_backend": BACKENDS[0] if on_cpu else backend,
        "lycoris_tuning": False,
        "deterministic": on_cpu or deterministic == "1",
    }


def kernel_settings(kernels: Mapping[str, Any], run_folder: Path) -> dict[str, str]:
    """The variables that hold a worker to the lock's table, over those of the caller; none for runs of kwrap 0.1."""
    if not kernels:
        return {}
    return {
        BACKEND_VARIABLE: str(kernels["lycoris_backend"]),
        "LYCORIS_KERNEL_TUNE": "on" if kernels["lycoris_tuning"] else "off",
        # What was timed before, by any run, must not decide.
        "LYCORIS_KERNEL_CACHE_DIR": str(run_folder / CACHE_FOLDER),
        "LYCORIS_DEVICE_JSON": "",
        DETERMINISTIC_VARIABLE: str(int(kernels["deterministic"])),
    }
