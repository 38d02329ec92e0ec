"""`[validation]` of a template: what it takes out of training, what is refused, and what the plan says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from kohaku_wrap.cli.plan import command
from kohaku_wrap.config.layers import resolve_template, vary_lock
from kohaku_wrap.config.render import compose_run
from kohaku_wrap.config.run_files import digest_lock
from kohaku_wrap.config.site import Site
from kohaku_wrap.config.training_data import read_training_sizes
from kohaku_wrap.config.validation import TooManyHeldOut, settle_held_out
from kohaku_wrap.errors import ProblemsFound
from kohaku_wrap.formats.caption_writer import ColumnsWriter
from kohaku_wrap.formats.held_out import HELD_OUT_FILE, HeldOut
from kohaku_wrap.formats.relations import Relations, write_relations
from kohaku_wrap.planning.step_plan import plan_steps

MakeSite = Callable[..., Site]
MACHINE = 'engine = "builtin"\ngpus = 0\nbatch_per_gpu = 2'


def write_images(images: Path, count: int, parents: dict[int, int] | None = None) -> None:
    """Columns of squares with what belongs together; the images themselves are not needed."""
    images.mkdir(parents=True, exist_ok=True)
    ids, sides = np.arange(1, count + 1, dtype=np.int64), np.full(count, 128, dtype=np.int32)
    with (images / "captions.arrow").open("w+b") as stream, ColumnsWriter(stream, {"dataset": "demo"}) as writer:
        files = pa.array([f"{each}.png" for each in ids])
        writer.write(ids, files, sides, sides, pa.array(["1girl ||| solo ||| safe"] * count))
    if parents is not None:
        above = np.array([parents.get(each, 0) for each in ids.tolist()], dtype=np.int64)
        write_relations(images, Relations(ids, above, pa.array([f"{each:032x}" for each in ids])))


def test_the_plan_counts_without_held_out_posts(make_site: MakeSite) -> None:
    site = make_site(MACHINE)
    write_images(site.paths.images, 101, {})
    before = plan_steps(
        resolve_template("demo", site), read_training_sizes(resolve_template("demo", site), site.paths.images)
    )
    effective = resolve_template("demo", site, ["validation.posts=10"])
    after = plan_steps(effective, read_training_sizes(effective, site.paths.images))
    assert (before.images, after.images) == (101, 91) and after.batches == 46
    asked = ["demo", "--site", str(site.path), "--no-modules", "--seconds-per-step", "8"]
    asked += [
        word
        for text in ("validation.posts=10", "validation.every=4", "validation.timesteps=3")
        for word in ("--set", text)
    ]
    document = json.loads(CliRunner().invoke(command, [*asked, "--json"]).stdout)
    total = document["total_optimizer_steps"]
    evaluations = len({0, *range(4, total + 1, 4), total})
    assert document["images"] == 91
    assert document["validation"] == {
        "posts": 10, "relatives": 0, "evaluations": evaluations, "forwards": evaluations * 3 * 3, "rows": 4,
        "seconds": pytest.approx(8 * evaluations * 9 * 4 / (document["effective_batch"] * 3)),
    }  # fmt: skip
    shown = CliRunner().invoke(command, asked).output
    assert (
        "10 posts: none is trained" in shown
        and f"{evaluations} evaluations, {evaluations * 9} forwards of 4 images" in shown
    )


def test_which_posts_stands_in_the_lock_and_decides_the_options_digest(make_site: MakeSite, tmp_path: Path) -> None:
    site = make_site(MACHINE)
    write_images(site.paths.images, 300, dict.fromkeys((7, 208), 150))

    def lock_of(*overrides: str) -> dict[str, Any]:
        effective = resolve_template("demo", site, overrides)
        plan = plan_steps(effective, read_training_sizes(effective, site.paths.images))
        return dict(compose_run(effective, site, tmp_path / "r", "r", plan).lock)

    plain, held = lock_of(), lock_of("validation.posts=1", "validation.every=2")
    assert "validation" not in plain and HELD_OUT_FILE not in plain["files"]
    listed = HeldOut.parse(held["files"][HELD_OUT_FILE])
    assert held["validation"] | {"digest": ""} == {
        "posts": 1, "every": 2, "timesteps": 9, "batch": 4, "drawn": 1, "relatives": len(listed.relatives),
        "relatives_unknown": 0, "digest": "",
    }  # fmt: skip
    assert (listed.posts.tolist(), listed.relatives.tolist()) == ([208], [7, 150])
    assert held["plan"]["images"] == 300 - len(listed.left_out)
    digests = [
        lock["run"]["options_digest"] for lock in (plain, held, lock_of("validation.posts=1", "validation.every=9"))
    ]
    assert digests[0] != digests[1] == digests[2], "when it is measured decides no weight"
    assert lock_of("seed=5", "validation.posts=1")["validation"]["digest"] == held["validation"]["digest"]
    assert digest_lock(held) != digest_lock(held | {"files": held["files"] | {HELD_OUT_FILE: "{}"}})
    again = vary_lock(tmp_path / "run.lock.toml", held, {"max_train_epochs": 1}, site)
    assert (again.get("validation.posts"), again.get("validation.every")) == (1, 2)


def test_more_than_a_tenth_is_refused_with_the_number(make_site: MakeSite) -> None:
    site = make_site(MACHINE)
    write_images(site.paths.images, 100, {})
    effective = resolve_template("demo", site, ["validation.posts=11"])
    with pytest.raises(TooManyHeldOut, match=r"11 posts are 11.0% of the 100 images; at most 10 %") as refused:
        settle_held_out(effective, site.paths.images)
    assert "posts = 10 or less" in refused.value.next_step
    assert settle_held_out(resolve_template("demo", site, ["validation.posts=10"]), site.paths.images) is not None
    # What is alike counts: all are of one family.
    write_images(site.paths.images, 100, dict.fromkeys(range(1, 101), 500))
    with pytest.raises(TooManyHeldOut, match=r"2 posts and 98 that are their like are 100.0%"):
        settle_held_out(resolve_template("demo", site, ["validation.posts=2"]), site.paths.images)
    result = CliRunner().invoke(
        command, ["demo", "--site", str(site.path), "--set", "validation.posts=50", "--no-modules"]
    )
    assert isinstance(result.exception, TooManyHeldOut)


def test_what_does_nothing_or_cannot_be_is_refused(make_site: MakeSite) -> None:
    site = make_site(MACHINE)
    for overrides, where, what in (
        (["validation.every=5"], "validation.every", "does nothing without posts"),
        (["validation.posts=-1"], "validation.posts", "out of range"),
        (["validation.posts=5", "validation.timesteps=1001"], "validation.timesteps", "between 1 and 1000"),
        (["validation.posts=5", "validation.batch=0"], "validation.batch", "out of range"),
        (["validation.posts=5", "validation.evry=5"], "validation.evry", "did you mean"),
        (["validation.posts=many"], "validation.posts", "many"),
    ):
        with pytest.raises(ProblemsFound) as refused:
            resolve_template("demo", site, overrides)
        assert any(each.where == where and what in each.what for each in refused.value.problems), refused.value.problems
    trainers = make_site("gpus = 1\nbatch_per_gpu = 2")
    with pytest.raises(ProblemsFound, match='works only with data = "kwrap"'):
        resolve_template("demo", trainers, ["validation.posts=5", "kwrap.data=sd-scripts"])
    assert resolve_template("demo", site, ["validation.posts=0", "validation.every=5"]).get("validation.every") == 5


def test_what_is_not_known_of_relatives_is_told(make_site: MakeSite) -> None:
    site = make_site(MACHINE)
    write_images(site.paths.images, 60)
    asked = ["demo", "--site", str(site.path), "--no-modules", "--set", "validation.posts=3"]
    assert "of 60 of 60 posts it is not known which are their like" in CliRunner().invoke(command, asked).output
