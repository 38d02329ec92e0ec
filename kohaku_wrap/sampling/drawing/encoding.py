"""Prompts as the UNet takes them: each chunk of 75 tokens through both text encoders, weighted, and set side by side.

Hidden layers and pooled output are those of diffusers' SDXL pipeline; weights act as in the webui (sd_emphasis.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.sampling.chunks import SECOND_PADDING, Tokenizer, cut_chunks, fill_chunk
from kohaku_wrap.sampling.grammar import parse_prompt


@dataclass(frozen=True)
class Encoded:
    """One prompt."""

    states: torch.Tensor
    """(1, chunks × 77, width of both encoders)."""

    pooled: torch.Tensor
    """(1, projection) of the first chunk, by the second encoder."""


@torch.inference_mode()
def encode_prompt(
    text: str, encoders: tuple[Any, Any], tokenizers: tuple[Tokenizer, Tokenizer], clip_skip: int, emphasis: str,
    lenient: bool,
) -> Encoded:  # fmt: skip
    """Encode one prompt, a chunk at a time, so that no other prompt can change a bit of it."""
    prompt = parse_prompt(text, lenient)
    columns, pooled = [], None
    for number, (encoder, tokenizer) in enumerate(zip(encoders, tokenizers, strict=True)):
        device = next(encoder.parameters()).device
        padding = SECOND_PADDING if number else tokenizer.end
        states = []
        for chunk in cut_chunks(prompt, tokenizer):
            tokens, weights = fill_chunk(chunk, tokenizer, padding)
            found = encoder(torch.tensor([tokens], device=device), output_hidden_states=True)
            if number and pooled is None:
                pooled = found.text_embeds
            if clip_skip > len(found.hidden_states):
                raise KwrapError(
                    f"--clip-skip {clip_skip}: a text encoder of this model has {len(found.hidden_states) - 1} layers",
                    "Take a smaller one; 2 is usual.",
                )
            states.append(weigh(found.hidden_states[-clip_skip], torch.tensor(weights, device=device), emphasis))
        columns.append(torch.cat(states, dim=1))
    assert pooled is not None
    longest = max(column.shape[1] for column in columns)
    # Two tokenizers may cut into other numbers of chunks.
    filled = [torch.nn.functional.pad(column, (0, 0, 0, longest - column.shape[1])) for column in columns]
    return Encoded(torch.cat(filled, dim=-1), pooled)


def weigh(states: torch.Tensor, weights: torch.Tensor, emphasis: str) -> torch.Tensor:
    """The states of a chunk under its weights: multiplied, and for `original` the mean restored."""
    if emphasis == "ignore" or bool((weights == 1).all()):
        return states
    weighted = states.float() * weights[None, :, None]
    if emphasis == "original":
        weighted = weighted * (states.float().mean() / weighted.mean())
    return weighted.to(states.dtype)
