"""What may be cached of a template: refused by the option's name where images or captions change each time."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kohaku_wrap.config.caching import measure_text_outputs
from kohaku_wrap.config.checks import check_effective, describe_notes
from kohaku_wrap.config.effective import Effective
from kohaku_wrap.config.layers import resolve_template
from kohaku_wrap.config.site import Site
from kohaku_wrap.errors import ProblemsFound
from kohaku_wrap.formats.caption_rows import ImageSizes
from kohaku_wrap.planning.sizes import weigh_caches
from kohaku_wrap.training.data.latent_store import NoLatents
from kohaku_wrap.training.starting.caching import lock_caches

FIXED = (
    "network_train_unet_only=true",
    "dataset_options.shuffle_caption=false",
    "dataset_options.caption_tag_dropout_rate=0",
    "dataset_options.keep_tokens_separator=''",
)
TEXTS = "cache.text_encoders=true"
MakeSite = Callable[..., Site]
Write = Callable[[Path, Sequence[tuple[int, int]]], None]


@pytest.fixture
def site(make_site: MakeSite, tmp_path: Path) -> Site:
    (tmp_path / "tokenizers").mkdir()
    lines = 'gpus = 0\nbatch_per_gpu = 4\n[paths]\nimages = "images"\ntokenizers = "tokenizers"'
    return make_site(f'engine = "builtin"\n{lines}')


def refused(site: Site, *settings: str) -> dict[str, str]:
    """What is wrong, by its key."""
    with pytest.raises(ProblemsFound) as found:
        resolve_template("demo", site, settings)
    return {problem.where: problem.what for problem in found.value.problems}


def describe_images(images: Path, write: Write, **about: object) -> None:
    """Captions that say more of themselves."""
    write(images, [(64, 64)] * 3)
    path = images / "captions.arrow"
    table = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
    known = json.loads(table.schema.metadata[b"kwrap"])
    schema = table.schema.with_metadata({"kwrap": json.dumps(known | about)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table.cast(schema))


def test_fixed_captions_and_frozen_text_encoders_may_be_cached(site: Site) -> None:
    assert not check_effective(resolve_template("demo", site, [*FIXED, TEXTS]))
    notes = describe_notes(resolve_template("demo", site, [*FIXED, "cache.latents=true"]))
    assert any("is possible: text_encoders = true" in note for note in notes)


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("dataset_options.shuffle_caption=true", "shuffle_caption"),
        ("dataset_options.caption_tag_dropout_rate=0.1", "caption_tag_dropout_rate"),
        ("dataset_options.caption_dropout_rate=0.1", "caption_dropout_rate"),
        ("dataset_options.caption_dropout_every_n_epochs=3", "caption_dropout_every_n_epochs"),
        ("dataset_options.enable_wildcard=true", "enable_wildcard"),
    ],
)
def test_what_makes_another_text_each_time_is_named(site: Site, setting: str, name: str) -> None:
    what = refused(site, *FIXED, TEXTS, setting)["cache.text_encoders"]
    assert f"{name} (--set)" in what and "Leave out this option" in what


def test_all_reasons_of_one_kind_are_named_at_once(site: Site) -> None:
    what = refused(site, "network_train_unet_only=true", TEXTS)["cache.text_encoders"]
    assert "shuffle_caption (" in what and "caption_tag_dropout_rate (" in what and "Leave out these options" in what


def test_trained_text_encoders_and_changed_ones_are_refused(site: Site) -> None:
    assert (
        "network_train_unet_only = true"
        in refused(site, *FIXED, TEXTS, "network_train_unet_only=false")["cache.text_encoders"]
    )


def test_a_training_without_its_cache_names_the_command(site: Site, write_captions: Write, tmp_path: Path) -> None:
    write_captions(site.paths.images, [(128, 128)] * 2)
    for name in ("0000/0.png", "0000/1.png"):
        (site.paths.images / name).parent.mkdir(exist_ok=True)
        (site.paths.images / name).touch()
    site.paths.base_model.parent.mkdir(parents=True, exist_ok=True)
    site.paths.base_model.touch()
    given = ["cache.latents=true", "cache.keep=sample", "training_comment=a b", "seed=7"]
    effective = resolve_template("demo", site, given)
    with pytest.raises(NoLatents) as missing:
        lock_caches(effective, site)
    words = shlex.split(missing.value.next_step.removeprefix("Make them first: "))
    assert words[:5] == ["kwrap", "cache", str(effective.path), "--site", str(site.path)]
    assert sorted(words[6::2]) == sorted(given)


def test_a_site_without_tokenizers_cannot_cache_captions(make_site: MakeSite) -> None:
    site = make_site('engine = "sd-scripts"\ngpus = 4\nbatch_per_gpu = 4')
    assert "paths.tokenizers" in refused(site, *FIXED, TEXTS)["cache.text_encoders"]
    assert "weighted_captions (--set)" in refused(site, *FIXED, TEXTS, "weighted_captions=true")["cache.text_encoders"]


def test_an_option_that_a_subset_has_for_itself_counts(site: Site, write_captions: Write) -> None:
    images = site.paths.images
    subsets = [{"name": "plain"}, {"name": "wild", "options": {"shuffle_caption": True, "random_crop": True}}]
    describe_images(images, write_captions, format=2, subsets=subsets)
    assert f"shuffle_caption (subset wild of {images})" in refused(site, *FIXED, TEXTS)["cache.text_encoders"]
    assert f"random_crop (subset wild of {images})" in refused(site, "cache.latents=true")["cache.latents"]


def test_shares_of_texts_change_captions_but_all_of_one_kind_do_not(site: Site, write_captions: Write) -> None:
    shares = {"tags": 0.25, "text": 0.0, "both": 0.75}
    describe_images(site.paths.images, write_captions, text=shares)
    assert (
        "[caption.text] of its captions (tags 0.25, text 0, both 0.75)"
        in refused(site, *FIXED, TEXTS)["cache.text_encoders"]
    )
    describe_images(site.paths.images, write_captions, text={"tags": 0.0, "text": 0.0, "both": 1.0})
    assert not check_effective(resolve_template("demo", site, [*FIXED, TEXTS]))


def test_the_plan_weighs_both_caches(site: Site) -> None:
    effective: Effective = resolve_template("demo", site, [*FIXED, TEXTS, "cache.latents=true"])
    assert measure_text_outputs(effective) == (227, 768, 1280, 1280)

    sides = np.full(10, 128)
    latents, texts = weigh_caches(effective, ImageSizes(sides, sides, "here"))
    assert latents.size_bytes == 10 * 8 * 16 * 16 * 2
    assert texts.size_bytes == 10 * 4 * (227 * 2048 + 1280)
