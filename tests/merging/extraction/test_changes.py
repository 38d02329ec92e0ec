"""Changes written as networks, against whole SVDs, LyCORIS' own extraction, and the change itself read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lycoris.functional.general import factorization
from lycoris.utils import extract_conv, extract_linear
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kohaku_wrap.cli import program
from kohaku_wrap.formats.safetensors import read_header
from kohaku_wrap.merging.extraction.fitting import (
    fit_kronecker,
    fit_low_rank,
    split_kronecker,
    squares_lost,
    sum_squares,
)

from ..conftest import SHAPES, TE2, UNET, Tensors, WriteModel, make_tensors

WriteNetwork = Callable[[str, Tensors], Path]
NOT_IN_NETWORKS = ("first_stage_model.", "v_pred", "position_ids")


def merge(formula: str, output: Path, *options: str, **paths: Path) -> dict[str, Any]:
    words = [word for name, path in paths.items() for word in ("-m", f"{name}={path}")]
    result = CliRunner().invoke(program, ["merge", formula, *words, *options, "-o", str(output), "--json"])
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def refusal(formula: str, output: Path, *options: str, **paths: Path) -> str:
    words = [word for name, path in paths.items() for word in ("-m", f"{name}={path}")]
    result = CliRunner().invoke(program, ["merge", formula, *words, *options, "-o", str(output)])
    assert result.exit_code in (1, 2), result.output
    assert not output.exists() and not list(output.parent.glob("*.part"))
    return str(result.output) + str(result.exception or "")


def add_low_rank(tensors: Tensors, rank: int = 3) -> None:
    """A change of a known rank in each weight that networks name, and none elsewhere."""
    torch.manual_seed(11)
    for key, tensor in tensors.items():
        if not key.startswith(NOT_IN_NETWORKS) and tensor.dim() > 1 and not key.endswith("position_ids"):
            rows = tensor.shape[0]
            for share in tensor.split(rows // 3 if "in_proj" in key else rows):
                flat = share.reshape(share.shape[0], -1)
                flat += (torch.randn(flat.shape[0], rank) @ torch.randn(rank, flat.shape[1])).to(tensor.dtype) * 0.02


def read_back(tmp_path: Path, network: Path, base: Path, dtype: str = "fp32") -> Tensors:
    """What the network adds to a checkpoint, by key."""
    output = tmp_path / "back.safetensors"
    merge("base + net(n)", output, "--dtype", dtype, base=base, n=network)
    return load_file(output)


def relative_error(changed: Tensors, wanted: Tensors, base: Tensors) -> float:
    pairs = [(changed[key].double(), wanted[key].double(), base[key].double()) for key in SHAPES if "first_" not in key]
    lost = sum(float((found - goal).square().sum()) for found, goal, _ in pairs)
    return float((lost / sum(float((goal - start).square().sum()) for _, goal, start in pairs)) ** 0.5)


@pytest.mark.parametrize("threads", ["1", "3"])
def test_a_known_change_of_low_rank_comes_back(tmp_path: Path, write_model: WriteModel, threads: str) -> None:
    base, tuned = write_model("base", 1, torch.float32), write_model("tuned", 1, torch.float32, add_low_rank)
    network = tmp_path / "lora.safetensors"
    document = merge(
        "tuned - base", network, "--as", "lora", "--rank", "8", "--threads", threads, base=base, tuned=tuned
    )
    assert document["error"] <= 1e-5
    error = relative_error(read_back(tmp_path, network, base), load_file(tuned), load_file(base))
    assert error <= 1e-5 and abs(error - document["error"]) <= 5e-6
    assert {module["form"] for module in document["modules"]} == {"LoRA"}
    with safe_open(network, "pt") as opened:
        said, keys = opened.metadata(), list(opened.keys())
    assert all(key.endswith(("lora_up.weight", "lora_down.weight", ".alpha")) for key in keys)
    assert json.loads(said["sd_merge_recipe"])["formula"] == "tuned - base" and said["ss_network_dim"] == "8"
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    header = read_header(network)
    assert said["sshs_model_hash"] == hashlib.sha256(network.read_bytes()[header.data_start :]).hexdigest()


def test_the_bytes_do_not_depend_on_threads(tmp_path: Path, write_model: WriteModel) -> None:
    paths = {"base": write_model("base", 1), "tuned": write_model("tuned", 2)}
    found = set()
    for kind in (["lora", "--energy", "0.5"], ["lokr"], ["full"]):
        for threads in "124":
            output = tmp_path / f"{kind[0]}{threads}.safetensors"
            merge("tuned - base", output, "--as", *kind, "--threads", threads, **paths)
            found.add(output.read_bytes())
    assert len(found) == 3


def test_everything_that_changes_is_kept_or_counted(tmp_path: Path, write_model: WriteModel) -> None:
    """In float16, biases and norms too; the stated error is that of reading back."""
    base, tuned = write_model("base", 1), write_model("tuned", 2)
    wanted, start = load_file(tuned), load_file(base)
    for kind, limit in (("full", 4e-4), ("lora", 0.95), ("lokr", 1.0)):
        network = tmp_path / f"{kind}.safetensors"
        document = merge("tuned - base", network, "--as", kind, base=base, tuned=tuned)
        error = relative_error(read_back(tmp_path, network, base), wanted, start)
        assert error <= limit and error == pytest.approx(document["error"], rel=1e-3, abs=1e-7)
    kept = load_file(tmp_path / "lora.safetensors")
    norm = "lora_unet_middle_block_0_in_layers_0"
    assert torch.equal(kept[f"{norm}.w_norm"].float(), (wanted[f"{UNET}middle_block.0.in_layers.0.weight"].float()
                       - start[f"{UNET}middle_block.0.in_layers.0.weight"].float()).half().float())  # fmt: skip
    skipped = merge(
        "tuned - base", tmp_path / "s.safetensors", "--as", "lora", "--rest", "skip", base=base, tuned=tuned
    )
    left_out = [module for module in skipped["modules"] if module["form"] == "left out"]
    assert len(left_out) == 9 and all(module["error"] == 1 for module in left_out)
    assert not any("norm" in key or "diff" in key for key in load_file(tmp_path / "s.safetensors"))


def draw_matrix(seed: int) -> torch.Tensor:
    """A weight's change with a falling spectrum, as trainings leave: linear or convolution."""
    generator = torch.Generator().manual_seed(seed)
    shape = [(320, 320), (640, 160), (160, 576), (96, 32, 3, 3)][seed % 4]
    rows, columns = shape[0], int(torch.tensor(shape[1:]).prod())
    smaller = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, smaller, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, smaller, generator=generator)).Q
    values = torch.arange(1, smaller + 1).float() ** -(0.2 + 0.1 * (seed % 7))
    return ((left * values) @ right.T).reshape(shape)


