"""The findings that need torch, made in a process of its own so that a broken package cannot end the examination."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kohaku_wrap.config.effective import Effective
from kohaku_wrap.config.run_files import ACCELERATE_FILE
from kohaku_wrap.config.trainer_arguments import describe_accelerate, render_yaml
from kohaku_wrap.planning.module_counts import WORKER_SETTINGS
from kohaku_wrap.processes import NoAnswer, accelerate_command, ask_python, safe_environment
from kohaku_wrap.trainer.requirements import TESTED
from kohaku_wrap.wording import show_bytes

WORKER = "kohaku_wrap.planning.workers.check_machine"
WORKER_TIMEOUT_SECONDS = 300
MOVED_SHARE = 0.99
"""A step that leaves more weights where they were did not work."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    """What was looked at."""

    status: str
    """`ok`, `warning`, or `broken`: it would break the run."""

    what: str
    """What was found."""

    why: str = ""
    """Why it matters."""

    do: str = ""
    """What to do."""

    @classmethod
    def ok(cls, name: str, what: str) -> Finding:
        """A finding that needs nothing."""
        return cls(name, "ok", what)

    @classmethod
    def warning(cls, name: str, what: str, why: str, do: str) -> Finding:
        """A finding that a run may live with."""
        return cls(name, "warning", what, why, do)

    @classmethod
    def broken(cls, name: str, what: str, why: str, do: str) -> Finding:
        """A finding that would break the run."""
        return cls(name, "broken", what, why, do)


def find_torch_faults(effective: Effective | None) -> Iterator[Finding]:
    """GPUs, optimizer, attention, LyCORIS, tokenizers, VAE, and accelerate's processes."""
    request = describe_request(effective)
    facts = ask_worker(request)
    if "error" in facts:
        yield Finding.broken(
            "torch",
            str(facts["error"]),
            "Nothing trains without it.",
            "Fix it, or install it anew: pip install 'kohaku-wrap[train]', or `make setup` in a checkout.",
        )
        return
    yield from judge_gpus(facts["torch"], effective)
    yield judge_optimizer(facts["optimizer"])
    yield judge_attention(facts["attention"])
    yield judge_lycoris(facts["lycoris"])
    if "tokenizers" in facts:
        yield judge_tokenizers(facts["tokenizers"])
    if "vae" in facts:
        yield judge_vae(facts["vae"])
    if effective and effective.site:
        yield judge_processes(count_processes(effective), effective)


def describe_request(effective: Effective | None) -> dict[str, Any]:
    """What the worker should look at."""
    site = effective.site if effective else None
    request: dict[str, Any] = {"checks": ["torch", "optimizer", "attention", "lycoris"], "gpus": 1}
    if effective:
        request |= {
            "optimizer_type": effective.get("optimizer_type"),
            "attention": "xformers" if effective.get("xformers") else "sdpa",
            "mixed_precision": effective.get("mixed_precision"),
            "no_half_vae": effective.get("no_half_vae"),
        }
    if site:
        request |= {
            "gpus": site.machine.gpus,
            "tokenizers": str(site.paths.tokenizers) if site.paths.tokenizers else None,
            "base_model": str(site.paths.base_model),
            "vae": str(site.paths.vae) if site.paths.vae else None,
        }
        request["checks"] += ["tokenizers", "vae"] if site.paths.base_model.is_file() else ["tokenizers"]
    return request


def ask_worker(request: dict[str, Any]) -> dict[str, Any]:
    """The worker's facts by check, or `error`."""
    try:
        facts: dict[str, Any] = ask_python(
            WORKER, request=request, added=WORKER_SETTINGS, timeout_seconds=WORKER_TIMEOUT_SECONDS
        )
    except NoAnswer as failed:
        return {"error": failed.message}
    except MemoryError:
        return {"error": "there is not enough memory to load it"}
    return facts


def judge_gpus(facts: dict[str, Any], effective: Effective | None) -> Iterator[Finding]:
    """The GPUs that torch sees against those of the site."""
    seen = facts.get("gpus", [])
    shown = ", ".join(f"{gpu['name']} ({show_bytes(gpu['memory_bytes'])})" for gpu in seen) or "no GPU"
    build = f"CUDA {facts['cuda']}" if facts.get("cuda") else "a CPU build"
    wanted = effective.site.machine.gpus if effective and effective.site else 0
    if wanted > len(seen):
        yield Finding.broken(
            "GPUs",
            f"{shown}; the site says {wanted}; torch {facts['version']} is {build}",
            "Each GPU gets one training process.",
            "Set gpus in site.toml, fix CUDA_VISIBLE_DEVICES, or install a CUDA torch (make setup TORCH_INDEX=…).",
        )
    else:
        yield Finding.ok("GPUs", f"{shown}; torch {facts['version']} is {build}")


