"""The LyCORIS side of a template: arguments that it would drop in silence, and presets that it would not read."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

from kohaku_wrap.config.effective import Effective, Faults
from kohaku_wrap.config.fates import Fate, fate_of, rows_of
from kohaku_wrap.config.needs import does_something, list_lacking, rank, say_lacking
from kohaku_wrap.formats.network_names import KOHYA_LORA, LYCORIS
from kohaku_wrap.formats.sdxl import SDXL_SIZES, UNET_PREFIX, list_tensor_names
from kohaku_wrap.trainer.options import TYPE_WORDS, fits, parse_literal, shorten
from kohaku_wrap.wording import suggest

SHARED_ARGS = (
    "conv_alpha", "conv_dim", "module_dropout", "rank_dropout",
    "loraplus_lr_ratio", "loraplus_text_encoder_lr_ratio", "loraplus_unet_lr_ratio",
)  # fmt: skip
"""What the trainer's own LoRA reads beside the arguments that the table of fates gives it alone."""

ALGORITHMS = ("lora", "locon", "loha", "lokr", "dylora", "glora", "full", "diag-oft", "boft", "ia3", "tlora")

LARGEST_FP16 = 65504


DROPOUTS = ("dropout", "rank_dropout", "module_dropout")


def is_of_kohya(fate: Fate) -> bool:
    """Whether the trainer's own LoRA alone reads an argument."""
    return any(way.get("network_module") == [KOHYA_LORA] for way in fate.ways())


def find_network_faults(effective: Effective) -> Faults:
    """Faults of `[network_args]`, of the network's sizes and of the preset."""
    if effective.get("network_module") == KOHYA_LORA:
        yield from find_kohya_faults(effective)
    elif effective.get("network_module") == LYCORIS:
        yield from find_argument_faults(effective)
        yield from find_large_alphas(effective)
        yield from find_preset_faults(effective)
    if effective.get("dim_from_weights"):
        yield from find_lost_dropouts(effective)


def find_lost_dropouts(effective: Effective) -> Faults:
    """Dropouts beside a network that is made from its file: sizes are in the file, dropouts are not."""
    for key in ("network_dropout", *(f"network_args.{name}" for name in DROPOUTS)):
        if effective.get(key):
            origin = effective.origin("dim_from_weights")
            yield key, f"does nothing beside dim_from_weights ({origin}), which makes the network from its file alone"


def find_kohya_faults(effective: Effective) -> Faults:
    """Arguments that the trainer's own LoRA would not look at."""
    known = [*SHARED_ARGS, *(name for name, fate in rows_of("network_args").items() if is_of_kohya(fate))]
    for name in effective.subtable("network_args"):
        key = f"network_args.{name}"
        # A template that takes another module leaves the arguments of its base's behind.
        is_own = rank(effective, key) >= rank(effective, "network_module")
        if name not in known and fate_of("network_args", name).kind != "refused" and is_own:
            yield key, f"{KOHYA_LORA} ignores it in silence{suggest(name, known)}"


def find_argument_faults(effective: Effective) -> Faults:
    """Arguments that LyCORIS does not know, or whose value it cannot read; the census tries one of the right kind."""
    rows = {name: fate for name, fate in rows_of("network_args").items() if fate.kind != "refused"}
    kinds = {name: type(fate.other).__name__ for name, fate in rows.items() if not is_of_kohya(fate)}
    for name, value in effective.subtable("network_args").items():
        key = f"network_args.{name}"
        if name not in kinds:
            yield key, f"unknown; LyCORIS would ignore it in silence{suggest(name, kinds)}"
        elif not fits(kinds[name], parse_literal(value.lower()) if isinstance(value, str) else value) and not (
            kinds[name] == "str" and isinstance(value, str)
        ):
            yield key, f"{value!r} is not {TYPE_WORDS[kinds[name]]}"
        elif name == "algo" and str(value).lower() not in ALGORITHMS:
            yield key, refuse_algorithm(value)


def refuse_algorithm(value: Any) -> str:
    """What is wrong with an algorithm that there is not."""
    return f"{value!r} is not one of {', '.join(ALGORITHMS)}{suggest(str(value), ALGORITHMS)}"


def find_large_alphas(effective: Effective) -> Faults:
    """Alphas that overflow in the precision of the file."""
    if effective.get("save_precision") != "fp16" and not effective.get("full_fp16"):
        return
    full = f"{LARGEST_FP16}, fp16's largest number; 10000 means the full matrix just as well"
    for key in ("network_alpha", "network_args.conv_alpha"):
        value = effective.get(key)
        if isinstance(value, (int, float)) and value > LARGEST_FP16:
            yield key, f"{value:g} is above {full}"


