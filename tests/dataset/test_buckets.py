"""Buckets equal sd-scripts' to the last pixel, and the counts that plan and training build on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kohaku_wrap.dataset.buckets import (
    BucketError,
    BucketOptions,
    assign_buckets,
    find_crop_corners,
    list_bucket_resolutions,
    parse_resolution,
)
from kohaku_wrap.errors import ProblemsFound
from kohaku_wrap.trainer.requirements import requirement_paths

EPSILON = BucketOptions((1024, 1024), enable_bucket=True, min_bucket_reso=256, max_bucket_reso=4096)

# What sd-scripts 48d368f answered: options, image size, bucket, resized size.
GOLDEN = [
    (EPSILON, (1024, 1024), (1024, 1024), (1024, 1024)),
    (EPSILON, (850, 1200), (832, 1216), (861, 1216)),
    (EPSILON, (300, 200), (1216, 832), (1248, 832)),
    (EPSILON, (640, 1600), (640, 1600), (640, 1600)),
    (EPSILON, (100, 4000), (256, 4096), (256, 10240)),
    (BucketOptions((512, 768)), (333, 777), (512, 768), (512, 1195)),
    (BucketOptions((1024, 1024), True, bucket_no_upscale=True), (500, 700), (448, 640), (500, 700)),
    (BucketOptions((1024, 1024), True, bucket_no_upscale=True), (3000, 2000), (1216, 832), (1248, 832)),
    (BucketOptions((96, 96), True, 32, 200, 32, True), (190, 97), (128, 64), (128, 65)),
]


@pytest.mark.parametrize(("options", "size", "bucket", "resized"), GOLDEN)
def test_golden_values(options, size, bucket, resized):
    assignment = assign_buckets([size[0]], [size[1]], options)
    assert tuple(assignment.resolutions[assignment.bucket_of_image[0]]) == bucket
    assert tuple(assignment.resized_sizes[0]) == resized


def test_resolutions_of_epsilon():
    resolutions = list_bucket_resolutions(EPSILON)
    assert resolutions == sorted(set(resolutions))
    assert (1024, 1024) in resolutions and (256, 4096) in resolutions and (4096, 256) in resolutions
    assert all(w % 64 == h % 64 == 0 and w * h <= 1024 * 1024 for w, h in resolutions)


def test_only_buckets_with_images_are_listed():
    assignment = assign_buckets([1024] * 5 + [832] * 4 + [1216], [1024] * 5 + [1216] * 4 + [832], EPSILON)
    assert assignment.resolutions.tolist() == [[832, 1216], [1024, 1024], [1216, 832]]
    assert assignment.images_of_bucket.tolist() == [4, 5, 1]


def test_no_images_make_no_buckets():
    assignment = assign_buckets([], [], EPSILON)
    assert len(assignment.resolutions) == 0 == assignment.images_of_bucket.sum()


def test_limits_are_rounded_to_steps():
    assert BucketOptions((512, 512), True, min_bucket_reso=300, max_bucket_reso=1000).side_limits == (256, 1024)


@pytest.mark.parametrize(
    ("given_options", "where"),
    [
        ({"resolution": (128, 128), "enable_bucket": True}, "min_bucket_reso"),
        ({"resolution": (2048, 2048), "enable_bucket": True}, "max_bucket_reso"),
        ({"resolution": (0, 128)}, "resolution"),
        ({"resolution": (512, 512), "enable_bucket": True, "bucket_reso_steps": 0}, "bucket_reso_steps"),
    ],
)
def test_impossible_options_are_named(given_options, where):
    with pytest.raises(ProblemsFound) as raised:
        BucketOptions(**given_options)
    assert where in raised.value.message


def test_image_smaller_than_a_step_is_refused_without_upscale():
    options = BucketOptions((512, 512), True, bucket_no_upscale=True)
    with pytest.raises(BucketError, match="40x700"):
        assign_buckets([600, 40], [600, 700], options)


def test_image_without_area_is_refused():
    with pytest.raises(BucketError, match="image 1 "):
        assign_buckets([600, 0], [600, 700], EPSILON)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1024, (1024, 1024)), ([832, 1216], (832, 1216)), ("512", (512, 512)), ("512,768", (512, 768))],
)
def test_resolution_forms(value, expected):
    assert parse_resolution(value) == expected
    assert BucketOptions.from_dataset_options({"resolution": value, "caption_extension": ".txt"}).resolution == expected


@pytest.mark.parametrize("value", [None, "big", [1, 2, 3], True, ""])
def test_other_resolutions_are_refused(value):
    with pytest.raises(ProblemsFound, match="resolution"):
        parse_resolution(value)


sides = st.integers(1, 6000)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=40), st.sampled_from([16, 32, 64, 128]))
def test_every_resized_image_covers_its_bucket(sizes, step):
    widths, heights = zip(*sizes, strict=True)
    options = BucketOptions((512, 640), True, 256, 1024, step)
    assignment = assign_buckets(widths, heights, options)
    bucket = assignment.resolutions[assignment.bucket_of_image]
    assert (assignment.resized_sizes >= bucket).all()
    assert (assignment.resized_sizes == bucket).any(axis=1).all()


# torchvision has no CPU build; sd-scripts imports it at the top, buckets never use it.
REFERENCE = """
import json, sys
from unittest.mock import MagicMock
import transformers, diffusers
try:
    from torchvision import transforms
