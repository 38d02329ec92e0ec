"""Recipes in TOML and inside merged files, hashes, licenses, and what inspect tells."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kohaku_wrap.cli import run_program
from kohaku_wrap.errors import ProblemsFound, UsageError
from kohaku_wrap.files import shipped_folder
from kohaku_wrap.merging import hashes as hashing
from kohaku_wrap.merging.file_metadata import build_metadata
from kohaku_wrap.merging.formula.coefficients import Formula
from kohaku_wrap.merging.formula.parser import parse_formula
from kohaku_wrap.merging.formula.tree import names_of_models, names_of_networks
from kohaku_wrap.merging.hashes import hash_files
from kohaku_wrap.merging.inspecting import describe_report, inspect_file
from kohaku_wrap.merging.plan import MergeOptions, MergePlan
from kohaku_wrap.merging.planning import plan_merge
from kohaku_wrap.merging.recipes import find_recipe, read_recipe
from kohaku_wrap.merging.running import run_merge
from kohaku_wrap.toml_files import UnreadableToml

from .conftest import UNET, WriteModel

GAMMA = "beta7 + 0.8 * (anxl3 - anxl2) + 0.5 * (base7 - beta7)"
SHIPPED = [path for path in sorted((shipped_folder("templates") / "merges").glob("*.toml")) if path.stem != "blocks"]


def metadata_of(plan: MergePlan) -> dict[str, str]:
    found = hash_files([header.path for header in plan.headers.values()])
    return build_metadata(plan, dict(zip(plan.headers, found, strict=True)))


def test_recipes_are_shipped() -> None:
    assert {path.stem for path in SHIPPED} >= {"gamma-rev1", "bake-network"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_name_their_models(path: Path) -> None:
    recipe = read_recipe(path)
    tree = parse_formula(recipe.formula)
    assert sum(Formula(recipe.formula, tree).reduce_for_key("x").models.values()) == 1
    assert set(recipe.models) == {*names_of_models(tree), *names_of_networks(tree)}
    assert recipe.title and recipe.notes and not any("/" in text for text in recipe.models.values())


def test_a_word_is_a_recipe_or_a_formula(tmp_path: Path) -> None:
    assert find_recipe("gamma-rev1").formula == GAMMA
    assert find_recipe("gamma - rev1").formula == "gamma - rev1"
    with pytest.raises(UsageError, match="no such recipe"):
        find_recipe("nothing.toml")
    path = tmp_path / "own.toml"
    path.write_text('formula = "a"\nmodel = 3\n[options]\nvea_from = "b"\n')
    with pytest.raises(ProblemsFound, match=r"(?s)2 problems.*model .*unknown.*options\.vea_from .*unknown"):
        find_recipe(str(path))
    path.write_text("formula = ")
    with pytest.raises(UnreadableToml, match="Invalid value"):
        find_recipe(str(path))


@pytest.mark.parametrize(
    ("option", "fault"),
    [
        ('dtype = "fp12"', r'dtype +"fp12" is not one of fp16, bf16, fp32'),
        ('missing = "maybe"', 'missing +"maybe" is not one of fail, anchor, zero'),
        ('dtype = ["fp16"]', r'dtype +\["fp16"\] is not one of'),
        ("sums = true", "sums +true is not one of"),
        ('merge_vae = "yes"', "merge_vae +is not true or false"),
        ("like = 5", "like +is not text"),
        ("rank = 4.0", "rank +is not a whole number"),
        ("rank = -5", "rank +-5 is not from 0 on"),
        ("energy = 2", "energy +2 is not from 0 to 1"),
        ("energy = nan", "energy +nan is not from 0 to 1"),
        ("factor = -2", "factor +-2 is not from -1 on"),
    ],
)
def test_options_of_a_recipe_are_checked(tmp_path: Path, option: str, fault: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text(f'formula = "a"\n[options]\n{option}\n')
    with pytest.raises(ProblemsFound, match=fault):
        read_recipe(path)


def test_the_file_tells_how_it_was_made(tmp_path: Path, write_model: WriteModel) -> None:
    extra = {"ss_learning_rate": "1e-5", "sshs_model_hash": "abc", "modelspec.license": "MIT", "other": "x"}
    paths = {name: write_model(name, seed, metadata=extra) for seed, name in enumerate(("a", "b"))}
    plan = plan_merge("a + 0.8 * (b - a)", paths, MergeOptions(vae_from="b", dtype="BF16"))
    output = tmp_path / "o.safetensors"
    run_merge(plan, output, metadata_of(plan))
    report = inspect_file(output)
    metadata = report.header.metadata
    assert not any(key.startswith(("ss_", "sshs_")) for key in metadata)
    assert metadata["modelspec.sai_model_spec"] == "1.0.1" and metadata["modelspec.license"] == "MIT"
    assert "modelspec.date" not in metadata
    assert report.recipe["formula"] == "a + 0.8 * (b - a)"
    assert report.recipe["coefficients"][0]["models"] == {"a": "1/5", "b": "4/5"}
    digest = hashlib.sha256(paths["a"].read_bytes()).hexdigest()
    assert report.recipe["models"]["a"] == digest
    assert report.parents[digest]["metadata"]["ss_learning_rate"] == "1e-5"
    assert report.parents[digest]["name"] == "a.safetensors"
    assert shlex.split(report.replay) == [
        "kwrap", "merge", "a + 0.8 * (b - a)", "-m", "a=a.safetensors", "-m", "b=b.safetensors",
        "--vae-from", "b", "--dtype", "bf16", "-o", "o.safetensors",
    ]  # fmt: skip


def test_what_is_replayed_makes_the_same_file(
    tmp_path: Path, write_model: WriteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate(("it's a", "$(b)")):
        write_model(name, seed)
    monkeypatch.chdir(tmp_path)
    words = ["-m", "a=it's a.safetensors", "-m", "b=$(b).safetensors", "--dtype", "bf16", "--like", "b"]
    words += ["--title", 'two "models"', "--date", "2025-01-01", "-o", "o.safetensors", "--", "-a + 2 * b"]
    assert run_program(["merge", *words]) == 0
    made = Path("o.safetensors").read_bytes()
    replay = shlex.split(inspect_file(Path("o.safetensors")).replay)
    Path("o.safetensors").unlink()
    assert run_program(replay[1:]) == 0
    assert Path("o.safetensors").read_bytes() == made


def test_files_of_one_name_are_not_replayed_as_one(tmp_path: Path, write_model: WriteModel) -> None:
    paths = {}
    for seed, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        paths[name] = write_model("model", seed).rename(tmp_path / name / "model.safetensors")
    plan = plan_merge("0.5 * a + 0.5 * b", paths)
    run_merge(plan, tmp_path / "o.safetensors", metadata_of(plan))
    short = [hashlib.sha256(path.read_bytes()).hexdigest()[:10] for path in paths.values()]
    words = shlex.split(inspect_file(tmp_path / "o.safetensors").replay)
    assert [f"a={short[0]}/model.safetensors", f"b={short[1]}/model.safetensors"] == [words[4], words[6]]


@pytest.mark.parametrize("text", ['"\\ud800"', "[" * 500 + "]" * 500, "[" * 100_000, '{"type": NaN', "5"])
def test_odd_recipes_of_a_parent_are_carried(tmp_path: Path, write_model: WriteModel, text: str) -> None:
    odd = write_model("a", 1, metadata={"sd_merge_recipe": text, "sd_merge_models": text})
    plan = plan_merge("a", {"a": odd})
    run_merge(plan, tmp_path / "o.safetensors", metadata_of(plan))
    for path in (odd, tmp_path / "o.safetensors"):
        json.dumps(describe_report(inspect_file(path)), indent=2)


def test_grandparents_are_kept(tmp_path: Path, write_model: WriteModel) -> None:
    paths = {name: write_model(name, seed) for seed, name in enumerate(("a", "b"))}
    child = tmp_path / "child.safetensors"
    plan = plan_merge("0.5 * a + 0.5 * b", paths)
    run_merge(plan, child, metadata_of(plan))
    second = plan_merge("0.5 * a + 0.5 * child", {"a": paths["a"], "child": child})
    parents = json.loads(metadata_of(second)["sd_merge_models"])
    assert {entry["name"] for entry in parents.values()} == {"a.safetensors", "b.safetensors", "child.safetensors"}
    digest = hashlib.sha256(child.read_bytes()).hexdigest()
    assert parents[digest]["sd_merge_recipe"]["formula"] == "0.5 * a + 0.5 * b"


def test_equal_merges_are_equal_files(tmp_path: Path, write_model: WriteModel) -> None:
    paths = {name: write_model(name, seed) for seed, name in enumerate(("a", "b"))}
    outputs = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        plan = plan_merge("0.5 * a + 0.5 * b", paths)
        run_merge(plan, tmp_path / folder / "o.safetensors", metadata_of(plan))
        outputs.append((tmp_path / folder / "o.safetensors").read_bytes())
    assert outputs[0] == outputs[1]


def test_licenses_that_differ_are_told(write_model: WriteModel) -> None:
    one = write_model("a", 1, metadata={"modelspec.license": "MIT"})
    other = write_model("b", 2, metadata={"modelspec.license": "Fair AI"})
    metadata = metadata_of(plan_merge("0.5 * a + 0.5 * b", {"a": one, "b": other}))
    assert "modelspec.license" not in metadata
    assert "licenses differ (a: MIT; b: Fair AI)" in metadata["sd_merge_recipe"]


def test_hashes_are_kept_while_a_file_is_unchanged(write_model: WriteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model("a", 1)
    first = hash_files([path])[0]
    assert first.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and first.auto_v2 == first.sha256[:10]
    start = int.from_bytes(path.read_bytes()[:8], "little") + 8
    assert first.data_sha256 == hashlib.sha256(path.read_bytes()[start:]).hexdigest()
    monkeypatch.setattr(hashing, "hash_file", lambda *_: pytest.fail("it was read again"))
    assert hash_files([path])[0] == first
    monkeypatch.undo()
    write_model("a", 2)
    assert hash_files([path])[0] != first


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ((f"{UNET}out.2.weight", "conditioner.embedders.1.model.ln_final.weight"), "SDXL checkpoint"),
        (("cond_stage_model.x",), "SD 1 or 2 checkpoint"),
        (("first_stage_model.encoder.x",), "VAE"),
        (("lora_unet_out_2.lokr_w1", "lora_unet_out_2.lokr_w2"), "LoKr network (sgm names)"),
        (("lora_unet_conv_in.diff",), "full network (diffusers names)"),
        (
            ("lora_te1_x.lora_up.weight", "lora_te1_x.lora_down.weight", "lora_te1_x.dora_scale"),
            "LoRA network with DoRA (sgm names)",
        ),
        (("lora_unet_out_0.w_norm",), "norm network (sgm names)"),
        (("something",), "tensors of no known model"),
    ],
)
def test_kinds_of_files(tmp_path: Path, keys: tuple[str, ...], kind: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({key: torch.zeros(2) for key in keys}, path)
    report = inspect_file(path, hashed=False)
    assert report.kind == kind
    described = describe_report(report)
    assert described["dtypes"]["F32"] == {"tensors": len(keys), "elements": 2 * len(keys), "bytes": 8 * len(keys)}


def test_the_identities_of_a_network(tmp_path: Path) -> None:
    """Each by its own rule; what the file says of itself is named for what it is."""
    tensors = {"lora_unet_a.diff": torch.arange(600_000, dtype=torch.float32)}
    plain = tmp_path / "plain.safetensors"
    save_file(tensors, plain, metadata={"ss_x": "1"})
    start = int.from_bytes(plain.read_bytes()[:8], "little") + 8
    of_data = hashlib.sha256(plain.read_bytes()[start:]).hexdigest()
    for said, words in ((of_data, "sd-scripts' way"), ("0xab", "LyCORIS' own way"), ("ab", "another than that")):
        path = tmp_path / f"{said}.safetensors"
        save_file(tensors, path, metadata={"sshs_model_hash": said, "sshs_legacy_hash": "1234abcd"})
        found = describe_report(inspect_file(path))
        assert words in found["recorded"]["sshs_model_hash"] and "1234abcd" in found["recorded"]["sshs_legacy_hash"]
        assert found["auto_v1"] == hashlib.sha256(path.read_bytes()[0x100000:0x110000]).hexdigest()[:8]
        assert found["auto_v3"] == of_data[:12] and found["sshs_model_hash"] == of_data
