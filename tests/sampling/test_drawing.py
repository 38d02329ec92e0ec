"""What draws: samplers against their equations, text encoding against diffusers, pictures against each other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kohaku_wrap.config.base_model import read_sizes
from kohaku_wrap.merging.planning import plan_merge
from kohaku_wrap.merging.running import run_merge
from kohaku_wrap.sampling.cells import SAMPLERS, SCHEDULES, Cell, Compute, Hires
from kohaku_wrap.sampling.checkpoints import AddedNetwork, Model
from kohaku_wrap.sampling.chunks import load_tokenizers
from kohaku_wrap.sampling.drawing.drawing import Artist, NotFinite
from kohaku_wrap.sampling.drawing.encoding import encode_prompt, weigh
from kohaku_wrap.sampling.drawing.models import load_drawer
from kohaku_wrap.sampling.drawing.samplers import Sampler, draw_noise

pytestmark = pytest.mark.torch

Pixels = np.ndarray[Any, Any]


def make_artist(
    world: Path, model: Model | None = None, compute: Compute | None = None, offload: bool = False
) -> Artist:
    torch.set_num_threads(1)
    tokenizers = load_tokenizers(world / "base" / "tokenizers")
    assert tokenizers
    drawer = load_drawer(model or Model(world / "base" / "model.safetensors"), compute or Compute(batch=2))
    return Artist(drawer, tokenizers, torch.device("cpu"), offload)


def draw(artist: Artist, *cells: Cell) -> list[Pixels]:
    return [np.asarray(picture) for picture in artist.draw(cells)]


@pytest.fixture(scope="module")
def artist(world: Path) -> Artist:
    return make_artist(world)


def sigmas_of_sdxl(zero_terminal_snr: bool = False) -> np.ndarray[Any, Any]:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = np.cumprod(1 - betas)
    if zero_terminal_snr:
        roots = np.sqrt(alphas)
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
        alphas = roots**2
        alphas[-1] = 2**-24
    return np.sqrt((1 - alphas) / alphas)


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("prediction,zero", [("epsilon", False), ("v", True)])
def test_one_step_of_euler_a_is_its_equation(cell: Cell, schedule: str, prediction: str, zero: bool) -> None:
    cell = replace(cell, schedule=schedule, prediction=prediction, zero_terminal_snr=zero, steps=5)
    trained = sigmas_of_sdxl(zero)
    most, least = trained[-1], trained[0]
    if schedule == "karras":
        wanted = (most ** (1 / 7) + np.linspace(0, 1, 5) * (least ** (1 / 7) - most ** (1 / 7))) ** 7
    else:
        wanted = most ** np.linspace(1, 0, 5) * least ** np.linspace(0, 1, 5)
    wanted = np.append(wanted, 0)
    sampler = Sampler(cell)
    assert np.allclose(sampler.scheduler.sigmas, wanted, rtol=1e-4)
    generator = torch.Generator().manual_seed(0)
    latents = sampler.begin(draw_noise([4], 0, (4, 8, 8)))
    assert torch.allclose(latents / most, draw_noise([4], 0, (4, 8, 8)), rtol=1e-4)
    for number in range(5):
        time = sampler.times[number]
        now, then = wanted[number], wanted[number + 1]
        scaled = sampler.scale(latents, time)
        assert np.allclose(scaled, latents / np.sqrt(now**2 + 1), rtol=1e-4)
        predicted = torch.randn(latents.shape, generator=generator)
        x, p = latents.double().numpy(), predicted.double().numpy()
        clean = x - now * p if prediction == "epsilon" else x / (now**2 + 1) - p * now / np.sqrt(now**2 + 1)
        up = min(then, np.sqrt(then**2 * (now**2 - then**2) / now**2))
        down = np.sqrt(then**2 - up**2)
        noise = draw_noise([4], number + 1, (4, 8, 8)).double().numpy()
        expected = x + (x - clean) / now * (down - now) + noise * up
        latents = sampler.step(predicted, time, latents, [4], number + 1)
        assert np.allclose(latents, expected, rtol=2e-3, atol=2e-3 * max(1.0, float(then)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_takes_the_noise_of_its_own_seed(cell: Cell, name: str) -> None:
    """A row does not depend on the other rows, and the same step with another seed differs where there is noise."""

    def step(seeds: list[int]) -> torch.Tensor:
        sampler = Sampler(replace(cell, sampler=name, steps=4))
        latents = draw_noise([1, 1], 0, (4, 8, 8))
        sampler.scale(latents, sampler.times[0])
        return sampler.step(draw_noise([2, 2], 0, (4, 8, 8)), sampler.times[0], latents, seeds, 1)

    first, second = step([5, 6]), step([7, 5])
    assert torch.equal(first[0], second[1])
    assert torch.equal(first[0], first[1]) == (name == "dpmpp-2m")


def test_embeddings_are_those_of_diffusers_own_single_file_loading(world: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    source = write_wide_model(world, tmp_path / "wide")
    config = write_config(source, world, tmp_path / "config")
    artist = make_artist(world, Model(source))
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(source), config=str(config), local_files_only=True, torch_dtype=torch.float32
    )
    assert isinstance(pipeline.tokenizer, CLIPTokenizer)
    text = "1girl, smile, solo, long hair, masterpiece"
    states, _, pooled, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False)
    found = encode_prompt(text, artist.drawer.encoders, artist.tokenizers, 2, "no-norm", False)
    assert torch.equal(found.states, states) and torch.equal(found.pooled, pooled)
    skipped, *_ = pipeline.encode_prompt(text, do_classifier_free_guidance=False, clip_skip=0)
    assert torch.equal(skipped, states)
    # What the trainers' loaders do, which would change the pooled output in silence.
    projection = load_file(source)["conditioner.embedders.1.model.text_projection"].float()
    assert torch.equal(artist.drawer.encoders[1].text_projection.weight, projection.T)
    assert not torch.equal(projection, projection.T)


def write_wide_model(world: Path, folder: Path) -> Path:
    """A tiny model whose second encoder is wider than its first one: diffusers tells them apart by that."""
    tensors = load_file(world / "base" / "model.safetensors")
    sizes = json.loads((world / "base" / "config.json").read_text())
    sizes["text_encoder_2"] |= {"hidden_size": 48, "intermediate_size": 96, "projection_dim": 48}
    sizes["unet"] |= {"cross_attention_dim": 80, "projection_class_embeddings_input_dim": 1584}
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        if name.startswith("conditioner.embedders.1."):
            shape = [{32: 48, 64: 96, 96: 144}.get(side, side) for side in shape]
        elif "attn2.to_k" in name or "attn2.to_v" in name:
            shape[1] = 80
        elif name.endswith("label_emb.0.0.weight"):
            shape[1] = 1584
        if shape != list(tensor.shape):
            tensors[name] = torch.randn(shape, generator=generator).mul(0.2).half()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(sizes))
    return folder / "model.safetensors"


def write_config(source: Path, world: Path, folder: Path) -> Path:
    """The sizes of the tiny model as the folders of a diffusers pipeline."""
    import shutil

    sizes = read_sizes(source)
    classes = {
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    }
    index: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    for part, (library, name) in classes.items():
        (folder / part).mkdir(parents=True)
        is_text = library == "transformers"
        own = {"architectures": [name], "model_type": "clip_text_model"} if is_text else {"_class_name": name}
        (folder / part / "config.json").write_text(json.dumps({**sizes[part], **own}))
        index[part] = [library, name]
    for part, source in zip(
        ("tokenizer", "tokenizer_2"), sorted((world / "base" / "tokenizers").iterdir())[::-1], strict=True
    ):
        shutil.copytree(source, folder / part)
        index[part] = ["transformers", "CLIPTokenizer"]
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "EulerDiscreteScheduler"}')
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_weights_multiply_and_original_restores_the_mean() -> None:
    states = torch.randn(1, 77, 8, generator=torch.Generator().manual_seed(0)) + 1
    weights = torch.ones(77)
    weights[3:6] = 1.5
    plain = weigh(states, weights, "no-norm")
    assert torch.equal(plain[:, 3:6], states[:, 3:6] * 1.5) and torch.equal(plain[:, 6:], states[:, 6:])
    original = weigh(states, weights, "original")
    assert torch.isclose(original.mean(), states.mean()) and not torch.allclose(original, plain)
    assert torch.equal(weigh(states, weights, "ignore"), states)


def test_chunks_are_encoded_alone_and_pooled_from_the_first(artist: Artist) -> None:
    def encode(text: str) -> Any:
        return encode_prompt(text, artist.drawer.encoders, artist.tokenizers, 2, "no-norm", False)

    both, first, second = encode("smile BREAK hat"), encode("smile"), encode("hat")
    assert torch.equal(both.states, torch.cat([first.states, second.states], dim=1))
    assert torch.equal(both.pooled, first.pooled)


def test_a_cell_is_the_same_among_any_neighbours_and_in_any_order(artist: Artist, cell: Cell) -> None:
    other, third = replace(cell, seed=9, prompt="hat"), replace(cell, seed=11, negative="")
    for sampler in SAMPLERS:
        one, two, three = (replace(each, sampler=sampler) for each in (cell, other, third))
        alone = draw(artist, one)[0]
        assert np.array_equal(draw(artist, one, two)[0], alone)
        assert np.array_equal(draw(artist, three, one)[1], alone)
        assert not np.array_equal(draw(artist, two)[0], alone)


def test_another_batch_differs_by_two_at_most(world: Path, artist: Artist, cell: Cell) -> None:
    drawn = draw(artist, cell)[0].astype(int)
    largest = 0
    for batch in (1, 3, 4):
        compute = Compute(batch=batch)
        found = draw(make_artist(world, compute=compute), replace(cell, compute=compute))[0]
        largest = max(largest, int(np.abs(found - drawn).max()))
    assert largest <= 2


def test_base_and_network_draw_what_the_baked_file_draws(
    world: Path, network: Path, cell: Cell, tmp_path: Path
) -> None:
    base = world / "base" / "model.safetensors"
    for name in ("config.json",):
        (tmp_path / name).write_bytes((base.parent / name).read_bytes())
    plain = draw(make_artist(world), cell)[0]
    for weight in ("1", "0.37", "-0.5"):
        sign, size = ("-", weight[1:]) if weight.startswith("-") else ("+", weight)
        baked = tmp_path / f"baked{weight}.safetensors"
        run_merge(plan_merge(f"base {sign} {size} * net(n)", {"base": base, "n": network}), baked, {})
        from_file = draw(make_artist(world, Model(baked)), cell)[0]
        added = draw(make_artist(world, Model(base, (AddedNetwork(network, weight),))), cell)[0]
        assert np.array_equal(from_file, added)
        assert not np.array_equal(added, plain)
    nothing = draw(make_artist(world, Model(base, (AddedNetwork(network, "0"),))), cell)[0]
    assert np.array_equal(nothing, plain)


def test_a_float8_checkpoint_with_a_network_is_drawn_as_baked(
    world: Path, network: Path, cell: Cell, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((world / "base" / "config.json").read_bytes())
    small, baked = tmp_path / "small.safetensors", tmp_path / "baked.safetensors"
    tensors = load_file(world / "base" / "model.safetensors")
    unet = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items() if "diffusion_model" in name}
    save_file(tensors | unet, small)
    run_merge(plan_merge("base + net(n)", {"base": small, "n": network}), baked, {})
    added = Model(small, (AddedNetwork(network),))
    one, other = (draw(make_artist(world, model), cell)[0] for model in (Model(baked), added))
    assert np.array_equal(one, other)


@pytest.mark.parametrize(
    "changes",
    [
        *({"sampler": sampler, "schedule": schedule} for sampler in SAMPLERS for schedule in SCHEDULES),
        {"prediction": "v", "zero_terminal_snr": True},
        {"prediction": "v", "zero_terminal_snr": True, "sampler": "dpmpp-2m"},
        {"guidance": 1.0},
        {"clip_skip": 1},
        {"emphasis": "original"},
        {"hires": Hires(1.5, 0.4)},
        {"hires": Hires(1.5, 0.4), "sampler": "dpmpp-2m-sde"},
        {"width": 72, "height": 56},
    ],
    ids=str,
)
def test_each_setting_draws_a_picture_of_its_own(artist: Artist, cell: Cell, changes: dict[str, Any]) -> None:
    changed = replace(cell, **changes)
    (pixels,) = draw(artist, changed)
    scale = changed.hires.scale if changed.hires else 1
    assert pixels.shape == (changed.height * scale, changed.width * scale, 3)
    if changed != replace(cell, compute=changed.compute):
        (plain,) = draw(artist, cell)
        assert pixels.shape != plain.shape or not np.array_equal(pixels, plain)


def test_half_precision_and_offload_draw(world: Path, cell: Cell) -> None:
    (plain,) = draw(make_artist(world), cell)
    (moved,) = draw(make_artist(world, offload=True), cell)
    assert np.array_equal(plain, moved)
    compute = Compute(dtype="bf16", batch=2)
    (half,) = draw(make_artist(world, compute=compute), replace(cell, compute=compute))
    assert half.shape == plain.shape and not np.array_equal(half, plain)


def test_what_is_not_finite_names_the_cell_and_the_place(world: Path, cell: Cell, tmp_path: Path) -> None:
    tensors = load_file(world / "base" / "model.safetensors")
    for key, place in (
        ("model.diffusion_model.out.2.bias", "step 1 of 3"),
        ("first_stage_model.decoder.conv_out.bias", "the VAE"),
    ):
        broken = {**tensors, key: torch.full_like(tensors[key], float("nan"))}
        save_file(broken, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_bytes((world / "base" / "config.json").read_bytes())
        with pytest.raises(NotFinite, match=place) as refused:
            draw(make_artist(world, Model(tmp_path / "model.safetensors")), cell)
        assert cell.name in refused.value.message and "seed 3" in refused.value.message
