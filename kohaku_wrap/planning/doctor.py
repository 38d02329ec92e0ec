"""Whether this machine can run a training: each finding says what, why it matters and what to do."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from kohaku_wrap.config.effective import Effective
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import describe_absence
from kohaku_wrap.planning.doctor_torch import Finding, find_torch_faults
from kohaku_wrap.planning.sizes import MIB, machine_memory_bytes, total_of
from kohaku_wrap.planning.training_plan import TrainingPlan, find_builtin_faults
from kohaku_wrap.trainer.checkout import report_trainer, require_transformers
from kohaku_wrap.trainer.installed import CHECKOUT_VARIABLE, find_trainer
from kohaku_wrap.trainer.requirements import SETS, TESTED, find_set, find_version, packages_of
from kohaku_wrap.wording import show_bytes

TESTED_TOGETHER = ("accelerate", "transformers", "diffusers", "huggingface-hub")
TESTED_SETS = (
    *({name: packages_of(each)[name].version for name in TESTED_TOGETHER} for each in SETS),
    {"accelerate": "1.6.0", "transformers": "4.54.1", "diffusers": "0.32.1", "huggingface-hub": "0.34.3"},
)
"""Versions that were trained with; the first are what `make setup` installs, the last are upstream's own."""

TESTED_ALONE = {name: TESTED[name].version for name in ("torch", "lycoris-lora", "bitsandbytes")}
WRONG_BITSANDBYTES = ("0.36.0", "0.41.0")
"""First and last release whose 8-bit optimizers are wrong."""

NEWEST_PYTHON = (3, 13)
OPEN_FILES_NEEDED = 4096
SLOW_BYTES_PER_SECOND = 50 * MIB
WRITE_TEST_BYTES = 64 * MIB
OTHER_ENGINE = 'Change these, or use engine = "sd-scripts".'
REFUSED = "This engine refuses what it does not do, so that nothing is left out in silence."
EARLIEST_CLOCK = 1_735_689_600
"""1 January 2025 in Unix seconds: before every release that kwrap needs."""

CLOCK_DRIFT_SECONDS = 5


def examine_machine(
    engine: str | None, effective: Effective | None = None, plan: TrainingPlan | None = None
) -> Iterator[Finding]:
    """All findings, one after another. `engine` None: both are looked at, and a missing sd-scripts is no fault."""
    yield examine_python()
    yield from examine_versions()
    yield examine_judges()
    if engine != "builtin":
        yield examine_trainer(required=engine is not None)
    if engine == "builtin" and effective and effective.batch:
        yield from examine_builtin_options(effective)
    yield from find_torch_faults(effective)
    yield from examine_files(effective, plan)
    yield examine_open_files(effective)
    yield examine_clock(effective)


def examine_python() -> Finding:
    version = ".".join(str(part) for part in sys.version_info[:3])
    if parse_release(version)[:2] <= NEWEST_PYTHON:
        return Finding.ok("Python", version)
    return Finding.warning(
        "Python",
        f"{version} is newer than {NEWEST_PYTHON[0]}.{NEWEST_PYTHON[1]}",
        "Some of the trainer's packages may not be there for it.",
        "Run `make setup PYTHON=python3.11`.",
    )