@pytest.mark.parametrize("seed", range(20))
def test_the_range_finder_is_nearly_as_good_as_a_whole_svd(seed: int) -> None:
    delta = draw_matrix(seed)
    rank = (4, 16, 32)[seed % 3]
    squares = sum_squares(delta)
    fit = fit_low_rank(delta, rank, 0.0, squares, f"module {seed}", torch.float32)
    values = torch.linalg.svdvals(delta.reshape(delta.shape[0], -1).double())
    best = float(values[rank:].square().sum()) ** 0.5
    lost = squares_lost(delta.reshape(delta.shape[0], -1).clone(), fit) ** 0.5
    assert best * 0.999999 <= lost <= best * 1.02
    whole = torch.from_numpy(fit.product[0].numpy() @ fit.product[1].numpy()).reshape(delta.shape)
    extract = extract_conv if delta.dim() == 4 else extract_linear
    (down, up, rest), _ = extract(delta, "fixed", rank)
    assert torch.linalg.vector_norm(delta - whole) <= 1.02 * torch.linalg.vector_norm(rest)
    assert fit.factors["lora_down.weight"].shape == down.shape and fit.factors["lora_up.weight"].shape == up.shape


def test_energy_gives_the_least_rank_that_holds_it() -> None:
    delta = draw_matrix(4)
    squares = sum_squares(delta)
    values = torch.linalg.svdvals(delta.double()).square()
    for energy in (0.2, 0.5, 0.7):
        wanted = int((torch.cumsum(values, 0) < energy * squares).sum()) + 1
        assert abs(fit_low_rank(delta, 150, energy, squares, "m", torch.float32).rank - wanted) <= 0
    assert fit_low_rank(delta, 3, 0.999, squares, "m", torch.float32).rank == 3


