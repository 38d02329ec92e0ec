"""Captions as token ids in chunks of 77, the way sd-scripts feeds both SDXL text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.formats.sdxl import CHUNK_TOKENS, TOKENIZER_FOLDERS


class TokenizerMissing(KwrapError):
    """A tokenizer folder that training would need is not there."""


def tokenizer_folders(folder: Path) -> list[Path]:
    """Where sd-scripts looks for both tokenizers below its `tokenizer_cache_dir`.

    Raises TokenizerMissing, since a run must not depend on a download at its start.
    """
    folders = [folder / name for name in TOKENIZER_FOLDERS]
    if missing := [str(path) for path in folders if not path.is_dir()]:
        raise TokenizerMissing(
            f"no tokenizer at {', '.join(missing)}", "Set `tokenizers` in site.toml to the folder that holds both."
        )
    return folders


@dataclass(frozen=True)
class CaptionTokenizer:
    """Turns a caption into the ids of both text encoders."""

    tokenizers: tuple[Any, Any]
    """transformers' CLIPTokenizer for each text encoder."""

    max_token_length: int | None
    """75, 150 or 225 tokens of text; None is one chunk of 75."""

    @classmethod
    def load(cls, folder: Path, max_token_length: int | None) -> CaptionTokenizer:
        """Both tokenizers from `folder` (sd-scripts' `tokenizer_cache_dir`), never from the network."""
        return cls.of_folders(tokenizer_folders(folder), max_token_length)

    @classmethod
    def of_folders(cls, folders: Sequence[Path], max_token_length: int | None) -> CaptionTokenizer:
        """The tokenizers of these two folders."""
        from transformers import CLIPTokenizer

        first, second = (CLIPTokenizer.from_pretrained(str(path), local_files_only=True) for path in folders)
        # OpenCLIP pads with 0, the hub's tokenizer with the end token.
        second.pad_token_id = 0
        return cls((first, second), max_token_length)

    @property
    def end_token_id(self) -> int:
        """The id that ends a text for the second encoder, whose state is the pooled embedding."""
        return int(self.tokenizers[1].eos_token_id)

    def __call__(self, caption: str) -> list[torch.Tensor]:
        """For each encoder (chunks, 77) int64; one chunk for 75 tokens, three for 225."""
        return [self.tokenize(tokenizer, caption) for tokenizer in self.tokenizers]

    def tokenize(self, tokenizer: Any, caption: str) -> torch.Tensor:
        length = CHUNK_TOKENS if self.max_token_length is None else self.max_token_length + 2
        ids = tokenizer(
            caption, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        if length <= CHUNK_TOKENS:
            return torch.as_tensor(ids)
        row = ids[0]
        begin, end, pad = row[:1], tokenizer.eos_token_id, tokenizer.pad_token_id
        chunks = []
        for start in range(1, length - CHUNK_TOKENS + 2, CHUNK_TOKENS - 2):
            chunk = torch.cat([begin, row[start : start + CHUNK_TOKENS - 2], row[-1:]])
            if pad != end:
                # A full chunk ends with the end token; a chunk of padding alone begins with it.
                if chunk[-2] not in (end, pad):
                    chunk[-1] = end
                if chunk[1] == pad:
                    chunk[1] = end
            chunks.append(chunk)
        return torch.stack(chunks)
