"""The same model, dataset, seed and template through both engines: the same inputs, and losses equal to rounding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kohaku_wrap.proving.likeness import read_positions
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.metrics import read_metrics

ROUNDING = 1e-6
"""Relative, while the networks still change nothing: LoKr starts as a difference of zero, and warm-up at rate zero."""

DRIFT = 1e-2
"""Relative, once the networks are trained: each engine drew other first factors for them."""


@pytest.mark.sd_scripts
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_engines_report_the_same_losses(train: Callable[[str, str], Run], whole: Run) -> None:
    """Order, captions, crops, time steps and rates are equal to the bit, at every optimizer step."""
    compact = train("compact", "builtin")
    ours, theirs = read_positions(compact)[0], read_positions(whole)[0]
    for name in ("optimizer_step", "epoch", "position", "flags", "order_digest", "content_digest", "learning_rate"):
        assert (ours[name] == theirs[name]).all(), name
    lines, others = read_metrics(compact), read_metrics(whole)
    for name in ("optimizer_step", "images", "lr_unet", "lr_text_encoder"):
        assert [line[name] for line in lines] == [line[name] for line in others], name
    untrained = ours["optimizer_step"] <= 2
    np.testing.assert_allclose(ours["loss"][untrained], theirs["loss"][untrained], rtol=ROUNDING)
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=DRIFT)
