"""The sd-scripts engine's worker, started in a run's folder by `accelerate launch -m` and this module."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kohaku_wrap.config.kernels import DETERMINISTIC_VARIABLE
from kohaku_wrap.config.site import load_site
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.trainer.checkout import Checkout, find_checkout, list_installed, require_supported
from kohaku_wrap.trainer.requirements import requirement_paths
from kohaku_wrap.training.engines.worker import run_worker
from kohaku_wrap.training.records.attempts import Attempt

if TYPE_CHECKING:
    from kohaku_wrap.training.engines.interface import Engine


def main() -> int:
    """Train the attempt that KWRAP_RUN and KWRAP_ATTEMPT name; 0 when it finished or was stopped as asked."""
    return run_worker(begin)


def begin(attempt: Attempt, rank: int) -> Engine:
    """The engine of the attempt, from the checkout that its lock names."""
    commit = attempt.lock.trainer_commit
    if "trainer_commit" in attempt.allow and commit not in {each.commit for each in list_installed()}:
        commit = ""
    checkout = require_supported(find_checkout(commit))
    secrets = read_secrets(attempt, rank)
    if secrets.get("huggingface_repo_id"):
        os.environ["HF_HUB_OFFLINE"] = "0"
    enter_checkout(checkout)
    # Only now: the trainer's modules are found, and torch reads what the launch has set.
    from kohaku_wrap.training.engines.sd_scripts.run import SdScriptsRun

    return SdScriptsRun(attempt, rank, checkout, secrets)


def enter_checkout(checkout: Checkout) -> None:
    """Put the checkout, and packages that only it needs, on the import path."""
    sys.path.insert(0, str(checkout.path))
    sys.path.extend(str(path) for path in requirement_paths())
    from kohaku_wrap.training.engines.sd_scripts.torchvision_on_cpu import import_torchvision

    import_torchvision()
    settle_torch()
    # One line a file of every state.
    logging.getLogger("accelerate.checkpointing").setLevel(logging.WARNING)


def settle_torch() -> None:
    """All processes counted, and the same bits each time: always on a CPU, on a GPU where it was asked for."""
    import torch

    if not torch.cuda.is_available():
        # Else accelerate counts one process however many torchrun started.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if not torch.cuda.is_available() or os.environ.get(DETERMINISTIC_VARIABLE) == "1":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False


def read_secrets(attempt: Attempt, rank: int) -> Mapping[str, Any]:
    """`[secrets]` of the site that the run was made on. Raises KwrapError on rank 0 where that file is gone."""
    if not attempt.lock.secrets_file:
        return {}
    try:
        return load_site(attempt.lock.secrets_file).secrets
    except KwrapError:
        if rank == 0:
            raise
        return {}


if __name__ == "__main__":
    sys.exit(main())
