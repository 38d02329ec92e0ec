"""Small checkpoints, as the merge's tests write them."""

from __future__ import annotations

from ..merging.conftest import write_model

__all__ = ["write_model"]
