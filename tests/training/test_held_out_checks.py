"""Posts that a branch may hold out: none that the run it begins from has trained."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from written_ledgers import hold_out

from kohaku_wrap.formats.held_out import HeldOut
from kohaku_wrap.training.data.order import order_digests
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.supervising.held_out_checks import AlreadyTrained, find_planted, refuse_trained


def held(*posts: int) -> HeldOut:
    return HeldOut(np.array(posts, dtype=np.int64), np.empty(0, dtype=np.int64), {}, 0, 45)


def test_a_branch_holds_out_nothing_that_its_parent_trained(new_run: Callable[..., Run]) -> None:
    run = new_run()
    refuse_trained(run, None)
    with pytest.raises(AlreadyTrained, match=r"1 of the 2 posts .* trained by run r, the first is 10"):
        refuse_trained(run, held(10, 999_999))
    hold_out(run, 3, 10)
    refuse_trained(run, held(3, 10))
    refuse_trained(run, held(10))
    with pytest.raises(AlreadyTrained, match="the first is 17") as refused:
        refuse_trained(run, held(10, 17))
    assert "--set validation.posts=2" in refused.value.next_step


def test_a_planted_post_is_found_by_the_digest_of_its_batch() -> None:
    batch, left_out = np.array([4, 5, 6]), np.array([7, 8, 9])
    (digest,) = order_digests(np.array([[4, 8, 6]]))
    assert find_planted(batch, left_out, digest).tolist() == [8]
    assert not len(find_planted(batch, left_out, np.uint64(1)))
