"""Functions that are no sums, against sd-mecha's own code, in float64 and as real merges."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kohaku_wrap.errors import ProblemsFound
from kohaku_wrap.formats.safetensors import read_header
from kohaku_wrap.merging import pieces
from kohaku_wrap.merging.coverage import UnfitInputs
from kohaku_wrap.merging.extraction.changes import write_network
from kohaku_wrap.merging.formula.coefficients import Formula
from kohaku_wrap.merging.formula.parser import parse_formula
from kohaku_wrap.merging.formula.tokens import FormulaError
from kohaku_wrap.merging.formula.tree import format_formula, names_of_models, names_of_networks
from kohaku_wrap.merging.plan import MergeOptions
from kohaku_wrap.merging.planning import plan_merge
from kohaku_wrap.merging.running import run_merge
from kohaku_wrap.streams import draws, stream_key

from ..conftest import SHAPES, TE2, UNET, Tensors, WriteModel

DOUBLE = torch.float64
ULPS = 2
VAE_KEY = "first_stage_model.encoder.conv_in.weight"
IN_UNET = [key for key in SHAPES if key.startswith(UNET)]

Method = Callable[..., torch.Tensor]


@pytest.fixture(scope="module")
def mecha() -> Callable[[str], Method]:
    """A method of sd-mecha by name, as a plain function of tensors."""
    sd_mecha = pytest.importorskip("sd_mecha", reason="pip install sd-mecha: the oracle of functions")
    return lambda name: getattr(sd_mecha, name).__wrapped__


@pytest.fixture
def paths(write_model: WriteModel) -> dict[str, Path]:
    """Three checkpoints; b and c are a with small changes, some of them none, so that ties and zeros are there."""

    def close(seed: int) -> Callable[[Tensors], None]:
        def change(tensors: Tensors) -> None:
            generator = np.random.default_rng(seed)
            for key in SHAPES:
                step = torch.from_numpy(generator.standard_normal(SHAPES[key]).astype(np.float32)) * 0.01
                tensors[key] = (tensors[key] + step * (step.abs() > 0.003)).to(tensors[key].dtype)

        return change

    return {
        "a": write_model("a", 1, torch.float32),
        "b": write_model("b", 1, torch.float16, close(5)),
        "c": write_model("c", 1, torch.bfloat16, close(6)),
    }


def merge(formula: str, paths: dict[str, Path], output: Path, threads: int = 2, **options: Any) -> Tensors:
    tree = parse_formula(formula)
    used = {name: paths[name] for name in (*names_of_models(tree), *names_of_networks(tree))}
    run_merge(plan_merge(formula, used, MergeOptions(**options)), output, {}, threads)
    return load_file(output)


def doubles(paths: dict[str, Path], key: str) -> list[torch.Tensor]:
    return [load_file(path)[key].to(DOUBLE) for path in paths.values()]


def ulps_between(found: torch.Tensor, wanted: torch.Tensor) -> int:
    """The largest distance between float32 numbers, in steps from one to the next."""

    def steps(values: torch.Tensor) -> torch.Tensor:
        bits = values.contiguous().view(torch.int32).long()
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return int((steps(found) - steps(wanted)).abs().max())


def drop_mask(seed: int, number: int, key: str, shape: tuple[int, ...], drop: float) -> torch.Tensor:
    """The documented stream, drawn here once more."""
    numbers = draws(stream_key("dare", seed, number, key), np.arange(np.prod(shape), dtype=np.uint64))
    return torch.from_numpy((numbers >= np.uint64(int(drop * 2**64))).reshape(shape))


def of_ties(k: float, vote_sgn: bool) -> Callable[[Any, str, list[torch.Tensor]], torch.Tensor]:
    return lambda mecha, key, each: (
        each[0] + mecha("ties_sum")(each[1] - each[0], each[2] - each[0], k=k, vote_sgn=vote_sgn)
    )


def of_slerp(t: float) -> Callable[[Any, str, list[torch.Tensor]], torch.Tensor]:
    return lambda mecha, key, each: mecha("slerp")(each[0], each[1], alpha=torch.tensor(t, dtype=DOUBLE))


def of_cosine(alpha: float) -> Callable[[Any, str, list[torch.Tensor]], torch.Tensor]:
    return lambda mecha, key, each: mecha("add_cosine_a")(each[0], each[1], alpha=torch.tensor(alpha, dtype=DOUBLE))


def of_train_difference(mecha: Any, key: str, each: list[torch.Tensor]) -> torch.Tensor:
    a, b, c = each
    return a + (b - c) * mecha("train_difference_mask")(a, b, c, alpha=torch.tensor(1.0, dtype=DOUBLE))


def of_dare(mecha: Any, key: str, each: list[torch.Tensor]) -> torch.Tensor:
    """sd-mecha's dropout, given kwrap's masks in place of numpy's."""
    a, b, c = each
    masks = [drop_mask(7, number, key, tuple(a.shape), 0.7).double() for number in range(2)]
    return a + (masks[0] * (b - a) + masks[1] * (c - a)) / (masks[0] + masks[1]).clamp(1) / (1 - 0.7)


