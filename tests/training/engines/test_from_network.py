"""Runs that train on from a network: checked before the launch, and really begun with its weights."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import toml
import torch
from engine_world import CAPTION, write_images
from safetensors.torch import load_file, save_file

from kohaku_wrap.config.base_model import read_sizes
from kohaku_wrap.config.effective import Effective
from kohaku_wrap.config.layers import resolve_template
from kohaku_wrap.config.site import load_site
from kohaku_wrap.demo.base_model import write_base_model
from kohaku_wrap.demo.tokenizers import write_tokenizers
from kohaku_wrap.errors import ProblemsFound
from kohaku_wrap.formats.network_names import split_kind, table_of_targets
from kohaku_wrap.formats.safetensors import read_header
from kohaku_wrap.planning.module_counts import describe_request
from kohaku_wrap.planning.parent_network import fit_parent
from kohaku_wrap.training.records.folder import Run

pytestmark = pytest.mark.timeout(1200)

TEMPLATE = """
extends = "demo"
[length]
max_train_steps = 1
[batch]
effective_batch = 2
[saving]
save_every_n_steps = 1
save_precision = "float"
[captions]
max_token_length = 150
[rates]
lr_warmup_steps = 1
"""
LOW_RANK = """
network_dim = 4
network_alpha = 4
[network_args]
algo = "lora"
conv_dim = 4
conv_alpha = 4
train_norm = false
"""
DIFFUSERS_NAMES = {"lora_unet_out_2": "lora_unet_conv_out", "lora_unet_input_blocks_0_0": "lora_unet_conv_in"}


def kwrap(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kohaku_wrap", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def write_world(folder: Path) -> Path:
    """A world in which nothing was trained yet."""
    write_images(folder / "images")
    write_base_model(folder / "base", seed=1)
    write_tokenizers(folder / "tokenizers", [CAPTION.format("one", "two")])
    (folder / "mine.toml").write_text(TEMPLATE, encoding="utf-8")
    paths = {name: name for name in ("images", "tokenizers", "runs")} | {"base_model": "base/model.safetensors"}
    machine = {"engine": "builtin", "gpus": 0, "batch_per_gpu": 2, "workers": 0}
    (folder / "site.toml").write_text(toml.dumps({"paths": paths, "machine": machine}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with a run that trained two steps."""
    folder = write_world(tmp_path_factory.mktemp("from") / "world")
    more = ("--set", "max_train_steps=2")
    done = kwrap("train", folder / "mine.toml", "--site", folder / "site.toml", "--run", "first", *more)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def network_of(world: Path, name: str) -> Path:
    return world / "runs" / name / "checkpoints" / f"{name}.safetensors"


