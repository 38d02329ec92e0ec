"""`kwrap sample --vae`: a VAE of another file in the place of the checkpoint's own."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from kohaku_wrap.cli import program
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.formats.sdxl import VAE_PREFIX

EVERY = ("--prompt", "1girl", "--sampler-steps", "1", "--size", "64x64", "--threads", "1")


def sample(world: Path, *words: object) -> Result:
    tokenizers = ("--tokenizers", world / "base" / "tokenizers")
    return CliRunner().invoke(program, [str(word) for word in ("sample", *words, *EVERY, *tokenizers)])


def picture_in(folder: Path) -> Path:
    (found,) = (path for path in folder.glob("*.png") if path.name != "contact-sheet.png")
    return found


def pixels_of(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


@pytest.fixture(scope="module")
def vae(world: Path) -> Path:
    """The other checkpoint's VAE by sgm's names, as such files are published."""
    from safetensors.torch import load_file, save_file

    path = world / "vae.safetensors"
    tensors = load_file(world / "other" / "model.safetensors")
    save_file({n.removeprefix(VAE_PREFIX): t for n, t in tensors.items() if n.startswith(VAE_PREFIX)}, path)
    return path


@pytest.mark.slow
def test_the_picture_is_that_of_a_checkpoint_with_this_vae_inside(world: Path, vae: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = world / "base" / "model.safetensors"
    parts = {n: t for n, t in load_file(base).items() if not n.startswith(VAE_PREFIX)}
    save_file(parts, tmp_path / "without.safetensors")
    save_file(parts | {f"{VAE_PREFIX}{n}": t for n, t in load_file(vae).items()}, tmp_path / "with.safetensors")
    (tmp_path / "config.json").write_bytes(base.with_name("config.json").read_bytes())

    refused = sample(world, tmp_path / "without.safetensors", "--out", "x").exception
    assert isinstance(refused, KwrapError) and "Give a whole SDXL checkpoint" in refused.next_step
    for name, words in {"own": (base,), "with": (tmp_path / "with.safetensors",),
                        "beside": (tmp_path / "without.safetensors", "--vae", vae)}.items():  # fmt: skip
        done = sample(world, *words, "--out", tmp_path / name)
        assert done.exit_code == 0, done.output
    own, inside, beside = (pixels_of(picture_in(tmp_path / name)) for name in ("own", "with", "beside"))
    assert inside == beside != own

    shown = CliRunner().invoke(program, ["inspect", str(picture_in(tmp_path / "beside")), "--json"])
    found = json.loads(shown.output)
    assert [each["part"] for each in found["files"]] == ["", "vae"]
    assert "VAE: vae.safetensors" in found["parameters"] and "Lora hashes" not in found["parameters"]
    replayed = shlex.split(found["replay"])
    again = CliRunner().invoke(program, [*replayed[1:-1], str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    assert pixels_of(picture_in(tmp_path / "again")) == beside


def test_it_is_read_by_every_name_that_such_files_use(world: Path, vae: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from kohaku_wrap.sampling.cells import Compute
    from kohaku_wrap.sampling.checkpoints import Model, check_model
    from kohaku_wrap.sampling.drawing.models import load_drawer

    base, other = world / "base" / "model.safetensors", world / "other" / "model.safetensors"
    wanted = load_drawer(Model(other), Compute()).vae.state_dict()
    save_file(wanted, tmp_path / "diffusers.safetensors")
    for file in (vae, other, tmp_path / "diffusers.safetensors"):
        check_model(Model(base, vae=file))
        found = load_drawer(Model(base, vae=file), Compute()).vae.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items()), file


def test_what_is_no_vae_is_named(world: Path, network: Path, tmp_path: Path) -> None:
    base = world / "base" / "model.safetensors"
    for file, said in ((network, "no VAE of SDXL: it lacks"), (tmp_path / "gone.safetensors", "no such file")):
        done = sample(world, base, "--vae", file, "--out", tmp_path / "x")
        assert done.exit_code and f"{file}: {said}" in str(done.exception)
    queued = CliRunner().invoke(program, ["sample", "--run", "x", "--queued", "--vae", str(network)])
    assert queued.exit_code and "--queued draws what" in str(queued.exception)