def judge_optimizer(facts: dict[str, Any]) -> Finding:
    """Whether the 8-bit optimizer really stepped."""
    if "error" in facts:
        return Finding.broken(
            "optimizer",
            facts["error"],
            "The optimizer of the recipe is bitsandbytes'.",
            f"Install the tested release: pip install {TESTED['bitsandbytes'].pinned}",
        )
    if "skipped" in facts:
        return Finding.ok("optimizer", f"{facts['optimizer']}: {facts['skipped']}, not tried")
    if not facts["finite"] or facts["moved_share"] < MOVED_SHARE:
        return Finding.broken(
            "optimizer",
            f"{facts['optimizer']} of bitsandbytes {facts['version']} moved {facts['moved_share']:.0%} of the weights",
            "Training would run and learn nothing, or worse.",
            f"Install the tested release: pip install {TESTED['bitsandbytes'].pinned}",
        )
    return Finding.ok(
        "optimizer", f"{facts['optimizer']} steps on {facts['device']}, its state is {facts['state_dtype']}"
    )


def judge_attention(facts: dict[str, Any]) -> Finding:
    if "error" in facts:
        return Finding.broken(
            "attention",
            f"the back end that the template asks for is not there: {facts['error']}",
            "The trainer fails at its start.",
            "Write sdpa = true and xformers = false: it computes the same and is part of torch.",
        )
    return Finding.ok("attention", f"{facts['attention']} {facts.get('version', '')}".strip())


def judge_lycoris(facts: dict[str, Any]) -> Finding:
    if "error" in facts:
        install = f"pip install {TESTED['lycoris-lora'].pinned}"
        return Finding.broken("LyCORIS", facts["error"], "The network is made by it.", install)
    return Finding.ok("LyCORIS", f"{facts['version']}; kernel back end {facts['backend']}")


def judge_tokenizers(facts: dict[str, Any]) -> Finding:
    if "error" in facts:
        return Finding.broken(
            "tokenizers",
            facts["error"],
            "Both are loaded at the start; without the hub they must be there already.",
            "Get both by `hf download`, as docs/guide.md says, and set paths.tokenizers in site.toml to their folder.",
        )
    return Finding.ok("tokenizers", f"both load offline from {facts['folder']}")


def judge_vae(facts: dict[str, Any]) -> Finding:
    if "error" in facts or not facts["finite"]:
        return Finding.broken(
            "VAE",
            facts.get("error") or f"gives NaN in {facts['precision']}",
            "The trainer turns NaN latents into zeros with no more than a line in its log.",
            "Set no_half_vae = true, or check the base model's file with `kwrap inspect`.",
        )
    return Finding.ok("VAE", f"encodes in {facts['precision']} on {facts['device']} without NaN")


def count_processes(effective: Effective) -> dict[str, Any]:
    """Start accelerate with the run's own file and ask what came up."""
    site = effective.site
    if site is None:
        return {"error": "no site"}
    machine = site.machine
    here = machine.processes_here
    table = describe_accelerate(here, machine.gpus, str(effective.get("mixed_precision", "no")))
    several = ["--multi_gpu", "--main_process_port", "0"] if here > 1 else []
    several += ["--num_processes", str(here)]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / ACCELERATE_FILE
        config.write_text(render_yaml(table), encoding="utf-8")
        command = [*accelerate_command(), "launch", "--config_file", str(config), *several, "-m", WORKER, "ranks"]
        environment = safe_environment({**WORKER_SETTINGS, **({} if machine.gpus else {"CUDA_VISIBLE_DEVICES": ""})})
        try:
            result = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                env=environment,
                timeout=WORKER_TIMEOUT_SECONDS,
            )
        except (FileNotFoundError, subprocess.TimeoutExpired) as error:
            return {"error": str(error)}
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if result.returncode or not lines:
        return {"error": find_reason(result.stderr)}
    facts: dict[str, Any] = json.loads(lines[-1])
    return facts


def find_reason(stderr: str) -> str:
    """What a process of `accelerate launch` died of: its own error, else its exit code, else that it failed."""
    lines = [line.strip() for line in stderr.splitlines()]
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: *)?[\w.]*Error\b", line)]
    own = [line for line in errors if "ChildFailedError" not in line]
    codes = [line for line in lines if re.match(r"exitcode *:", line)]
    return (own or codes or ["accelerate failed"])[-1]


def judge_processes(facts: dict[str, Any], effective: Effective) -> Finding:
    """Whether accelerate, with the run's own file, reached what the site asks for."""
    machine = effective.site.machine if effective.site else None
    wanted = machine.processes_here if machine else 1
    device = "cuda" if machine and machine.gpus else "cpu"
    precision = effective.get("mixed_precision", "no")
    if "error" in facts:
        found = facts["error"]
    elif facts["processes"] != wanted or facts["device"] != device or facts["mixed_precision"] != precision:
        found = f"processes: {facts['processes']} on {facts['device']}, mixed precision {facts['mixed_precision']}"
    else:
        return Finding.ok(
            "accelerate", f"processes: {wanted} on {device}, mixed precision {precision}, by the run's own file"
        )
    return Finding.broken(
        "accelerate",
        f"{found}; the site and the template ask for {wanted} on {device}, mixed precision {precision}",
        "The effective batch and the precision would be others than planned.",
        "Look at CUDA_VISIBLE_DEVICES and at ACCELERATE_… variables in the environment; set gpus in site.toml.",
    )