def rename_modules(source: Path, target: Path) -> Path:
    """The network with some modules named as diffusers names them."""
    tensors = {}
    for key, tensor in load_file(source).items():
        name, _, suffix = key.partition(".")
        tensors[f"{DIFFUSERS_NAMES.get(name, name)}.{suffix}"] = tensor
    assert tensors.keys() != load_file(source).keys(), "some of these modules are there"
    save_file(tensors, target)
    return target


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_a_network_of_another_tool(world: Path) -> None:
    """The first step of a warm-up has the rate 0: what comes out is what went in."""
    other = rename_modules(network_of(world, "first"), world / "other.safetensors")
    done = kwrap("train", world / "mine.toml", "--site", world / "site.toml", "--run", "second", "--from", other)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = load_file(network_of(world, "first")), load_file(network_of(world, "second"))
    assert before.keys() == after.keys() and all((before[key] == after[key]).all() for key in before)
    run = Run((world / "runs" / "second").resolve())
    assert run.lock.parent_network.startswith("other.safetensors (")
    assert run.lock.values["network_weights"] == str(run.folder / "network.safetensors")
    told = kwrap("inspect", network_of(world, "second"), "--no-hash").stdout
    assert "ss_learning_rate" not in told, "both parts have rates of their own"
    assert "kwrap_trained_on_from" in told and "other.safetensors" in told
    assert "trained on from" in kwrap("status", run.folder).stdout


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["ComfyUI", "SimpleTuner", "PEFT"])
def test_a_network_in_another_layout_fits(world: Path, tool: str) -> None:
    """What a merge reads, a training begins from: names with dots or another prefix, tensors without alpha."""
    (world / "low.toml").write_text(f"preset = {{}}\n{TEMPLATE}\n[network]\n{LOW_RANK}", encoding="utf-8")
    template = str(world / ("low.toml" if tool == "PEFT" else "mine.toml"))
    site, path = load_site(world / "site.toml"), world / f"{tool}.safetensors"
    before = load_file(network_of(world, "first"))
    if tool == "PEFT":
        before = make_lora(resolve_template(template, site), world)
    if tool == "SimpleTuner":
        other = {key.replace("lora_unet_", "lycoris_"): tensor for key, tensor in before.items()}
    else:
        other = write_paths(world, before, tool)
    save_file(other, path)
    effective = resolve_template(template, site, [f"network_weights={path}"])
    out = world / f"{tool}-out.safetensors"
    assert fit_parent(effective, out), "written anew, under the template's names"
    after = load_file(out)
    assert after.keys() == before.keys() and all((after[key] == before[key]).all() for key in before)
    twice = other | {key: tensor.clone() for key, tensor in before.items() if key.startswith("lora_unet_")}
    save_file(twice, path)
    with pytest.raises(ProblemsFound, match="extra"):
        fit_parent(effective, out)


def make_lora(effective: Effective, world: Path) -> dict[str, torch.Tensor]:
    """Tensors of the network that a template makes."""
    from kohaku_wrap.planning.workers.count_modules import build_diffusers_unet, build_text_encoders, create_network

    sizes = read_sizes(world / "base" / "model.safetensors")
    text_encoders = build_text_encoders(sizes)
    network = create_network(
        describe_request(effective, None), build_diffusers_unet(sizes["unet"])[1], text_encoders, world
    )
    shapes = {
        f"{lora.lora_name}.{name}": tensor.shape
        for lora in network.unet_loras + network.text_encoder_loras
        for name, tensor in lora.state_dict().items()
    }
    return {key: torch.full(shape, 4.0) for key, shape in shapes.items()}


def write_paths(world: Path, network: dict[str, torch.Tensor], tool: str) -> dict[str, torch.Tensor]:
    """The network's tensors under paths with dots, as ComfyUI names them, or as PEFT does, which has no alpha."""
    targets = table_of_targets(read_header(world / "base" / "model.safetensors").tensors)
    written = {}
    for key, tensor in network.items():
        name, _, suffix = key.partition(".")
        if name.startswith("lora_unet_"):
            kinds = targets[name]
            module = split_kind((kinds["weight"] if "weight" in kinds else kinds["bias"]).key)[0].removeprefix("model.")
        else:
            part = {"lora_te1": "text_encoder.", "lora_te2": "text_encoder_2."}[name[:8]]
            module = part + re.sub("(text_model|encoder|layers|[0-9]+|self_attn|mlp)_", r"\1.", name[9:])
        if tool == "PEFT":
            suffix = suffix.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
        if tool != "PEFT" or suffix != "alpha":
            written[f"{module}.{suffix}"] = tensor
    return written


