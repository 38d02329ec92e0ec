"""Print how far the baked tiny SDXL predicts from base with live network, and from the bare base; run as a script."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kohaku_wrap.demo.base_model import write_base_model
from kohaku_wrap.files import shipped_folder
from kohaku_wrap.merging.planning import plan_merge
from kohaku_wrap.merging.running import run_merge
from kohaku_wrap.training.engines.builtin.models import BaseModel, load_base_model

Outputs = dict[str, torch.Tensor]


@torch.no_grad()
def predict(model: BaseModel) -> Outputs:
    """Noise, text states and pooled text for fixed inputs."""
    generator = torch.Generator().manual_seed(11)
    first, second = model.text_encoders
    ids = torch.randint(0, first.config.vocab_size, (1, 77), generator=generator)
    states = first(ids, output_hidden_states=True).hidden_states[-2]
    output = second(ids, output_hidden_states=True)
    text = torch.cat([states, output.hidden_states[-2]], dim=2)
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    added = {"text_embeds": output.text_embeds, "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]])}
    noise = model.unet(latents, torch.tensor(500), encoder_hidden_states=text, added_cond_kwargs=added).sample
    return {"noise": noise, "text": text, "pooled": output.text_embeds}


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def main(folder: Path) -> None:
    from lycoris import kohya

    torch.set_num_threads(1)
    torch.manual_seed(0)
    write_base_model(folder / "base", 1)
    base_path = folder / "base" / "model.safetensors"
    tensors = {
        name: value.float() if value.is_floating_point() else value for name, value in load_file(base_path).items()
    }
    save_file(tensors, base_path)
    alone = predict(load_base_model(base_path, None))
    model = load_base_model(base_path, None)
    preset = shipped_folder("templates") / "presets" / "kohaku-lokr.toml"
    network = kohya.create_network(
        1.0, 10000, 10000, model.vae, list(model.text_encoders), model.named_unet,
        algo="lokr", factor=8, train_norm=True, preset=str(preset),
    )  # fmt: skip
    network.apply_to(list(model.text_encoders), model.named_unet, True, True)
    for parameter in network.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.03)
    network.eval()
    live = predict(model)
    path = folder / "network.safetensors"
    save_file({name: value.detach().contiguous() for name, value in network.state_dict().items()}, path)
    plan = plan_merge("base + 1.0 * net(n)", {"base": base_path, "n": path})
    baked_path = folder / "base" / "baked.safetensors"
    run_merge(plan, baked_path, {}, threads=1)
    baked = predict(load_base_model(baked_path, None))
    for part, wanted in live.items():
        print(f"{part}_baked {distance(baked[part], wanted):.3g}")
        print(f"{part}_base {distance(alone[part], wanted):.3g}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
