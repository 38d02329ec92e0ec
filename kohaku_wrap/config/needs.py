"""Options that do nothing, or fail, without another beside them; the table of fates names these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kohaku_wrap.config.code_names import find_known, load_signatures
from kohaku_wrap.config.effective import Effective, Faults
from kohaku_wrap.config.fates import Fate, fate_of_key
from kohaku_wrap.config.schema import NETWORK_FILES
from kohaku_wrap.files import describe_absence

OWN_DATA = "kwrap.data"
"""What kwrap's data cannot do is refused, whichever layer chose it."""

TRACKERS = ("tensorboard", "wandb", "trackio")
"""What `log_with` names; `all` means the first two, as in sd-scripts."""

LAYERS = ("run", "base", "template", "dataset", "site", "--set")

DISTRIBUTIONS = {"lion_pytorch": "lion-pytorch"}
"""What to install for a package whose name differs."""


def find_lacks(effective: Effective) -> Faults:
    """Options whose partners are missing, networks that are not there, packages not installed."""
    for key in effective.entries:
        if not is_idle(key) and (what := find_lack(effective, key)):
            yield key, what
    yield from find_absent_inputs(effective)
    yield from find_absent_packages(effective)


def is_idle(key: str) -> bool:
    """Whether a key without what it needs is only noted."""
    fate = fate_of_key(key)
    return fate is not None and fate.idle


def describe_idle(effective: Effective) -> list[str]:
    """Notes on options that do nothing as things stand."""
    lacks = {key: find_lack(effective, key) for key in effective.entries if is_idle(key)}
    return [f"{key} {what}." for key, what in lacks.items() if what]


def find_lack(effective: Effective, key: str) -> str:
    """What a key lacks to do anything, in words; empty where it lacks nothing.

    A later layer that takes the partner away means to switch the option off: it is no fault then.
    """
    fate = fate_of_key(key)
    value = effective.get(key)
    if fate is None or not does_something(fate, value) or value == effective.defaults.get(key):
        return ""
    inside = effective.table.dataset_options
    ways = [
        {f"dataset_options.{key}" if key in inside else key: each for key, each in way.items()} for way in fate.ways()
    ]
    lacking = list_lacking(ways, effective.get)
    if all(name != OWN_DATA and rank(effective, name) > rank(effective, key) for name, _ in lacking):
        return ""
    if lacking[0][0] == OWN_DATA:
        return 'works only with data = "sd-scripts" in [kwrap]'
    return say_lacking(lacking)


def does_something(fate: Fate, value: Any) -> bool:
    """Whether a value is other than what stands for "off"; for some options that is true."""
    return bool(value) or (fate.other is False and value is False)


def list_lacking(ways: Iterable[Mapping[str, Any]], look: Callable[[str], Any]) -> list[tuple[str, Any]]:
    """Partners and their values that are missing; empty where one of the ways holds, or there is none."""
    ways = list(ways)
    if any(all(holds(look(name), wanted) for name, wanted in way.items()) for way in ways):
        return []
    return [(name, wanted) for way in ways for name, wanted in way.items() if not holds(look(name), wanted)]


def say_lacking(lacking: Iterable[tuple[str, Any]]) -> str:
    """Missing partners in words."""
    return f"does nothing without {' or '.join(say(name.removeprefix('map.'), wanted) for name, wanted in lacking)}"


def holds(value: Any, wanted: Any) -> bool:
    """Whether a partner's value will do: one of a list, or anything that is set."""
    return value in wanted if isinstance(wanted, list) else bool(value)


def say(name: str, wanted: Any) -> str:
    """A partner in words."""
    options = [item for item in wanted if isinstance(item, str)] if isinstance(wanted, list) else []
    return f"{name} = {', '.join(options)}" if options else name


def rank(effective: Effective, key: str) -> tuple[int, int]:
    """How late a key was decided; before all layers for a default."""
    entry = effective.entries.get(key)
    if entry is None:
        return (-1, 0)
    names = [path.name for path in effective.files]
    file = Path(entry.file).name
    return (LAYERS.index(entry.layer), names.index(file) if file in names else 0)


def find_absent_inputs(effective: Effective) -> Faults:
    """Networks to begin with that are not there."""
    for key in NETWORK_FILES:
        value = effective.get(key) or []
        for name in value if isinstance(value, list) else [value]:
            if not (path := Path(name).expanduser()).is_file():
                yield key, f"{name}: {describe_absence(path)}"


def find_absent_packages(effective: Effective) -> Faults:
    """An optimizer that cannot be resumed, and packages that are not installed on a machine that could train."""
    chosen = str(effective.get("optimizer_type") or "AdamW")
    if chosen.lower().endswith("schedulefree"):
        yield (
            "optimizer_type",
            f"{chosen} has no schedule that kwrap could follow and resume: choose an optimizer with one",
        )
        return
    if find_spec("torch") is None:
        return
    recorded: Mapping[str, Any] = load_signatures().get(chosen.lower(), {})
    path = str(recorded.get("class") or find_known("optimizer_type", chosen) or "torch")
    wanted = [("optimizer_type", chosen, path.partition(".")[0])]
    # Beside sdpa it is refused anyway.
    wanted += [("xformers", "xformers", "xformers")] if effective.get("xformers") and not effective.get("sdpa") else []
    chosen_by = "log_with" if effective.get("log_with") else "logging_dir"
    options = {key: effective.get(key) for key in ("log_with", "logging_dir")}
    wanted += [(chosen_by, name, name) for name in list_trackers(options)]
    for key, name, package in wanted:
        if find_spec(package) is None:
            install = f"pip install {DISTRIBUTIONS.get(package, package)}"
            yield key, f"{name} needs the package {package}, which is not installed: {install}"


def list_trackers(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The tools that metrics are logged to; TensorBoard where only a folder is named, as in sd-scripts."""
    named = options.get("log_with") or ("tensorboard" if options.get("logging_dir") else "")
    return TRACKERS[:2] if named == "all" else tuple(name for name in TRACKERS if name == named)
