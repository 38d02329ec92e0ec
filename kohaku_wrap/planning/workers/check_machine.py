"""What only a process with torch can tell of a machine; findings printed as one JSON document.

Reads a request as JSON from stdin. Run as `… check_machine ranks` under accelerate it prints, from the first process,
how many there are and on what they run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("LYCORIS_KERNEL_TUNE", "off")

import torch

from kohaku_wrap.formats.sdxl import TOKENIZER_FOLDERS, TOKENIZERS
from kohaku_wrap.processes import answer

Facts = dict[str, Any]

SMALL_PIXELS = 256


def look_at_torch(_request: Facts) -> Facts:
    """torch's version and the GPUs that it sees."""
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [{"name": device.name, "memory_bytes": device.total_memory} for device in devices],
    }


def step_optimizer(request: Facts) -> Facts:
    """One real step of the template's optimizer, or of Lion8bit; the weights must move and stay finite."""
    import bitsandbytes

    name = request.get("optimizer_type") or "Lion8bit"
    optimizer_class = getattr(bitsandbytes.optim, name, None)
    if optimizer_class is None:
        return {"optimizer": name, "skipped": "not of bitsandbytes"}
    device = "cuda" if torch.cuda.is_available() and request.get("gpus", 0) else "cpu"
    torch.manual_seed(0)
    # 8-bit states begin at 4096 numbers.
    weight = torch.nn.Parameter(torch.randn(64, 128, device=device))
    before = weight.detach().clone()
    optimizer = optimizer_class([weight], lr=1e-2)
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    state = optimizer.state[weight].get("state1")
    moved = (weight.detach() - before).abs()
    return {
        "optimizer": name,
        "device": device,
        "version": bitsandbytes.__version__,
        "state_dtype": str(getattr(state, "dtype", None)),
        "moved_share": float((moved > 0).float().mean()),
        "finite": bool(torch.isfinite(weight).all()),
    }


def look_at_attention(request: Facts) -> Facts:
    """Whether the attention back end that the template asks for is there."""
    wanted = request.get("attention") or "sdpa"
    if wanted == "xformers":
        importlib.import_module("xformers.ops")
        return {"attention": wanted, "version": importlib.metadata.version("xformers")}
    query = torch.randn(1, 1, 8, 8)
    torch.nn.functional.scaled_dot_product_attention(query, query, query)
    return {"attention": "sdpa"}


def look_at_lycoris(_request: Facts) -> Facts:
    """LyCORIS' version and the kernel back end that it would choose."""
    importlib.import_module("lycoris")
    return {
        "version": importlib.metadata.version("lycoris-lora"),
        "backend": os.environ.get("LYCORIS_KERNEL_BACKEND", "chosen by LyCORIS"),
    }


def load_tokenizers(request: Facts) -> Facts:
    """Both tokenizers without the network, from the site's folder or the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from transformers import CLIPTokenizer

    folder = request.get("tokenizers")
    for name, below in zip(TOKENIZERS, TOKENIZER_FOLDERS, strict=True):
        source = str(Path(folder) / below) if folder else name
        # Without it transformers would try the one format after the other and name a package that the last one needs.
        vocabulary = Path(source, "vocab.json") if folder else try_to_load_from_cache(name, "vocab.json")
        if not isinstance(vocabulary, str | Path) or not Path(vocabulary).is_file():
            return {"error": f"{source} is not there" if folder else f"{name} is not in the hub's cache"}
        CLIPTokenizer.from_pretrained(source, local_files_only=True)("1girl, solo")
    return {"folder": folder or "the hub's cache"}


def encode_with_vae(request: Facts) -> Facts:
    """One small image through the VAE in the precision of the training."""
    from kohaku_wrap.files import open_regular
    from kohaku_wrap.planning.workers.module_filling import load_vae

    path = Path(request["vae"] or request["base_model"])
    open_regular(path).close()
    vae = load_vae(Path(request["base_model"]), path)
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = torch.float32 if request.get("no_half_vae") else dtypes.get(str(request["mixed_precision"]), torch.float32)
    device = "cuda" if torch.cuda.is_available() and request.get("gpus", 0) else "cpu"
    vae.to(device, dtype)
    torch.manual_seed(0)
    image = torch.rand(1, 3, SMALL_PIXELS, SMALL_PIXELS, device=device, dtype=dtype) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(image).latent_dist.mean
    return {
        "precision": str(dtype).removeprefix("torch."),
        "device": device,
        "finite": bool(torch.isfinite(latents).all()),
    }


CHECKS: dict[str, Callable[[Facts], Facts]] = {
    "torch": look_at_torch,
    "optimizer": step_optimizer,
    "attention": look_at_attention,
    "lycoris": look_at_lycoris,
    "tokenizers": load_tokenizers,
    "vae": encode_with_vae,
}


def run_check(name: str, request: Facts) -> Facts:
    """The facts of one check; a failure of any kind is itself the fact."""
    try:
        return CHECKS[name](request)
    # Whatever a package raises: the examination goes on.
    except Exception as error:
        text = str(error).strip().splitlines()
        return {"error": f"{type(error).__name__}: {text[0] if text else ''}"}


def count_ranks() -> Facts:
    """How many processes accelerate made, and what the first one runs on."""
    from accelerate import Accelerator

    # On the CPU accelerate joins processes only where it is told so, as the engines do.
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    ranks = accelerator.gather(torch.tensor([accelerator.process_index], device=accelerator.device))
    # A process that ends while gloo's threads still run is aborted now and then; the other must have its answer first.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return {
        "processes": accelerator.num_processes,
        "ranks": sorted(int(rank) for rank in ranks),
        "device": accelerator.device.type,
        "mixed_precision": accelerator.mixed_precision,
        "is_main": accelerator.is_main_process,
    }


def run_checks() -> Facts:
    """The facts of every check of the request on stdin."""
    request = json.load(sys.stdin)
    return {name: run_check(name, request) for name in request["checks"]}


def main() -> None:
    if sys.argv[1:] != ["ranks"]:
        answer(run_checks)
        return
    with contextlib.redirect_stdout(sys.stderr):
        facts = count_ranks()
    if facts.pop("is_main"):
        print(json.dumps(facts))


if __name__ == "__main__":
    main()