CASES = {
    "train_difference(a, b, c)": of_train_difference,
    "cosine(a, b)": of_cosine(0.0),
    "cosine(a, b, alpha=0.25)": of_cosine(0.25),
    "slerp(a, b, 0.3)": of_slerp(0.3),
    "slerp(a, b, t=0)": of_slerp(0.0),
    "slerp(a, b, 1.5)": of_slerp(1.5),
    "a + ties(b - a, c - a)": of_ties(1.0, False),
    "a + ties(b - a, c - a, 0.2)": of_ties(0.2, False),
    "a + ties(b - a, c - a, k=0.37, mass=1)": of_ties(0.37, True),
    "a + dare(b - a, c - a, 0.7, 7)": of_dare,
}


@pytest.mark.parametrize("formula", CASES)
def test_functions_equal_sd_mecha(
    tmp_path: Path, paths: dict[str, Path], mecha: Any, formula: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "CHUNK_ELEMENTS", 1000)
    merged = merge(formula, paths, tmp_path / "out.safetensors")
    changed = 0
    for key in SHAPES:
        each = doubles(paths, key)
        if key == VAE_KEY:
            assert torch.equal(merged[key].double(), each[0])
            continue
        wanted = CASES[formula](mecha, key, each).float()
        assert ulps_between(merged[key], wanted) <= ULPS, key
        changed += not torch.equal(wanted, each[0].float())
    assert changed or formula == "slerp(a, b, t=0)"


