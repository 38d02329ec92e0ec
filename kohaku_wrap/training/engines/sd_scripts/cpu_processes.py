"""Let sd-scripts train on several CPU processes, where accelerate wraps even what is not trained."""

from __future__ import annotations

from typing import Any

from accelerate.utils import DistributedType


def leave_frozen_modules(base: Any) -> Any:
    """An Accelerator class that wraps only modules with something to train, as accelerate does on GPUs."""

    class LeavesFrozenModules(base):  # type: ignore[misc]  # taken from sd-scripts' module at run time
        def prepare_model(self, model: Any, *arguments: Any, **keywords: Any) -> Any:
            frozen = not any(parameter.requires_grad for parameter in model.parameters())
            if frozen and self.distributed_type == DistributedType.MULTI_CPU:
                # DistributedDataParallel refuses a module without gradients.
                keywords["evaluation_mode"] = True
            return super().prepare_model(model, *arguments, **keywords)

    return LeavesFrozenModules