@pytest.mark.parametrize("shape", [(64, 48), (64, 32, 3, 3)])
def test_the_nearest_kronecker_product(shape: tuple[int, ...]) -> None:
    """A product comes back; of any other change nothing nearer is found by small steps."""
    torch.manual_seed(2)
    outer = (factorization(64, 8)[0], factorization(shape[1], 8)[0])
    w1, w2 = torch.randn(outer), torch.randn(64 // outer[0], shape[1] // outer[1], *shape[2:])
    product = torch.kron(w1.reshape(*outer, *[1] * (len(shape) - 2)), w2)
    fit = fit_kronecker(product, outer, torch.float32)
    assert squares_lost(split_kronecker(product, outer).clone(), fit) <= 1e-11 * sum_squares(product)
    delta = torch.randn(shape)
    fit = fit_kronecker(delta, outer, torch.float32)
    lost = squares_lost(split_kronecker(delta, outer).clone(), fit)
    best = torch.linalg.svdvals(split_kronecker(delta, outer).double())[0].square()
    assert lost == pytest.approx(sum_squares(delta) - float(best), rel=1e-5)
    made = torch.kron(fit.factors["lokr_w1"].reshape(*outer, *[1] * (len(shape) - 2)), fit.factors["lokr_w2"])
    assert float((delta - made).square().sum()) == pytest.approx(lost, rel=1e-4)


LINEAR, CONV = "lora_unet_input_blocks_4_1_proj_in", "lora_unet_input_blocks_4_0_in_layers_2"
QUERY = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"


def lora(seed: int, rank: int, alpha: float) -> Tensors:
    torch.manual_seed(seed)
    shapes = {LINEAR: (64, 32), CONV: (64, 32, 3, 3), QUERY: (32, 32)}
    tensors: Tensors = {}
    for name, shape in shapes.items():
        tensors |= {
            f"{name}.lora_up.weight": torch.randn(shape[0], rank, *[1] * (len(shape) - 2)),
            f"{name}.lora_down.weight": torch.randn(rank, *shape[1:]),
            f"{name}.alpha": torch.tensor(alpha),
        }
    return tensors


def change_of(tmp_path: Path, formula: str, base: Path, **networks: Path) -> Tensors:
    output = tmp_path / "whole.safetensors"
    merge(f"base + {formula}", output, base=base, **networks)
    return load_file(output)


def test_networks_are_joined_exactly_or_fitted(
    tmp_path: Path, write_model: WriteModel, write_network: WriteNetwork
) -> None:
    base = write_model("base", 1, torch.float32)
    a, b = write_network("a", lora(1, 4, 2.0)), write_network("b", lora(2, 6, 6.0))
    formula = "net(a) + 0.5*net(b)"
    wanted, start = change_of(tmp_path, formula, base, a=a, b=b), load_file(base)
    joined = tmp_path / "joined.safetensors"
    document = merge(formula, joined, "--as", "lora", a=a, b=b)
    assert {module["rank"] for module in document["modules"]} == {10} and document["error"] <= 1e-6
    assert relative_error(read_back(tmp_path, joined, base), wanted, start) <= 1e-6
    assert load_file(joined)[f"{CONV}.lora_down.weight"].shape == (10, 32, 3, 3)
    resized = tmp_path / "resized.safetensors"
    document = merge(formula, resized, "--as", "lora", "--rank", "5", a=a, b=b)
    assert {module["rank"] for module in document["modules"]} == {5} and 0.01 < document["error"] < 0.9
    error = relative_error(read_back(tmp_path, resized, base), wanted, start)
    assert error == pytest.approx(document["error"], rel=1e-4)
    for kind, limit in (("full", 1e-6), ("lokr", 1.0)):
        output = tmp_path / f"{kind}.safetensors"
        document = merge(formula, output, "--as", kind, a=a, b=b)
        error = relative_error(read_back(tmp_path, output, base), wanted, start)
        assert error <= limit and error == pytest.approx(document["error"], rel=1e-4, abs=1e-6)


def test_a_lokr_network_comes_back_as_one(tmp_path: Path, write_model: WriteModel, write_network: WriteNetwork) -> None:
    """Its factors in two, flat for a convolution, whose kernel the name tells; the split of its own."""
    torch.manual_seed(4)
    tensors = {
        f"{CONV}.lokr_w1": torch.randn(4, 4), f"{CONV}.lokr_w2_a": torch.randn(16, 2),
        f"{CONV}.lokr_w2_b": torch.randn(2, 72), f"{CONV}.alpha": torch.tensor(1.0),
        "lora_unet_middle_block_0_in_layers_0.w_norm": torch.randn(32),
    }  # fmt: skip
    base, network = write_model("base", 1, torch.float32), write_network("n", tensors)
    output = tmp_path / "lokr.safetensors"
    document = merge("net(n)", output, "--as", "lokr", n=network)
    assert document["error"] <= 2e-6
    found = load_file(output)
    assert found[f"{CONV}.lokr_w1"].shape == (4, 4) and found[f"{CONV}.lokr_w2"].shape == (16, 8, 3, 3)
    wanted = change_of(tmp_path, "net(n)", base, n=network)
    assert relative_error(read_back(tmp_path, output, base), wanted, load_file(base)) <= 2e-6
    lora_of_it = merge("net(n)", tmp_path / "lora.safetensors", "--as", "lora", "--like", str(base), n=network)
    assert lora_of_it["error"] <= 1e-5 and lora_of_it["modules"][0]["rank"] == 32


def test_blocks_and_parts_hold_without_a_checkpoint(
    tmp_path: Path, write_model: WriteModel, write_network: WriteNetwork
) -> None:
    a = write_network("a", lora(1, 4, 4.0))
    formula = "blocks(IN04=0.5, TE2=0, else=7) * net(a)"
    output = tmp_path / "o.safetensors"
    merge(formula, output, "--as", "lora", a=a)
    base = write_model("base", 1, torch.float32)
    found = read_back(tmp_path, output, base)
    assert relative_error(found, change_of(tmp_path, formula, base, a=a), load_file(base)) <= 1e-6
    assert torch.equal(found[f"{TE2}0.attn.in_proj_weight"], load_file(base)[f"{TE2}0.attn.in_proj_weight"])


def test_a_part_of_a_fused_tensor_that_changes_alone(tmp_path: Path, write_model: WriteModel) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{TE2}0.attn.in_proj_weight"][:32] += torch.ones(32, 32)
        tensors[f"{TE2}1.attn.in_proj_weight"][32:64] += torch.ones(32, 32)

    paths = {"base": write_model("base", 1, torch.float32), "tuned": write_model("tuned", 1, torch.float32, change)}
    for kind in ("lora", "lokr", "full"):
        network = tmp_path / f"{kind}.safetensors"
        document = merge("tuned - base", network, "--as", kind, **paths)
        assert document["error"] <= 1e-5 and len(document["modules"]) == 6
        found = read_back(tmp_path, network, paths["base"])
        assert relative_error(found, load_file(paths["tuned"]), load_file(paths["base"])) <= 1e-5


def test_what_is_no_change_is_refused(tmp_path: Path, write_model: WriteModel, write_network: WriteNetwork) -> None:
    a, b, n = write_model("a", 1), write_model("b", 2), write_network("n", lora(1, 4, 4.0))
    output = tmp_path / "o.safetensors"
    assert "sum to 1, not 0" in refusal("a + 0.5 * (b - a)", output, "--as", "lora", a=a, b=b)
    assert "changes nothing" in refusal("a - b", output, "--as", "lora", a=a, b=a)
    assert "--as lora" in refusal("net(n)", output, n=n)
    assert "--rank means nothing" in refusal("a - b", output, "--rank", "4", a=a, b=b)
    assert "--verify means nothing with --as" in refusal("a - b", output, "--as", "lora", "--verify", a=a, b=b)
    assert "no type for networks" in refusal("a - b", output, "--as", "lora", "--dtype", "fp64", a=a, b=b)
    dora = {f"{LINEAR}.dora_scale": torch.ones(64, 1), **lora(1, 4, 4.0)}
    assert "DoRA" in refusal("net(n)", output, "--as", "lora", n=write_network("d", dora))

    def spoil(tensors: Tensors) -> None:
        tensors[f"{UNET}out.2.weight"][0, 0, 0, 0] = float("nan")

    assert "is not finite; nothing was written" in refusal(
        "a - b", output, "--as", "lora", a=a, b=write_model("c", 3, change=spoil)
    )


def test_the_first_models_type_or_the_asked_one(tmp_path: Path, write_model: WriteModel) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path, seed in ((a, 1), (b, 2)):
        save_file(make_tensors(seed, torch.float64), path)
    for options, wanted in ([], torch.float32), (["--dtype", "bf16"], torch.bfloat16):
        merge("a - b", tmp_path / "o.safetensors", "--as", "lora", *options, a=a, b=b)
        found = load_file(tmp_path / "o.safetensors")
        assert {tensor.dtype for key, tensor in found.items() if "alpha" not in key} == {wanted}
