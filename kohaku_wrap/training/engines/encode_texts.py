"""Encodes captions by one rule, each by itself, into records of cached outputs of the text encoders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from kohaku_wrap.formats.sdxl import TEXT_ENCODER_2_PREFIX, TEXT_ENCODER_PREFIX
from kohaku_wrap.training.data.columns import ColumnsDataset
from kohaku_wrap.training.data.latent_shards import Latents
from kohaku_wrap.training.data.text_store import TextRule
from kohaku_wrap.training.data.tokens import CaptionTokenizer
from kohaku_wrap.training.engines.builtin.models import load_text_encoders
from kohaku_wrap.training.engines.builtin.texts import encode_tokens

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class CaptionEncoder:
    """Encodes the captions of a dataset that never change."""

    def __init__(
        self, rule: TextRule, dataset: ColumnsDataset, device: torch.device, base_model: Path, tokenizers: Path
    ) -> None:
        self.rule, self.dataset, self.device = rule, dataset, device
        length = rule.outputs[0] - 2
        self.tokenize = CaptionTokenizer.load(tokenizers, length if length > 75 else None)
        with safe_open(base_model, "pt") as opened:
            own = (TEXT_ENCODER_PREFIX, TEXT_ENCODER_2_PREFIX)
            names = [name for name in list(opened.keys()) if name.startswith(own)]
            tensors = {name: opened.get_tensor(name) for name in names}
        encoders = load_text_encoders(base_model, tensors)
        self.encoders = [each.to(device, TYPES[rule.computed_in]) for each in encoders]

    @torch.no_grad()
    def encode(self, rows: list[int]) -> Iterator[Latents]:
        """(1, 1, 1, numbers) float32 of each row, as a training with this precision computes and reads them."""
        dtype = TYPES[self.rule.precision]
        for row in rows:
            ids = [each.unsqueeze(0) for each in self.tokenize(self.dataset.draw_item(row, 0).caption)]
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                outputs = encode_tokens(self.encoders, ids, self.device, self.tokenize.end_token_id)
            # The UNet reads this type, whatever autocast made of them.
            flat = torch.cat([each.to(dtype).flatten() for each in outputs]).float().cpu()
            record: Latents = flat.reshape(1, 1, 1, -1).numpy()
            yield record
