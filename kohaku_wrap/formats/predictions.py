"""What a checkpoint's file says of its prediction: noise (epsilon) or velocity (v)."""

from __future__ import annotations

from dataclasses import dataclass

from kohaku_wrap.formats.safetensors import Header

MARKS = ("v_pred", "ztsnr")
"""Empty tensors that v-prediction checkpoints carry."""


@dataclass(frozen=True)
class Prediction:
    """What a model predicts, and who says so."""

    kind: str
    """epsilon or v."""

    zero_terminal_snr: bool
    """Whether its noise schedule ends in pure noise."""

    source: str
    """Where that stands; empty where nothing says it and epsilon is assumed."""


def find_prediction(header: Header) -> Prediction:
    """What the checkpoint says of its prediction: by modelspec, or by the keys that mark v-prediction."""
    stated = header.metadata.get("modelspec.prediction_type", "").lower()
    marked = [mark for mark in MARKS if mark in header.tensors]
    if marked:
        return Prediction("v", "ztsnr" in marked, f"its key {' and '.join(marked)}")
    if stated in ("v", "v_prediction", "epsilon"):
        return Prediction("epsilon" if stated == "epsilon" else "v", False, "modelspec.prediction_type")
    return Prediction("epsilon", False, "")