except (ImportError, RuntimeError):
    sys.modules["torchvision"] = MagicMock()
sys.path.insert(0, sys.argv[1])
sys.path.extend(sys.argv[2:])
from library.train_util import BaseDataset, BucketManager
answers = []
for case in json.load(sys.stdin):
    options, sizes = case
    resolution = tuple(options["resolution"])
    if options["enable_bucket"]:
        low, high = BaseDataset.adjust_min_max_bucket_reso_by_steps(
            None, resolution, options["min_bucket_reso"], options["max_bucket_reso"], options["bucket_reso_steps"])
        buckets = BucketManager(options["bucket_no_upscale"], resolution, low, high, options["bucket_reso_steps"])
        if not options["bucket_no_upscale"]:
            buckets.make_buckets()
    else:
        buckets = BucketManager(False, resolution, None, None, None)
        buckets.set_predefined_resos([resolution])
    chosen = [buckets.select_bucket(*size)[:2] for size in sizes]
    buckets.sort()
    corners = [buckets.get_crop_ltrb(bucket, tuple(size)) for (bucket, _), size in zip(chosen, sizes)]
    answers.append({"resolutions": buckets.resos, "chosen": chosen, "corners": corners})
json.dump(answers, sys.stdout)
"""


@pytest.mark.sd_scripts
def test_equal_to_sd_scripts(use_trainer: Any) -> None:
    generator = np.random.default_rng(5)
    all_options = [
        EPSILON,
        BucketOptions((1024, 1024), True, 256, 2048, 32),
        BucketOptions((512, 768), True, 300, 1000, 64),
        BucketOptions((1000, 700), True, 100, 3000, 8),
        BucketOptions((640, 640)),
        BucketOptions((1024, 1024), True, bucket_no_upscale=True),
        BucketOptions((512, 768), True, 256, 1024, 32, True),
    ]
    cases = []
    for options in all_options:
        drawn = np.exp(generator.uniform(np.log(64), np.log(5000), size=(3000, 2))).astype(int)
        ratio = drawn[:, 0] / drawn[:, 1]
        listed = list_bucket_resolutions(options)
        sizes = [
            *drawn[(ratio < 6) & (ratio > 1 / 6)].tolist(),
            *([list(pair) for pair in listed] * 2),
            [1, 1] if not options.bucket_no_upscale else [99, 99],
        ]
        if options.bucket_no_upscale:
            sizes = [size for size in sizes if min(size) >= 64]
        cases.append((options, sizes))
    question = json.dumps([(vars(options), sizes) for options, sizes in cases])
    answered = subprocess.run(
        [sys.executable, "-c", REFERENCE, use_trainer.checkout.path, *requirement_paths()],
        input=question,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert answered.returncode == 0, answered.stderr
    for (options, sizes), answer in zip(cases, json.loads(answered.stdout.splitlines()[-1]), strict=True):
        widths, heights = np.array(sizes).T
        assignment = assign_buckets(widths, heights, options)
        assert assignment.resolutions.tolist() == answer["resolutions"]
        bucket = assignment.resolutions[assignment.bucket_of_image]
        assert bucket.tolist() == [chosen[0] for chosen in answer["chosen"]]
        assert assignment.resized_sizes.tolist() == [chosen[1] for chosen in answer["chosen"]]
        assert find_crop_corners(bucket, np.array(sizes)).tolist() == answer["corners"]