@pytest.mark.parametrize("probability", [0.5, 0.9])
def test_dare_of_one_change_is_sd_mechas_dropout_given_its_mask(
    tmp_path: Path, paths: dict[str, Path], mecha: Any, probability: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = IN_UNET[4]
    a, b, _ = doubles(paths, key)
    mask = drop_mask(3, 0, key, tuple(a.shape), probability).numpy().astype(int)
    generator = type("Masks", (), {"binomial": lambda self, n, p, size: mask})()
    monkeypatch.setattr("sd_mecha.extensions.builtin.merge_methods.ties.np.random.default_rng", lambda seed: generator)
    wanted = a + mecha_dropout()(b - a, probability=probability, seed=3)
    merged = merge(f"a + dare(b - a, {probability}, 3)", paths, tmp_path / "out.safetensors")
    assert ulps_between(merged[key], wanted.float()) <= ULPS
    assert abs(mask.mean() - (1 - probability)) < 0.05


def mecha_dropout() -> Method:
    from sd_mecha.extensions.builtin.merge_methods.ties import dropout

    return dropout.__wrapped__


NESTED = "0.5 * slerp(a, 0.5 * a + 0.5 * b, 0.3) + 0.5 * (c + ties(dare(b - a, 0.5, 1), c - a, 0.4))"


@pytest.mark.parametrize("formula", [*CASES, NESTED])
def test_no_byte_depends_on_threads(tmp_path: Path, paths: dict[str, Path], formula: str) -> None:
    digests = set()
    for threads in (1, 2, 5):
        merge(formula, paths, tmp_path / "out.safetensors", threads)
        digests.add(hashlib.sha256((tmp_path / "out.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_functions_nest_with_sums_and_each_other(tmp_path: Path, paths: dict[str, Path], mecha: Any) -> None:
    merged = merge(NESTED, paths, tmp_path / "out.safetensors")
    for key in IN_UNET:
        a, b, c = doubles(paths, key)
        dropped = drop_mask(1, 0, key, tuple(a.shape), 0.5).double() * (b - a) / 0.5
        arc = mecha("slerp")(a, 0.5 * a + 0.5 * b, alpha=torch.tensor(0.3, dtype=DOUBLE))
        wanted = 0.5 * arc + 0.5 * (c + mecha("ties_sum")(dropped, c - a, k=0.4))
        assert ulps_between(merged[key], wanted.float()) <= ULPS, key


def test_numbers_by_block_and_output_types(tmp_path: Path, paths: dict[str, Path], mecha: Any) -> None:
    formula = "slerp(a, b, blocks(IN04=0.25, else=1))"
    merged = merge(formula, paths, tmp_path / "out.safetensors", dtype="F16")
    for key in IN_UNET:
        a, b, _ = doubles(paths, key)
        wanted = mecha("slerp")(a, b, alpha=torch.tensor(0.25, dtype=DOUBLE)) if "input_blocks.4" in key else b
        assert torch.equal(merged[key], torch.from_numpy(wanted.numpy().astype(np.float16))), key


def test_equal_and_opposite_directions_are_a_straight_line(
    tmp_path: Path, write_model: WriteModel, paths: dict[str, Path]
) -> None:
    def negate(tensors: Tensors) -> None:
        tensors |= {key: -2 * value for key, value in tensors.items() if key in SHAPES}

    opposite = {"a": paths["a"], "b": write_model("o", 1, torch.float32, negate)}
    merged = merge("slerp(a, b, 0.25)", opposite, tmp_path / "out.safetensors")
    same = merge("slerp(a, a, 0.25)", {"a": paths["a"]}, tmp_path / "same.safetensors")
    for key in IN_UNET:
        a = load_file(paths["a"])[key]
        assert torch.allclose(merged[key], a * 0.25, rtol=1e-6)
        assert torch.equal(same[key], a)


def test_a_network_is_added_beside_a_function(
    tmp_path: Path, paths: dict[str, Path], write_network: Callable[[str, Tensors], Path], mecha: Any
) -> None:
    key, fused = f"{UNET}input_blocks.4.1.proj_in.weight", f"{TE2}0.attn.in_proj_weight"
    shape = SHAPES[key]
    delta, rows = torch.randn(shape), torch.randn(32, 32)
    network = write_network("net", {"lora_unet_input_blocks_4_1_proj_in.diff": delta, f"{TE_Q}.diff": rows})
    merged = merge(
        "0.5 * slerp(a, b, 0.5) + 0.5 * a + 0.5 * net(x)", {**paths, "x": network}, tmp_path / "out.safetensors"
    )
    for name, added in ((key, delta), (fused, torch.cat([torch.zeros(32, 32), rows, torch.zeros(32, 32)]))):
        a, b, _ = doubles(paths, name)
        wanted = 0.5 * mecha("slerp")(a, b, alpha=torch.tensor(0.5, dtype=DOUBLE)) + 0.5 * a + 0.5 * added.double()
        assert ulps_between(merged[name], wanted.float()) <= ULPS


TE_Q = "lora_te2_text_model_encoder_layers_0_self_attn_k_proj"


def test_a_change_with_functions_becomes_a_network(tmp_path: Path, paths: dict[str, Path], mecha: Any) -> None:
    plan = plan_merge("ties(b - a, c - a, 0.5)", paths, MergeOptions(network="full", dtype="F32"))
    write_network(plan, tmp_path / "net.safetensors", {})
    network = load_file(tmp_path / "net.safetensors")
    key, fused = f"{UNET}input_blocks.4.1.proj_in.weight", f"{TE2}0.attn.in_proj_weight"
    for name, module, rows in (
        (key, "lora_unet_input_blocks_4_1_proj_in", slice(None)),
        (fused, TE_Q, slice(32, 64)),
    ):
        a, b, c = doubles(paths, name)
        wanted = mecha("ties_sum")(b - a, c - a, k=0.5)[rows]
        assert ulps_between(network[f"{module}.diff"], wanted.float()) <= ULPS


@pytest.mark.parametrize(
    ("formula", "what"),
    [
        ("slerp(a, b)", "t is missing"),
        ("slerp(a, b, c, 0.5)", "with 2 models; here are 3"),
        ("slerp(a, 2 * b, 0.5)", "these sum to 2"),
        ("slerp(a, 0.5, b)", "numbers come last"),
        ("cosine(a, b, 0.1, 0.2)", "it takes alpha"),
        ("train_difference(a, b)", "with 3 models; here are 2"),
        ("a + dare(b, 0.5, 1)", "takes changes, whose coefficients sum to 0"),
        ("a + dare(b - a, 0.5)", "seed is missing"),
        ("a + dare(b - a, 1, 1)", "drop is at least 0 and less than 1"),
        ("a + dare(b - a, 0.5, 1.5)", "seed is a whole number"),
        ("a + ties(b - a, k=0)", "k is more than 0 and at most 1"),
        ("a + ties(b - a, share=0.2)", "share= is no number of it; ties.* takes k, mass"),
        ("a + ties(b - a, 0.2, k=0.2)", "k= is given twice"),
        ("a + ties(net(x))", "a network cannot stand inside ties"),
        ("slerp(unet(a), b, 0.5)", "these sum to 0"),
        ("sler(a, b, 0.5)", "there is no function 'sler'; there are .*slerp"),
        ("slerp(a, b, 0.5", "expected '\\)' or ','"),
    ],
)
def test_wrong_calls_are_refused_at_their_place(formula: str, what: str) -> None:
    with pytest.raises(FormulaError, match=what) as caught:
        parsed = Formula(formula, parse_formula(formula))
        for key in (IN_UNET[0], VAE_KEY):
            parsed.reduce_for_key(key)
    assert "^" in str(caught.value)


@pytest.mark.parametrize("formula", [*CASES, NESTED])
def test_the_text_of_a_formula_parses_to_the_same_tree(formula: str) -> None:
    tree = parse_formula(formula)
    assert parse_formula(format_formula(tree)) == tree


def test_a_member_that_lacks_a_tensor(tmp_path: Path, paths: dict[str, Path], write_model: WriteModel) -> None:
    lost = IN_UNET[3]
    less = {**paths, "b": write_model("less", 3, change=lambda tensors: tensors.__delitem__(lost))}
    plan = plan_merge("a + ties(b - a, c - a)", less)
    assert any("b - a counts as 0 where a member lacks the key" in line for line in plan.decisions)
    pair = {name: less[name] for name in ("a", "b")}
    with pytest.raises(ProblemsFound, match="b lacks it and has weight in the formula"):
        plan_merge("slerp(a, b, 0.5)", pair)
    with pytest.raises(ProblemsFound, match="b lacks it and has no zeros to give to a function"):
        plan_merge("slerp(a, b, 0.5)", pair, MergeOptions(missing="zero"))
    merged = merge("slerp(a, b, 0.5)", pair, tmp_path / "out.safetensors", missing="anchor")
    assert torch.equal(merged[lost], load_file(paths["a"])[lost])


def test_a_member_that_shares_no_tensor_is_refused(
    paths: dict[str, Path], write_network: Callable[[str, Tensors], Path]
) -> None:
    other = write_network("other", {"decoder.weight": torch.zeros(3, 3)})
    for formula in ("a + dare(x - a, 0.5, 1)", "slerp(a, x, 0.5)", "train_difference(a, x, a)"):
        with pytest.raises(UnfitInputs, match="shares no tensor with a"):
            plan_merge(formula, {"a": paths["a"], "x": other})


def test_mixed_predictions_inside_a_function_are_shown(paths: dict[str, Path], write_model: WriteModel) -> None:
    plain = write_model("eps", 2, change=lambda tensors: tensors.__delitem__("v_pred"))
    plan = plan_merge("slerp(a, e, 0.5)", {"a": paths["a"], "e": plain})
    assert any("prediction types are mixed" in line for line in plan.decisions)
    same = plan_merge("train_difference(a, e, f)", {"a": paths["a"], "e": plain, "f": plain})
    assert not any("prediction types are mixed" in line for line in same.decisions)


def test_infinite_inputs_are_refused_by_key(tmp_path: Path, paths: dict[str, Path], write_model: WriteModel) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[IN_UNET[0]].view(-1)[5] = float("nan")

    bad = {**paths, "b": write_model("bad", 1, change=spoil)}
    for formula in CASES:
        with pytest.raises(ProblemsFound, match="1 numbers of the inputs are infinite or NaN"):
            merge(formula, bad, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_verification_says_what_it_leaves_out(tmp_path: Path, paths: dict[str, Path]) -> None:
    plan = plan_merge("a + unet(slerp(a, b, 0.5) - a)", {name: paths[name] for name in "ab"})
    result = run_merge(plan, tmp_path / "out.safetensors", {}, 1, verify_elements=500)
    assert result.verified and result.unverified
    assert read_header(tmp_path / "out.safetensors").tensors.keys() == read_header(paths["a"]).tensors.keys()
