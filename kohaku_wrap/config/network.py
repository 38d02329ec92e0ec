"""The LyCORIS side of a template: arguments that it would drop in silence, and presets that it would not read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kohaku_wrap.config.effective import Effective
from kohaku_wrap.config.fates import fate_of
from kohaku_wrap.config.needs import does_something, list_lacking, rank, say_lacking
from kohaku_wrap.config.patterns import find_faults
from kohaku_wrap.errors import Problem
from kohaku_wrap.trainer.options import fits, parse_literal, shorten, suggest

LYCORIS = "lycoris.kohya"

KOHYA_LORA = "networks.lora"

KOHYA_LORA_ARGS = (
    "block_alphas",
    "block_dims",
    "block_lr_zero_threshold",
    "conv_alpha",
    "conv_block_alphas",
    "conv_block_dims",
    "conv_dim",
    "down_lr_weight",
    "loraplus_lr_ratio",
    "loraplus_text_encoder_lr_ratio",
    "loraplus_unet_lr_ratio",
    "mid_lr_weight",
    "module_dropout",
    "rank_dropout",
    "up_lr_weight",
)
"""What the trainer's own LoRA reads."""

NETWORK_ARGS: Mapping[str, str] = {
    "algo": "str",
    "block_size": "int",
    "bypass_mode": "bool",
    "constraint": "float",
    "conv_alpha": "float",
    "conv_dim": "int",
    "decompose_both": "bool",
    "dora_wd": "bool",
    "dropout": "float",
    "factor": "int",
    "full_matrix": "bool",
    "loraplus_lr_ratio": "float",
    "loraplus_text_encoder_lr_ratio": "float",
    "loraplus_unet_lr_ratio": "float",
    "module_dropout": "float",
    "rank_dropout": "float",
    "rescaled": "bool",
    "rs_lora": "bool",
    "train_norm": "bool",
    "unbalanced_factorization": "bool",
    "use_scalar": "bool",
    "use_tucker": "bool",
    "wd_on_output": "bool",
}
"""What `create_network` of lycoris-lora 4.1.3 looks at, and the kind of each."""

ALGORITHMS = ("lora", "locon", "loha", "lokr", "dylora", "glora", "full", "diag-oft", "boft", "ia3", "tlora")

PRESET_KEYS: Mapping[str, type] = {
    "enable_conv": bool,
    "exclude_name": list,
    "module_algo_map": dict,
    "name_algo_map": dict,
    "text_encoder_target_module": list,
    "text_encoder_target_name": list,
    "unet_target_module": list,
    "unet_target_name": list,
    "use_fnmatch": bool,
}
"""What a preset of lycoris-lora 4.1.3 may hold for a kohya network."""

MODULE_ARGS = (
    "algo",
    "alpha",
    "block_size",
    "bypass_mode",
    "constraint",
    "decompose_both",
    "dim",
    "dropout",
    "factor",
    "full_matrix",
    "module_dropout",
    "rank_dropout",
    "rescaled",
    "rs_lora",
    "unbalanced_factorization",
    "use_scalar",
    "use_tucker",
    "wd_on_out",
    "wd_on_output",
    "weight_decompose",
)
"""What a preset may say of single classes or names."""

LARGEST_FP16 = 65504
KIND_WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "list": "a list"}


def check_network(effective: Effective) -> list[Problem]:
    """Faults of `[network_args]`, of the network's sizes and of the preset."""
    if effective.get("network_module") == KOHYA_LORA:
        return check_kohya_args(effective)
    if effective.get("network_module") != LYCORIS:
        return []
    return [*check_network_args(effective), *check_alpha(effective), *check_preset(effective)]


def check_kohya_args(effective: Effective) -> list[Problem]:
    """Arguments that the trainer's own LoRA would not look at."""
    return [
        Problem(key, f"{KOHYA_LORA} ignores it in silence{suggest(name, KOHYA_LORA_ARGS)}", effective.origin(key))
        for name in effective.subtable("network_args")
        if name not in KOHYA_LORA_ARGS
        and fate_of("network_args", name).kind != "refused"
        # A template that takes another module leaves the arguments of its base's behind.
        and rank(effective, key := f"network_args.{name}") >= rank(effective, "network_module")
    ]


def check_network_args(effective: Effective) -> list[Problem]:
    """Arguments that LyCORIS does not know, or whose value it cannot read."""
    problems = []
    for name, value in effective.subtable("network_args").items():
        key = f"network_args.{name}"
        layer = effective.origin(key)
        if name not in NETWORK_ARGS:
            what = f"unknown; LyCORIS would ignore it in silence{suggest(name, NETWORK_ARGS)}"
            problems.append(Problem(key, what, layer))
        elif not fits(NETWORK_ARGS[name], parse_literal(value.lower()) if isinstance(value, str) else value) and not (
            NETWORK_ARGS[name] == "str" and isinstance(value, str)
        ):
            problems.append(Problem(key, f"{value!r} is not {KIND_WORDS[NETWORK_ARGS[name]]}", layer))
        elif name == "algo" and str(value).lower() not in ALGORITHMS:
            what = f"{value!r} is not one of {', '.join(ALGORITHMS)}{suggest(str(value), ALGORITHMS)}"
            problems.append(Problem(key, what, layer))
    return problems


