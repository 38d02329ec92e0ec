"""The same model, dataset, seed and template through both engines: the same inputs, losses and network."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kohaku_wrap.proving.likeness import (
    compare_metrics,
    compare_networks,
    compare_records,
    read_positions,
    read_tensors,
)
from kohaku_wrap.training.records.folder import Run


@pytest.mark.sd_scripts
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_engines_train_the_same_network(train: Callable[..., Run], whole: Run) -> None:
    """Bit for bit, to the last step, where both begin with the same network: each draws other first factors."""
    first = whole.checkpoints / f"{whole.output_name}-step00000001.safetensors"
    # The first step of the warm-up has the rate zero, so this is how the trainer's began.
    assert all(not any(bits) for name, (*_, bits) in read_tensors(first).items() if name.endswith("lokr_w2"))
    compact = train("compact", "builtin", f"network_weights={first}")
    compare_records(read_positions(whole)[0], read_positions(compact)[0])
    assert compare_metrics(whole, compact) == whole.lock.total_optimizer_steps
    [one], [other] = whole.networks, compact.networks
    assert compare_networks(one, other) == 1022
