"""The keys and shapes of SDXL 1.0 in single-file form, from the architecture's own sizes."""

from __future__ import annotations

from collections.abc import Iterator

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]

CHANNELS = 320
MULTIPLIERS = (1, 2, 4)
DEPTHS = (0, 2, 10)
CONTEXT = 2048
TIME = 1280
LABELS = 2816
UNET = "model.diffusion_model."


def pair(name: str, weight: Shape) -> Named:
    yield f"{name}.weight", weight
    yield f"{name}.bias", weight[:1]


def norm(name: str, size: int) -> Named:
    yield from pair(name, (size,))


def residual(name: str, inner: int, outer: int) -> Named:
    yield from norm(f"{name}.in_layers.0", inner)
    yield from pair(f"{name}.in_layers.2", (outer, inner, 3, 3))
    yield from pair(f"{name}.emb_layers.1", (outer, TIME))
    yield from norm(f"{name}.out_layers.0", outer)
    yield from pair(f"{name}.out_layers.3", (outer, outer, 3, 3))
    if inner != outer:
        yield from pair(f"{name}.skip_connection", (outer, inner, 1, 1))


def transformer(name: str, size: int, depth: int) -> Named:
    yield from norm(f"{name}.norm", size)
    yield from pair(f"{name}.proj_in", (size, size))
    for layer in range(depth):
        block = f"{name}.transformer_blocks.{layer}"
        for attention, source in (("attn1", size), ("attn2", CONTEXT)):
            yield f"{block}.{attention}.to_q.weight", (size, size)
            yield f"{block}.{attention}.to_k.weight", (size, source)
            yield f"{block}.{attention}.to_v.weight", (size, source)
            yield from pair(f"{block}.{attention}.to_out.0", (size, size))
        yield from pair(f"{block}.ff.net.0.proj", (size * 8, size))
        yield from pair(f"{block}.ff.net.2", (size, size * 4))
        for number in (1, 2, 3):
            yield from norm(f"{block}.norm{number}", size)
    yield from pair(f"{name}.proj_out", (size, size))


def unet() -> Named:
    """The noise predictor."""
    for name, source in (("time_embed", CHANNELS), ("label_emb.0", LABELS)):
        yield from pair(f"{UNET}{name}.0", (TIME, source))
        yield from pair(f"{UNET}{name}.2", (TIME, TIME))
    yield from pair(f"{UNET}input_blocks.0.0", (CHANNELS, 4, 3, 3))
    skips, size, number = [CHANNELS], CHANNELS, 1
    for level, multiplier in enumerate(MULTIPLIERS):
        for _ in range(2):
            yield from residual(f"{UNET}input_blocks.{number}.0", size, CHANNELS * multiplier)
            size = CHANNELS * multiplier
            if DEPTHS[level]:
                yield from transformer(f"{UNET}input_blocks.{number}.1", size, DEPTHS[level])
            skips.append(size)
            number += 1
        if level < len(MULTIPLIERS) - 1:
            yield from pair(f"{UNET}input_blocks.{number}.0.op", (size, size, 3, 3))
            skips.append(size)
            number += 1
    yield from residual(f"{UNET}middle_block.0", size, size)
    yield from transformer(f"{UNET}middle_block.1", size, DEPTHS[-1])
    yield from residual(f"{UNET}middle_block.2", size, size)
    number = 0
    for level in reversed(range(len(MULTIPLIERS))):
        for place in range(3):
            outer = CHANNELS * MULTIPLIERS[level]
            yield from residual(f"{UNET}output_blocks.{number}.0", size + skips.pop(), outer)
            size = outer
            if DEPTHS[level]:
                yield from transformer(f"{UNET}output_blocks.{number}.1", size, DEPTHS[level])
            if level and place == 2:
                position = 2 if DEPTHS[level] else 1
                yield from pair(f"{UNET}output_blocks.{number}.{position}.conv", (size, size, 3, 3))
            number += 1
    yield from norm(f"{UNET}out.0", size)
    yield from pair(f"{UNET}out.2", (4, size, 3, 3))


def text_encoders() -> Named:
    """OpenAI's CLIP-L in transformers' form, then OpenCLIP's bigG in its own."""
    first = "conditioner.embedders.0.transformer.text_model."
    yield f"{first}embeddings.token_embedding.weight", (49408, 768)
    yield f"{first}embeddings.position_embedding.weight", (77, 768)
    for layer in range(12):
        block = f"{first}encoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from pair(f"{block}self_attn.{name}", (768, 768))
        yield from pair(f"{block}mlp.fc1", (3072, 768))
        yield from pair(f"{block}mlp.fc2", (768, 3072))
        for number in (1, 2):
            yield from norm(f"{block}layer_norm{number}", 768)
    yield from norm(f"{first}final_layer_norm", 768)
    second = "conditioner.embedders.1.model."
    yield f"{second}token_embedding.weight", (49408, 1280)
    yield f"{second}positional_embedding", (77, 1280)
    yield f"{second}text_projection", (1280, 1280)
    yield f"{second}logit_scale", ()
    yield from norm(f"{second}ln_final", 1280)
    for layer in range(32):
        block = f"{second}transformer.resblocks.{layer}."
        yield f"{block}attn.in_proj_weight", (3840, 1280)
        yield f"{block}attn.in_proj_bias", (3840,)
        yield from pair(f"{block}attn.out_proj", (1280, 1280))
        yield from pair(f"{block}mlp.c_fc", (5120, 1280))
        yield from pair(f"{block}mlp.c_proj", (1280, 5120))
        for number in (1, 2):
            yield from norm(f"{block}ln_{number}", 1280)


def list_tensors() -> list[tuple[str, Shape]]:
    """UNet and text encoders, in the order of their names; the VAE is left out."""
    return sorted([*unet(), *text_encoders()])