def find_preset_faults(effective: Effective) -> Faults:
    """Keys of the preset that LyCORIS refuses or drops, and patterns that are none."""
    kinds = {name: type(fate.other) for name, fate in rows_of("preset").items() if not name.startswith("map.")}
    for key, value in effective.preset.items():
        where = f"preset.{key}"
        if key not in kinds:
            yield where, f"unknown preset key{suggest(key, kinds)}"
        elif not isinstance(value, kinds[key]):
            yield where, f"must be {TYPE_WORDS.get(kinds[key].__name__, 'a list')}"
        elif key in ("module_algo_map", "name_algo_map"):
            yield from find_map_faults(effective, where, value)
        yield from find_lone_settings(effective, "preset", {key: value}, {})
    if not effective.preset.get("use_fnmatch"):
        yield from find_bad_patterns(effective.preset)


def find_lone_settings(
    effective: Effective, where: str, settings: Mapping[str, Any], partners: Mapping[str, Any]
) -> Faults:
    """Settings of a preset, or of one of its maps, that do nothing without another that is missing.

    `partners`: what stands for `map.NAME`.
    """
    own = {f"map.{name}": value for name, value in partners.items()}
    own |= {f"preset.{name}": value for name, value in effective.preset.items()}
    prefix = "map." if partners else ""
    for name, value in settings.items():
        fate = fate_of("preset", f"{prefix}{name}")
        lacking = list_lacking(fate.ways(), lambda key: own.get(key, effective.get(key)))
        if lacking and does_something(fate, value):
            yield f"{where}.{name}", say_lacking(lacking)


def find_map_faults(effective: Effective, key: str, table: Any) -> Faults:
    """Faults of `module_algo_map` or `name_algo_map`."""
    known = [name.removeprefix("map.") for name in rows_of("preset") if name.startswith("map.")]
    for target, settings in table.items():
        where = f"{key}.{target}"
        if not isinstance(settings, dict):
            yield where, 'must be a table, such as {algo = "lokr", factor = 4}'
            continue
        for name in settings:
            if name not in known:
                yield f"{where}.{name}", f"unknown{suggest(name, known)}"
            elif (fate := fate_of("preset", f"map.{name}")).kind == "refused":
                yield f"{where}.{name}", fate.reason
        algorithm = settings.get("algo") or effective.get("network_args.algo") or "lora"
        if algorithm not in ALGORITHMS:
            yield f"{where}.algo", refuse_algorithm(algorithm)
        else:
            yield from find_lone_settings(effective, where, settings, {**settings, "algo": algorithm})


def find_bad_patterns(preset: Mapping[str, Any]) -> Faults:
    """Names of the preset that are no regular expressions, or would keep the trainer busy for ever."""
    for key in ("unet_target_name", "text_encoder_target_name", "exclude_name", "name_algo_map"):
        value = preset.get(key, [])
        patterns = map(str, value if isinstance(value, (list, dict)) else [])
        for pattern, fault in find_pattern_faults(patterns):
            yield f"preset.{key}", f"{shorten(repr(pattern))} {fault}"


LIMIT_SECONDS = 1.0
"""Processor time for one pattern on all names; one that fits takes some milliseconds."""


class TooSlow(Exception):
    """A pattern took longer than the limit."""


@contextmanager
def limit_seconds(seconds: float) -> Iterator[None]:
    """Raise TooSlow after so much processor time; outside of the main thread, which alone gets signals, never.

    Python's matcher looks for signals while it backtracks.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@cache
def module_names() -> tuple[str, ...]:
    """The dotted names of a full SDXL's modules as patterns meet them, each with one that just fails to match."""
    tensors = [name for part in list_tensor_names(SDXL_SIZES).values() for name in part]
    modules = dict.fromkeys(name.removeprefix(UNET_PREFIX).rpartition(".")[0] for name in tensors)
    longest = sorted(modules, key=len)[-8:]
    return (*modules, *(f"{name}\n!" for name in longest))


def find_pattern_faults(patterns: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each regular expression that cannot be used, and what is wrong with it; none is tried after one too slow."""
    for pattern in patterns:
        try:
            with limit_seconds(LIMIT_SECONDS):
                compiled = re.compile(pattern)
                for name in module_names():
                    compiled.match(name)
        except TooSlow:
            what = f"takes more than {LIMIT_SECONDS:g} s on SDXL's names: write it without a repeat inside a repeat"
            yield pattern, what
            return
        except (re.error, RecursionError, OverflowError) as error:
            yield pattern, f"is no regular expression: {error}"


def list_preset_factors(preset: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Names or classes of modules with a factor of their own in a LyCORIS preset, which network_args do not reach."""
    tables = (preset.get(name, {}) for name in ("name_algo_map", "module_algo_map"))
    return [
        (pattern, options["factor"])
        for table in tables
        for pattern, options in table.items()
        if isinstance(options, dict) and "factor" in options
    ]


def list_reached(preset: Mapping[str, Any]) -> list[str]:
    """Classes and names that a LyCORIS preset trains and gives no factor of its own."""
    own = {pattern for pattern, _ in list_preset_factors(preset)}
    keys = ("unet_target_module", "unet_target_name", "text_encoder_target_module", "text_encoder_target_name")
    return [name for key in keys for name in preset.get(key, []) if name not in own]
