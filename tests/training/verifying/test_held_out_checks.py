"""Posts that a branch may hold out: none that the run it begins from has trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import numpy as np
import pytest
import toml
from written_ledgers import hold_out

from kohaku_wrap.formats.held_out import HeldOut
from kohaku_wrap.toml_files import parse_toml
from kohaku_wrap.training.data.order import order_digests
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.origin import Origin
from kohaku_wrap.training.starting.already_trained import AlreadyTrained, refuse_trained
from kohaku_wrap.training.verifying.held_out_checks import find_planted


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


def test_a_branch_holds_out_nothing_that_any_run_before_it_trained(new_run: Callable[..., Run]) -> None:
    first, second = new_run("first"), new_run("second")
    hold_out(second, 3, 10)
    origin = Origin("first", "0f" * 16, "digest", 4, 1, "state", "digest", "AdamW", 0, ("the seed",))
    for run, added in ((first, {}), (second, {"parent": origin.document()})):
        tables = parse_toml(run.lock_file.read_text(encoding="utf-8"))
        own = {"id": origin.run_id if run == first else "0e" * 16, "options_digest": origin.options_digest}
        tables |= {"format": 2, "run": tables["run"] | own, **added}
        run.lock_file.write_text(toml.dumps(tables), encoding="utf-8")
        run.forget_lock()
    with pytest.raises(AlreadyTrained, match=r"1 of the 1 posts .* trained by run first, the first is 3") as refused:
        refuse_trained(second, held(3))
    assert refused.value.next_step == "Hold out none: --set validation.posts=0"
    shutil.rmtree(first.folder)
    (note,) = refuse_trained(second, held(3))
    assert "what run first trained before is not known" in note


def test_posts_trained_that_are_the_like_of_held_out_ones_are_counted(new_run: Callable[..., Run]) -> None:
    run = new_run()
    hold_out(run, 3)
    like = HeldOut(np.array([3], dtype=np.int64), np.array([10, 17], dtype=np.int64), {}, 0, 45)
    (note,) = refuse_trained(run, like)
    assert "run r trained 2 posts that are the like of held-out ones" in note


def test_a_planted_post_is_found_by_the_digest_of_its_batch() -> None:
    batch, left_out = np.array([4, 5, 6]), np.array([7, 8, 9])
    (digest,) = order_digests(np.array([[4, 8, 6]]))
    assert find_planted(batch, left_out, digest).tolist() == [8]
    assert not len(find_planted(batch, left_out, np.uint64(1)))