def check_alpha(effective: Effective) -> list[Problem]:
    """Alphas that overflow in the precision of the file."""
    if effective.get("save_precision") != "fp16" and not effective.get("full_fp16"):
        return []
    problems = []
    for key in ("network_alpha", "network_args.conv_alpha"):
        value = effective.get(key)
        if isinstance(value, (int, float)) and value > LARGEST_FP16:
            what = f"{value:g} is above {LARGEST_FP16}, fp16's largest number; 10000 means the full matrix just as well"
            problems.append(Problem(key, what, effective.origin(key)))
    return problems


def check_preset(effective: Effective) -> list[Problem]:
    """Keys of the preset that LyCORIS refuses or drops, and patterns that are none."""
    layer = effective.origin("preset")
    problems = []
    for key, value in effective.preset.items():
        where = f"preset.{key}"
        if key not in PRESET_KEYS:
            problems.append(Problem(where, f"unknown preset key{suggest(key, PRESET_KEYS)}", layer))
        elif not isinstance(value, PRESET_KEYS[key]):
            wanted = {bool: "true or false", list: "a list", dict: "a table"}[PRESET_KEYS[key]]
            problems.append(Problem(where, f"must be {wanted}", layer))
        elif key in ("module_algo_map", "name_algo_map") and isinstance(value, dict):
            problems += check_algo_map(effective, key, value)
        problems += check_partners(effective, "preset", {key: value}, {})
    if not effective.preset.get("use_fnmatch"):
        problems += check_patterns(effective.preset, layer)
    return problems


def check_partners(
    effective: Effective, where: str, settings: Mapping[str, Any], partners: Mapping[str, Any]
) -> list[Problem]:
    """Settings of a preset, or of one of its maps, that do nothing without another that is missing.

    `partners`: what stands for `map.NAME`.
    """
    own = {f"map.{name}": value for name, value in partners.items()}
    own |= {f"preset.{name}": value for name, value in effective.preset.items()}

    def look(name: str) -> Any:
        return own.get(name, effective.get(name))

    prefix = "map." if partners else ""
    problems = []
    for name, value in settings.items():
        fate = fate_of("preset", f"{prefix}{name}")
        lacking = list_lacking(fate.ways(), look) if does_something(fate, value) else []
        if lacking:
            problems.append(Problem(f"{where}.{name}", say_lacking(lacking), effective.origin("preset")))
    return problems


def check_algo_map(effective: Effective, key: str, table: Mapping[str, Any]) -> list[Problem]:
    """Faults of `module_algo_map` or `name_algo_map`."""
    layer = effective.origin("preset")
    problems = []
    for target, settings in table.items():
        where = f"preset.{key}.{target}"
        if not isinstance(settings, dict):
            problems.append(Problem(where, 'must be a table, such as {algo = "lokr", factor = 4}', layer))
            continue
        problems += [
            Problem(f"{where}.{name}", f"unknown{suggest(name, MODULE_ARGS)}", layer)
            for name in settings
            if name not in MODULE_ARGS
        ]
        fates = {name: fate_of("preset", f"map.{name}") for name in settings}
        problems += [
            Problem(f"{where}.{name}", fate.reason, layer) for name, fate in fates.items() if fate.kind == "refused"
        ]
        algorithm = settings.get("algo") or effective.get("network_args.algo") or "lora"
        if algorithm not in ALGORITHMS:
            what = f"{algorithm!r} is not one of {', '.join(ALGORITHMS)}{suggest(str(algorithm), ALGORITHMS)}"
            problems.append(Problem(f"{where}.algo", what, layer))
        else:
            problems += check_partners(effective, where, settings, {**settings, "algo": algorithm})
    return problems


def check_patterns(preset: Mapping[str, Any], layer: str) -> list[Problem]:
    """Names of the preset that are no regular expressions, or would keep the trainer busy for ever."""
    problems = []
    for key in ("unet_target_name", "text_encoder_target_name", "exclude_name", "name_algo_map"):
        value = preset.get(key, [])
        patterns = map(str, value if isinstance(value, (list, dict)) else [])
        problems += [
            Problem(f"preset.{key}", f"{shorten(repr(pattern))} {fault}", layer)
            for pattern, fault in find_faults(patterns)
        ]
    return problems
