"""Whether two networks are the same bit for bit, whatever the trainer writes them as."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kohaku_wrap.proving.likeness import Difference, compare_networks


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt", ".pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_networks_are_compared_in_every_format_and_type_that_is_saved(
    tmp_path: Path, ending: str, dtype: torch.dtype
) -> None:
    save = save_file if ending == ".safetensors" else torch.save
    files = [tmp_path / f"{name}{ending}" for name in ("one", "same", "other", "longer")]
    for path, tensor in zip(files, ([1, 2], [1, 2], [1, 3], [1, 2, 3]), strict=True):
        save({"scale": torch.tensor(1, dtype=dtype), "weight": torch.tensor(tensor, dtype=dtype)}, path)
    assert compare_networks(files[0], files[1]) == 2
    plain = tmp_path / "plain.safetensors"
    save_file({"scale": torch.tensor(1, dtype=dtype), "weight": torch.tensor([1, 2], dtype=dtype)}, plain)
    assert compare_networks(files[0], plain) == 2, "the census compares one format with the other"
    for path in files[2:]:
        with pytest.raises(Difference, match="1 of 2 tensors differ, the first weight"):
            compare_networks(files[0], path)
