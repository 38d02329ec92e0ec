"""What the builtin engine puts into a state, and how it comes back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kohaku_wrap.training.engines.builtin.network import network_tensors
from kohaku_wrap.training.records.loss_average import LossAverage
from kohaku_wrap.training.records.manifest import UnfitState

NETWORK_FILE = "network.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
SCHEDULE_FILE = "schedule.json"
SCALER_FILE = "scaler.json"
LOSSES_FILE = "losses.json"


@dataclass(frozen=True)
class Trained:
    """All that changes while training."""

    network: Any
    """LyCORIS' network."""

    optimizer: Any
    """Prepared by accelerate."""

    schedule: Any
    """Prepared by accelerate."""

    scaler: Any | None
    """torch's GradScaler under fp16, else None."""

    losses: LossAverage
    """For people; kept so that the resumed run shows the same."""

    def write(self, folder: Path) -> None:
        """Write everything into an empty folder."""
        save_file(network_tensors(self.network, None), folder / NETWORK_FILE)
        torch.save(self.optimizer.state_dict(), folder / OPTIMIZER_FILE)
        (folder / SCHEDULE_FILE).write_text(json.dumps(self.schedule.state_dict()), encoding="utf-8")
        (folder / LOSSES_FILE).write_text(json.dumps(self.losses.document()), encoding="utf-8")
        if self.scaler is not None:
            (folder / SCALER_FILE).write_text(json.dumps(self.scaler.state_dict()), encoding="utf-8")

    def read(self, folder: Path) -> None:
        """Take everything from a state that was verified. Raises UnfitState where the network is another one."""
        self.read_network(folder)
        # The optimizer moves its own state to the device of the parameters.
        self.optimizer.load_state_dict(read_optimizer(folder))
        self.schedule.load_state_dict(json.loads((folder / SCHEDULE_FILE).read_text(encoding="utf-8")))
        self.read_scaler(folder)
        self.read_losses(folder)

    def read_network(self, folder: Path) -> None:
        """Take the weights. Raises UnfitState."""
        tensors = load_file(folder / NETWORK_FILE)
        own = self.network.state_dict()
        unlike = [name for name in own.keys() | tensors.keys() if shape(own, name) != shape(tensors, name)]
        if unlike:
            raise UnfitState(
                f"{folder}: {len(unlike)} tensors are of another network, the first {min(unlike)}",
                "Resume the run with its own network_args and preset.",
            )
        self.network.load_state_dict(tensors)

    def read_scaler(self, folder: Path) -> None:
        """Take the scale of gradients; the state of a branch's parent may have none."""
        if self.scaler is not None and (folder / SCALER_FILE).is_file():
            self.scaler.load_state_dict(json.loads((folder / SCALER_FILE).read_text(encoding="utf-8")))

    def read_losses(self, folder: Path) -> None:
        """Take the loss average."""
        self.losses.take(json.loads((folder / LOSSES_FILE).read_text(encoding="utf-8")))


def read_optimizer(folder: Path) -> dict[str, Any]:
    """The optimizer's state of a state, on the CPU."""
    found: dict[str, Any] = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
    return found


def shape(tensors: dict[str, torch.Tensor], name: str) -> tuple[int, ...] | None:
    """The tensor's shape, or None where there is none of that name."""
    return tuple(tensors[name].shape) if name in tensors else None
