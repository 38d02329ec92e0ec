"""The moving average of the loss over one epoch, kept with the state so that a resume shows the same figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class LossAverage:
    """The mean of the newest loss at each optimizer step of an epoch, as sd-scripts' LossRecorder keeps it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.total = 0.0

    def add(self, step_in_epoch: int, loss: float) -> float:
        """Record the loss at a step of its epoch, counted from 0; the average with it."""
        while len(self.losses) <= step_in_epoch:
            self.losses.append(0.0)
        self.total += loss - self.losses[step_in_epoch]
        self.losses[step_in_epoch] = loss
        return self.total / len(self.losses)

    def document(self) -> dict[str, Any]:
        """What a state keeps; JSON writes these floats without loss."""
        return {"losses": self.losses, "total": self.total}

    def take(self, document: Mapping[str, Any]) -> None:
        """Go on as `document` left it."""
        self.losses = [float(loss) for loss in document["losses"]]
        self.total = float(document["total"])