def parse_release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (0, 41, 0) for 0.41.0.post2."""
    numbers = [int(part) for part in re.split(r"[^0-9.]", version)[0].split(".") if part]
    return tuple([*numbers, 0, 0, 0][:3])


def examine_versions() -> Iterator[Finding]:
    """Packages against the tested sets, and releases that are known to be wrong."""
    found = {name: find_version(name) for name in (*TESTED_SETS[0], *TESTED_ALONE)}
    yield examine_bitsandbytes(found["bitsandbytes"])
    missing = [name for name, version in found.items() if not version]
    if missing:
        yield Finding.broken(
            "packages",
            f"missing: {', '.join(missing)}",
            "Training needs them.",
            "Install them with: pip install 'kohaku-wrap[train]'",
        )
        return
    tested = any(all(found[name] == version for name, version in each.items()) for each in TESTED_SETS)
    alone = [f"{name} {found[name]}" for name, version in TESTED_ALONE.items() if found[name] != version]
    shown = ", ".join(f"{name} {version}" for name, version in found.items())
    if tested and not alone:
        yield Finding.ok("packages", f"{shown}: a tested set")
    else:
        here = find_set()
        wanted = ", ".join(f"{name} {packages_of(here)[name].version}" for name in found)
        yield Finding.warning(
            "packages",
            f"{shown}: not a set that was tested together",
            "Other versions fail at import, or change the last bits of a run.",
            f"Use {wanted}: `make setup{here and f' SET={here}'}` installs them.",
        )


def examine_bitsandbytes(version: str) -> Finding:
    """The releases whose 8-bit optimizers are wrong."""
    first, last = WRONG_BITSANDBYTES
    if version and parse_release(first) <= parse_release(version) <= parse_release(last):
        return Finding.broken(
            "bitsandbytes",
            f"{version} is one of {first} to {last}",
            "The 8-bit optimizers of these releases are wrong: training runs and the weights are bad.",
            f"Install another one: pip install {TESTED['bitsandbytes'].pinned}",
        )
    return Finding.ok("bitsandbytes", version or "not installed")


def examine_judges() -> Finding:
    """Which onnxruntime `kwrap evaluate` looks at pictures with."""
    found = {name: version for name in ("onnxruntime", "onnxruntime-gpu") if (version := find_version(name))}
    if len(found) > 1:
        return Finding.warning(
            "onnxruntime",
            " and ".join(f"{name} {version}" for name, version in found.items()),
            "They are one package under two names: the one installed last is active.",
            "Keep one: pip uninstall onnxruntime onnxruntime-gpu, then install it again.",
        )
    shown = " ".join(*found.items()) if found else "not installed; only `kwrap evaluate ccip` and `judge` need it"
    return Finding.ok("onnxruntime", shown)


def examine_trainer(*, required: bool) -> Finding:
    """The checkout, its commit, its anchors and the packages that it imports."""
    status = "broken" if required else "warning"
    if find_trainer() is None and not os.environ.get(CHECKOUT_VARIABLE):
        install = "Run `kwrap trainer install`, or train with --engine builtin."
        return Finding("sd-scripts", status, "not installed", "The engine sd-scripts is this checkout.", install)
    try:
        report = report_trainer()
        require_transformers(report.checkout)
    except KwrapError as fault:
        return Finding("sd-scripts", status, fault.message, "The engine sd-scripts is this checkout.", fault.next_step)
    checkout = report.checkout
    wrong_anchors = [match for match in report.anchors if match.count != 1]
    missing = [state.requirement.distribution for state in report.requirements if state.is_missing]
    if not checkout.is_supported or wrong_anchors:
        return Finding(
            "sd-scripts",
            status,
            f"{checkout.name} in {checkout.path} is not a supported commit as released",
            "kwrap corrects the training loop at places that must be exactly as known, or a resume is wrong.",
            "Run `kwrap trainer install`.",
        )
    if missing:
        return Finding(
            "sd-scripts",
            status,
            f"{checkout.name}; it imports packages that are missing: {', '.join(missing)}",
            "The trainer fails at its start without them.",
            "Run `kwrap trainer install`, which puts them beside the checkout.",
        )
    return Finding.ok("sd-scripts", f"{checkout.name} in {checkout.path}")


def examine_builtin_options(effective: Effective) -> Iterator[Finding]:
    """Whether the builtin engine has the template's options on this site."""
    for fault in (faults := find_builtin_faults(effective)):
        yield Finding.broken("builtin engine", f"{fault.where}: {fault.what}", REFUSED, OTHER_ENGINE)
    if not faults:
        yield Finding.ok("builtin engine", f"has every option of {effective.name}")


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    while not path.is_dir():
        path = path.parent
    return path