@pytest.mark.slow
def test_networks_that_do_not_fit_are_named(world: Path) -> None:
    site, template, network = load_site(world / "site.toml"), world / "mine.toml", network_of(world, "first")

    def fit(path: Path, *settings: str) -> bool:
        return fit_parent(resolve_template(str(template), site, [f"network_weights={path}", *settings]), world / "out")

    assert fit(network) is False, "its names are the template's"
    with pytest.raises(ProblemsFound, match=r"modules of another form: lora_.*the template's is"):
        fit(network, "network_args.factor=2")
    with pytest.raises(ProblemsFound, match=r"extra.*does not train: lora_te1_"):
        fit(network, "network_train_unet_only=true")
    tensors = load_file(network)
    gone = sorted(tensors)[0].partition(".")[0]
    fewer = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{gone}.")}
    save_file(fewer, world / "fewer.safetensors")
    with pytest.raises(ProblemsFound, match=f"missing.*the file lacks: {gone}"):
        fit(world / "fewer.safetensors")
    by_file = ("dim_from_weights=true", "network_alpha=1.0", "network_args.factor=2")
    assert fit(world / "fewer.safetensors", *by_file) is False
    save_file(fewer | {"lora_unet_nothing.lokr_w1": tensors[sorted(tensors)[1]]}, world / "more.safetensors")
    with pytest.raises(ProblemsFound, match="lora_unet_nothing"):
        fit(world / "more.safetensors", *by_file)


@pytest.mark.slow
def test_a_network_of_low_rank_is_compared_too(world: Path) -> None:
    site, network = load_site(world / "site.toml"), network_of(world, "first")
    for settings in (["network_args.algo=lokr"], ["network_args.algo=loha"], ["network_args.dora_wd=true"]):
        low = [f"network_weights={network}", "network_dim=4", "network_args.conv_dim=4", *settings]
        with pytest.raises(ProblemsFound, match=r"modules of another form: lora_.*the template's"):
            fit_parent(resolve_template(str(world / "mine.toml"), site, low), world / "out")


@pytest.mark.slow
@pytest.mark.sd_scripts
@pytest.mark.usefixtures("use_trainer")
def test_a_lora_of_sd_scripts_is_compared_by_its_own_code(tmp_path: Path) -> None:
    world = tmp_path
    write_base_model(world / "base", seed=1)
    paths = {"base_model": "base/model.safetensors", "images": "images"}
    (world / "site.toml").write_text(toml.dumps({"paths": paths, "machine": {"engine": "sd-scripts"}}))
    (world / "lora.toml").write_text(
        'extends = "demo"\nnetwork_module = "networks.lora"\nnetwork_dim = 4\nnetwork_alpha = 2\npreset = {}\n'
        "[captions]\nmax_token_length = 150\n"
    )
    site = load_site(world / "site.toml")
    plain = {"lora_down.weight": torch.zeros(4, 32), "lora_up.weight": torch.zeros(32, 4), "alpha": torch.tensor(2.0)}
    name = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"

    def faults(tensors: dict[str, torch.Tensor], *settings: str) -> str:
        path = world / "lora.safetensors"
        save_file({f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}, path)
        with pytest.raises(ProblemsFound) as caught:
            fit_parent(
                resolve_template(str(world / "lora.toml"), site, [f"network_weights={path}", *settings]), world / "out"
            )
        return caught.value.message

    # One module of many: that the others are missing is said, and of this one what is not as it should be.
    told = faults(plain)
    assert "missing" in told and name not in told and "unlike" not in told and "extra" not in told, told
    assert "the template's is [8, 32]" in faults(plain, "network_dim=8")
    assert f"does not train: {name}" in faults(plain, "network_train_unet_only=true")


@pytest.mark.slow
def test_a_dry_run_checks_the_network(world: Path) -> None:
    words = ("train", world / "mine.toml", "--site", world / "site.toml", "--run", "dry", "--dry-run")
    network = ("--from", network_of(world, "first"))
    assert kwrap(*words, *network).returncode == 0
    refused = kwrap(*words, *network, "--set", "network_args.factor=2")
    assert refused.returncode == 1 and "modules of another form" in refused.stderr, refused.stderr
    assert not (world / "runs" / "dry").exists()


def test_a_template_may_name_a_network_beside_it(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    network = network_of(world, "first")
    network.parent.mkdir(parents=True)
    save_file({"lora_unet_out_2.alpha": torch.tensor(1.0)}, network)
    (world / "on.toml").write_text('extends = "demo"\nnetwork_weights = "runs/first/checkpoints/first.safetensors"\n')
    effective = resolve_template(str(world / "on.toml"), load_site(world / "site.toml"))
    assert effective.get("network_weights") == str(network)
