"""A network that a training begins from: checked against the template's own before anything is launched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kohaku_wrap.config.base_model import require_safetensors
from kohaku_wrap.config.effective import Effective
from kohaku_wrap.errors import KwrapError, Problem, ProblemsFound, refusing
from kohaku_wrap.formats.network_names import KOHYA_LORA, LYCORIS
from kohaku_wrap.formats.safetensors import read_header
from kohaku_wrap.planning.module_counts import WORKER_SETTINGS, WORKER_TIMEOUT_SECONDS, describe_request
from kohaku_wrap.processes import NoAnswer, ask_python
from kohaku_wrap.trainer.installed import find_trainer

NAMES_SHOWN = 6

FAULTS = {
    "extra": "modules of the file that the template does not train",
    "missing": "modules that the template trains and the file lacks",
    "unlike": "modules of another form",
}
"""What the worker lists, in words."""


class NotChecked(KwrapError):
    """The network could not be compared with the template's."""


def fit_parent(effective: Effective, out: Path) -> bool:
    """Check `network_weights` against the template's network; whether it was written to `out`, under its names.

    That is done for networks with other tools' names. Raises ProblemsFound with the modules that do not fit,
    NotChecked, and what `require_safetensors` raises.
    """
    path = Path(str(effective.get("network_weights")))
    header = require_safetensors(path)
    module = effective.get("network_module")
    checkout = find_trainer() if module == KOHYA_LORA else None
    if module != LYCORIS and not checkout:
        # Only its own code can say what its modules are.
        return False
    by_file = bool(effective.get("dim_from_weights"))
    base_model = effective.site.paths.base_model if effective.site else None
    request = describe_request(effective, checkout) | {
        "network": str(path.absolute()),
        "checkpoint_keys": list(read_header(base_model).tensors) if base_model else [],
        "unet": not effective.get("network_train_text_encoder_only"),
        "text_encoders": not effective.get("network_train_unet_only"),
        "from_weights": by_file,
        "out": str(out),
    }
    advice = "Run `kwrap doctor`; the comparison needs the packages of kohaku-wrap[train]."
    with refusing(NotChecked, f"{path}: could not be compared with the template's network:", advice, NoAnswer):
        found: dict[str, Any] = ask_python(
            "kohaku_wrap.planning.workers.fit_network",
            request=request,
            added=WORKER_SETTINGS,
            timeout_seconds=WORKER_TIMEOUT_SECONDS,
        )
    problems = list(list_faults(found))
    if problems:
        made = describe_made(header.metadata)
        raise ProblemsFound(
            f"{path}: does not fit the network of template {effective.name}",
            problems,
            f"Train with the options that the network was made with{made}, or with dim_from_weights = true, which "
            "takes its modules as they are.",
        )
    return bool(found["renamed"])


def list_faults(found: Mapping[str, Any]) -> Iterator[Problem]:
    """One problem a kind, with the first names."""
    for kind, what in FAULTS.items():
        names = found[kind]
        if names:
            more = f", … ({len(names) - NAMES_SHOWN:,} more)" if len(names) > NAMES_SHOWN else ""
            yield Problem(kind, f"{len(names):,} {what}: {', '.join(names[:NAMES_SHOWN])}{more}")


def describe_made(metadata: Mapping[str, str]) -> str:
    """The options that a file says it was made with, in brackets; empty where it does not say."""
    told = [
        f"{option} = {metadata[key]}"
        for key, option in (
            ("ss_network_module", "network_module"),
            ("ss_network_dim", "network_dim"),
            ("ss_network_alpha", "network_alpha"),
            ("ss_network_args", "network_args"),
        )
        if metadata.get(key)
    ]
    return f" ({', '.join(told)})" if told else ""