def examine_files(effective: Effective | None, plan: TrainingPlan | None) -> Iterator[Finding]:
    """The site's files, its disk and its memory against the plan."""
    site = effective.site if effective else None
    folder = nearest_folder(site.paths.runs if site else Path.cwd())
    free = shutil.disk_usage(folder).free
    yield from examine_memory(plan)
    needed = total_of(plan.sizes.disk) if plan and plan.sizes else None
    if needed is not None and needed > free:
        yield Finding.broken(
            "free disk",
            f"{show_bytes(free)} in {folder}, {show_bytes(needed)} needed over the run",
            "A full disk ends the run at a save.",
            "Free some space, set paths.runs elsewhere in site.toml, or lower [states] keep.",
        )
    else:
        yield Finding.ok(
            "free disk", f"{show_bytes(free)} in {folder}" + (f", {show_bytes(needed)} needed" if needed else "")
        )
    yield examine_write_speed(folder, plan)
    if site and not site.paths.base_model.is_file():
        yield Finding.broken(
            "base model",
            f"{site.paths.base_model}: {describe_absence(site.paths.base_model)}",
            "Training starts from it.",
            f"Fix paths.base_model in {site.path}.",
        )


def examine_memory(plan: TrainingPlan | None) -> Iterator[Finding]:
    there = machine_memory_bytes()
    if plan is None or plan.sizes is None:
        yield Finding.ok("host memory", show_bytes(there))
        return
    needed = total_of(plan.sizes.host_memory)
    if needed > there:
        yield Finding.broken(
            "host memory",
            f"{show_bytes(there)}, {show_bytes(needed)} needed",
            "The kernel kills a process when memory runs out, often hours after the start.",
            'Set fewer workers in site.toml, or data = "kwrap" in the template.',
        )
    else:
        yield Finding.ok("host memory", f"{show_bytes(there)}, {show_bytes(needed)} needed")


def examine_write_speed(folder: Path, plan: TrainingPlan | None) -> Finding:
    """Write and sync a file where states will lie."""
    block = os.urandom(4 * MIB)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".kwrap-doctor-") as stream:
            started = time.monotonic()
            for _ in range(WRITE_TEST_BYTES // len(block)):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
            speed = WRITE_TEST_BYTES / max(time.monotonic() - started, 1e-6)
    except OSError as error:
        return Finding.broken(
            "state folder", f"{folder}: {error.strerror}", "States are written there.", "Fix paths.runs."
        )
    state = plan.sizes.state_bytes if plan and plan.sizes else None
    wait = f"; a state takes about {state / speed:.0f} s" if state else ""
    if speed < SLOW_BYTES_PER_SECOND:
        return Finding.warning(
            "state folder",
            f"{folder} takes {show_bytes(int(speed))} a second{wait}",
            "All processes wait while a state is written.",
            "Set paths.runs to a faster disk, or save less often.",
        )
    return Finding.ok("state folder", f"{folder} takes {show_bytes(int(speed))} a second{wait}")


def examine_open_files(effective: Effective | None) -> Finding:
    """The limit of open files against loader workers and their pipes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    workers = effective.get("max_data_loader_n_workers", 8) if effective else 8
    processes = effective.site.machine.processes if effective and effective.site else 1
    needed = max(256 * (workers + 1), OPEN_FILES_NEEDED if processes > 1 else 1024)
    if soft != resource.RLIM_INFINITY and soft < needed:
        return Finding.warning(
            "open files",
            f"the limit is {soft:,}",
            f"{workers} loader workers pass batches through files; about {needed:,} may be open at once.",
            f"Raise it before training: ulimit -n {needed}"
            if hard == resource.RLIM_INFINITY or hard >= needed
            else f"Have root raise the hard limit of {hard:,}: nofile in limits.conf, or --ulimit of the container.",
        )
    return Finding.ok("open files", f"the limit is {soft:,}")


def examine_clock(effective: Effective | None) -> Finding:
    """The clock against the calendar and against the disk's own."""
    folder = nearest_folder(effective.site.paths.runs if effective and effective.site else Path(tempfile.gettempdir()))
    now = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".kwrap-doctor-") as stream:
            drift = abs(Path(stream.name).stat().st_mtime - time.time())
    except OSError:
        drift = 0.0
    if now < EARLIEST_CLOCK or drift > CLOCK_DRIFT_SECONDS:
        detail = f", {drift:.0f} s from the disk's" if drift > CLOCK_DRIFT_SECONDS else ""
        return Finding.warning(
            "clock",
            f"{shown}{detail}",
            "Times in the ledger and in metrics would mislead; secure downloads fail.",
            "Set the clock, best by NTP.",
        )
    return Finding.ok("clock", shown)
