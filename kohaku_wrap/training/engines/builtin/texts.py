"""Outputs of SDXL's text encoders for tokenised captions, as sd-scripts reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

FIRST_ENCODER_LAYER = 11
"""The hidden states of text encoder 1 that SDXL reads: after eleven of its twelve layers."""


def encode_tokens(
    encoders: Sequence[Any], input_ids_list: Sequence[torch.Tensor], device: torch.device, end_token_id: int
) -> list[torch.Tensor]:
    """(n, tokens, width) hidden states of both encoders and (n, width) pooled state.

    `input_ids_list`: for each encoder (n, chunks, 77). Chunks are encoded apart and joined with one start and
    one end token.
    """
    first, second = encoders
    ids = [each.to(device) for each in input_ids_list]
    images, chunks = ids[0].shape[:2]
    flat = [each.reshape(images * chunks, -1) for each in ids]
    states1 = first(flat[0], output_hidden_states=True).hidden_states[FIRST_ENCODER_LAYER]
    output = second(flat[1], output_hidden_states=True)
    states2 = output.hidden_states[-2]
    # The first end token, by its id: transformers would take the highest id, which added tokens may have.
    ends = (flat[1] == end_token_id).int().argmax(dim=1)
    last = output.last_hidden_state
    pooled = last[torch.arange(len(last), device=last.device), ends]
    projection = second.text_projection
    pooled = projection(pooled.to(projection.weight.dtype)).to(last.dtype)
    joined = [join_chunks(states.reshape(images, chunks, *states.shape[1:])) for states in (states1, states2)]
    return [*joined, pooled[::chunks]]


def join_chunks(states: torch.Tensor) -> torch.Tensor:
    """(n, chunks, 77, width) to (n, 75 * chunks + 2, width): the first start, every middle, the last end."""
    if states.shape[1] == 1:
        return states[:, 0]
    return torch.cat([states[:, 0, :1], states[:, :, 1:-1].flatten(1, 2), states[:, -1, -1:]], dim=1)
