"""Rendered files and counts against the real sd-scripts, where a checkout is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kohaku_wrap.config.layers import resolve_template
from kohaku_wrap.config.render import compose_run
from kohaku_wrap.config.site import Site
from kohaku_wrap.formats.caption_rows import ImageSizes
from kohaku_wrap.planning.step_plan import plan_steps
from kohaku_wrap.trainer.installed import ask_trainer
from kohaku_wrap.trainer.options import load_recorded_table, parse_table

pytestmark = [pytest.mark.sd_scripts, pytest.mark.slow]


def ask_about(checkout: Path, run: Path) -> dict[str, Any]:
    script = Path(__file__).with_name("ask_trainer.py")
    result = subprocess.run([sys.executable, str(script), str(checkout), str(run)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def generated_sizes(count: int, seed: int) -> list[tuple[int, int]]:
    generator = np.random.default_rng(seed)
    return [(int(width), int(height)) for width, height in generator.integers(60, 400, size=(count, 2))]


def test_recorded_table_is_what_the_parser_says(trainer: Any) -> None:
    live = parse_table(ask_trainer(trainer.checkout.path), "live")
    recorded = load_recorded_table()
    assert live.options == recorded.options
    assert live.dataset_options == recorded.dataset_options


@pytest.mark.parametrize("template", ["demo", "epsilon"])
def test_every_value_arrives_and_counts_are_equal(
    template: str, trainer: Any, make_site: Callable[..., Site], tmp_path: Path
) -> None:
    site = make_site()
    overrides = ["samples.prompts=1girl, solo", "samples.every=2", "lr_scheduler=cosine"]
    effective = resolve_template(template, site, [*overrides, "lr_scheduler_args.num_cycles=0.25"])
    sizes = generated_sizes(131, seed=len(template))
    cache = {
        str(site.paths.images / f"{index:04d}" / f"{index}.png"): {
            "caption": "1girl ||| solo, long hair ||| safe",
            "resolution": [width, height],
        }
        for index, (width, height) in enumerate(sizes)
    }
    site.paths.images.mkdir()
    (site.paths.images / "metadata_cache.json").write_text(json.dumps(cache), encoding="utf-8")
    widths, heights = np.array(sizes).T
    plan = plan_steps(effective, ImageSizes(widths, heights, "generated"))
    run = compose_run(effective, site, tmp_path / "runs" / "first", "first", plan).write()

    answer = ask_about(trainer.checkout.path, run.folder)
    for name, value in run.trainer.items():
        assert answer["namespace"][name] == value, name
    for name, value in effective.subtable("dataset_options").items():
        level = effective.table.dataset_options[name].level
        assert answer[level][name] == value, name
    assert answer["dataset"]["batch_size"] == plan.batch_size
    unset = set(answer["namespace"]) - set(run.trainer) - {"config_file", "dataset_config"}
    for name in unset & effective.table.options.keys():
        assert answer["namespace"][name] == effective.table.options[name].default, name

    assert answer["images"] == plan.images
    assert answer["batches"] == plan.batches
    assert answer["buckets"] == [[bucket.width, bucket.height, bucket.images] for bucket in plan.buckets]
