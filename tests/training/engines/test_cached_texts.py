"""Cached outputs of the text encoders: the bits that a training would compute, of the caption that is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import toml
import torch
from engine_world import DATASET_OPTIONS, World, flip_byte, kwrap, train_arguments

from kohaku_wrap.config.base_model import read_sizes
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.proving.killing import Kill, train_with_kills
from kohaku_wrap.proving.likeness import compare_runs
from kohaku_wrap.training.data.columns import ColumnsDataset
from kohaku_wrap.training.data.items import BatchKey, Item, ItemOptions
from kohaku_wrap.training.data.latent_index import Wanted, extend_index
from kohaku_wrap.training.data.latent_rules import make_text_rule
from kohaku_wrap.training.data.latent_shards import DamagedLatents, write_shard
from kohaku_wrap.training.data.latent_store import NoLatents
from kohaku_wrap.training.data.text_store import OtherCaption, TextStore, stamp_of_caption
from kohaku_wrap.training.data.tokens import CaptionTokenizer
from kohaku_wrap.training.engines.builtin.loss import LossOfBatch
from kohaku_wrap.training.engines.builtin.models import load_base_model
from kohaku_wrap.training.engines.encode_texts import TYPES, CaptionEncoder
from kohaku_wrap.training.records.folder import Run

from .test_cached_latents import cache, hashes, site

__all__ = ["site"]

OPTIONS = {**DATASET_OPTIONS, "shuffle_caption": False, "caption_tag_dropout_rate": 0.0, "keep_tokens_separator": ""}
FIXED = (
    "network_train_unet_only=true",
    "dataset_options.shuffle_caption=false",
    "dataset_options.caption_tag_dropout_rate=0",
    "dataset_options.keep_tokens_separator=''",
)
TEXTS = (*FIXED, "cache.text_encoders=true")


def rule_of(world: World, mixed_precision: str, engine: str = "builtin", tokens: int = 152) -> Any:
    sizes = read_sizes(world.base_model)
    first, second = sizes["text_encoder"], sizes["text_encoder_2"]
    outputs = (tokens, first["hidden_size"], second["hidden_size"], second["projection_dim"])
    return make_text_rule({"mixed_precision": mixed_precision}, {}, outputs, engine, on_cpu=True)


def open_dataset(world: World, **more: Any) -> ColumnsDataset:
    chosen = ItemOptions.from_dataset_options(OPTIONS)
    return ColumnsDataset(
        Columns.open(world.images), chosen, more.pop("batch", 1), 5, 2, more.pop("tokenize", None), **more
    )


def fill(folder: Path, encoder: CaptionEncoder) -> TextStore:
    """A store of every caption of a dataset."""
    dataset, rule = encoder.dataset, encoder.rule
    rows = list(range(len(dataset.columns)))
    stamps = np.array([stamp_of_caption(dataset.draw_item(row, 0).caption) for row in rows])
    sizes = np.tile(np.array([rule.numbers, 1], np.int32), (len(rows), 1))
    [shape] = extend_index(folder, rule, Wanted(dataset.columns.ids, sizes, stamps)).shapes
    write_shard(folder, shape, dataset.columns.ids, encoder.encode(rows), rule.fingerprint, {})
    return TextStore(folder, rule)


@pytest.mark.parametrize(
    ("mixed_precision", "engine", "tokens"),
    [("no", "builtin", 152), ("no", "builtin", 77), ("bf16", "builtin", 227), ("bf16", "sd-scripts", 77)],
)
def test_a_batch_carries_what_the_encoders_would_give(
    world: World, tmp_path: Path, mixed_precision: str, engine: str, tokens: int
) -> None:
    rule = rule_of(world, mixed_precision, engine, tokens)
    encoder = CaptionEncoder(rule, open_dataset(world), torch.device("cpu"), world.base_model, world.tokenizers)
    dtype = TYPES[rule.precision]
    store = fill(tmp_path, encoder)
    tokenizer = CaptionTokenizer.load(world.tokenizers, None if tokens == 77 else tokens - 2)
    cached, encoded = open_dataset(world, texts=store), open_dataset(world, tokenize=tokenizer)
    loss = object.__new__(LossOfBatch)
    loss.model, loss.end_token_id = load_base_model(world.base_model, None), tokenizer.end_token_id
    loss.accelerator = SimpleNamespace(device=torch.device("cpu"))
    for each in loss.model.text_encoders:
        each.to(TYPES[rule.computed_in])
    for position in range(3):
        key = BatchKey(1, position, position, False)
        held, fresh = cached[key], encoded[key]
        assert held["input_ids_list"] is None and fresh["text_encoder_outputs_list"] is None
        assert [each.dtype for each in held["text_encoder_outputs_list"]] == [dtype] * 3
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision != "no"):
            wanted, found = loss.encode_captions(fresh), loss.encode_captions(held)
        for now, before in zip(found, wanted, strict=True):
            assert torch.equal(now, before.to(dtype))
    # With more rows at once sums may be rounded in another order.
    pair = open_dataset(world, texts=store, batch=2), open_dataset(world, tokenize=tokenizer, batch=2)
    with torch.no_grad():
        one, other = (loss.encode_captions(each[BatchKey(0, 0, 0, False)])[0].float() for each in pair)
    assert torch.allclose(one, other, atol=1e-5 if mixed_precision == "no" else 0.1)


@pytest.fixture
def store(world: World, tmp_path: Path) -> TextStore:
    encoder = CaptionEncoder(
        rule_of(world, "no"), open_dataset(world), torch.device("cpu"), world.base_model, world.tokenizers
    )
    return fill(tmp_path / "texts", encoder)


def test_outputs_of_another_caption_are_never_trained(world: World, store: TextStore) -> None:
    item = open_dataset(world).draw_item(0, 0)
    assert [each.shape[0] for each in store.read_captions([item, item])] == [2, 2, 2]
    with pytest.raises(OtherCaption, match="image 1001 is of another caption"):
        store.read_captions([dataclasses.replace(item, caption="1girl")])
    with pytest.raises(NoLatents, match="image 7 has no outputs of text encoders"):
        store.read_captions([Item(0, 7, False, (0, 0), item.caption)])


def test_a_flipped_byte_is_found_before_it_is_trained(world: World, store: TextStore) -> None:
    [shape] = store.index.shapes
    path = shape.file_in(store.folder)
    flip_byte(path, path.stat().st_size // 2)
    items = [open_dataset(world).draw_item(row, 0) for row in range(7)]
    with pytest.raises(DamagedLatents, match=shape.name):
        TextStore(store.folder, store.rule).read_captions(items)


@pytest.fixture
def single(site: Path) -> Path:
    """A site that encodes one caption at a time, as caching does."""
    document = toml.loads(site.read_text(encoding="utf-8"))
    document["machine"]["batch_per_gpu"] = 1
    site.write_text(toml.dumps(document), encoding="utf-8")
    return site


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_from_cached_outputs_is_the_one_that_encodes(single: Path, tmp_path: Path) -> None:
    whole, run = Run(tmp_path / "runs" / "whole"), Run(tmp_path / "runs" / "cached")
    refused = kwrap(*train_arguments(single, "cached", *TEXTS))
    assert refused.returncode == 1
    assert "7 of 7 images have no outputs of text encoders" in refused.stderr and "kwrap cache" in refused.stderr
    made = cache(single, *TEXTS)["text_encoders"]
    assert made["images_encoded"] == made["images"] == 7
    done = kwrap(*train_arguments(single, "whole", *FIXED))
    assert done.returncode == 0, done.stderr
    train_with_kills(run, train_arguments(single, "cached", *TEXTS), (Kill(0.7),), (0, 1), tmp_path)
    assert compare_runs(whole, run).attempts == 2
    verified = kwrap("verify", str(run.folder), "--deep", "4")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "4 captions encoded again, bit for bit the same" in " ".join(verified.stdout.split())

    before, [shard] = hashes(made), Path(made["folder"]).glob("*.safetensors")
    flip_byte(shard, shard.stat().st_size // 2)
    refused = kwrap(*train_arguments(single, "other", *TEXTS))
    assert refused.returncode == 1 and f"{shard}: damaged" in refused.stderr
    assert "changed after the run: text_encoders: " in kwrap("verify", str(run.folder)).stderr
    again = cache(single, *TEXTS)["text_encoders"]
    assert again["damaged"] == [shard.stem] and hashes(again) == before


@pytest.mark.slow
def test_a_changed_caption_is_encoded_anew_and_no_other(site: Path) -> None:
    made = cache(site, *TEXTS)["text_encoders"]
    before = hashes(made)
    changed = ("dataset_options.caption_prefix=shiny",)
    assert cache(site, *TEXTS, *changed)["text_encoders"]["images_encoded"] == 7
    assert cache(site, *TEXTS, *changed)["text_encoders"]["images_encoded"] == 0
    assert hashes(made).items() > before.items()
