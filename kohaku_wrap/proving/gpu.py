"""What only a machine with GPUs can show, measured in one call: `make gpu`, `kwrap doctor --deep`.

With a GPU: an SDXL of full size with random weights, Epsilon's recipe, fp16 and Lion8bit. Without one the same program
runs on the embedded world's tiny model, and says what it could not measure.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kohaku_wrap.config.kernels import DETERMINISTIC_VARIABLE
from kohaku_wrap.config.layers import resolve_template
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import shipped_folder
from kohaku_wrap.formats.caption_rows import read_folder_sizes
from kohaku_wrap.formats.safetensors import read_header
from kohaku_wrap.outlets import run_as_work
from kohaku_wrap.planning.doctor import TESTED_ALONE
from kohaku_wrap.planning.doctor_torch import ask_worker
from kohaku_wrap.planning.module_counts import ModuleCounts, count_network, count_network_everywhere
from kohaku_wrap.planning.sizes import total_of
from kohaku_wrap.planning.training_plan import plan_training
from kohaku_wrap.proving.gpu_report import Measure, Report, fill_document
from kohaku_wrap.proving.gpu_runs import SCALES, Workplace
from kohaku_wrap.proving.killing import run_kwrap
from kohaku_wrap.proving.likeness import Difference, compare_networks, compare_runs
from kohaku_wrap.proving.step_clock import median_of
from kohaku_wrap.trainer.installed import find_trainer
from kohaku_wrap.trainer.requirements import find_version
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.metrics import read_metrics
from kohaku_wrap.wording import show_bytes

FULL_SIZE_BYTES = 20 * 10**9
"""A GPU with less does not hold Epsilon's recipe; the tiny model is then trained on it."""

OVERHEAD_BAR = 0.02
HIGH_SCALE = 2.0**40
"""A GradScaler that begins there skips its first steps whatever the gradients."""

Measuring = Callable[["Workplace"], Iterator[Measure]]


def measure_counts(place: Workplace) -> Iterator[Measure]:
    """Modules of the full-size preset; needs no GPU."""
    counts = count_network_everywhere(resolve_template("epsilon", None))
    told = [
        f"{each.unet_modules} + {each.text_encoder_modules} modules on the UNet of {each.counted_on}" for each in counts
    ]
    same = len({(each.unet_modules, each.text_encoder_modules, each.parameters) for each in counts}) == 1
    result = f"{'; '.join(told)}; {counts[0].parameters:,} parameters"
    numbers = {each.counted_on: {"modules": each.unet_modules + each.text_encoder_modules} for each in counts}
    yield Measure("modules of full-size SDXL", "ok" if same else "failed", result, "the same on both", numbers)


def measure_network(place: Workplace, run: Run) -> Measure:
    """The modules that were really trained against the plan's."""
    planned: ModuleCounts = count_network(place.effective())
    spots = read_header(run.checkpoints / f"{run.name}.safetensors").tensors
    modules = len({name.split(".")[0] for name in spots})
    wanted = planned.unet_modules + planned.text_encoder_modules
    result = f"{modules} in the checkpoint, {wanted} planned"
    return Measure(
        "modules trained", "ok" if modules == wanted else "failed", result, "as planned", {"modules": modules}
    )


def measure_speed(place: Workplace) -> Iterator[Measure]:
    """Step times with and without kwrap in turn, memory against the plan, and two equal runs bit by bit."""
    has_plain = place.engine == "sd-scripts"
    first, clock = place.train_timed("kwrap-1")
    yield measure_network(place, first)
    plain = [place.train_plain(first, "plain-1")] if has_plain else []
    second, clock_2 = place.train_timed("kwrap-2")
    plain += [place.train_plain(first, "plain-2")] if has_plain else []
    steps = [*clock.step_seconds, *clock_2.step_seconds] or [
        float(line["seconds"]) for run in (first, second) for line in read_metrics(run)[2:]
    ]
    with_kwrap, name = median_of(steps), "seconds a step"
    if has_plain:
        without = median_of([seconds for each in plain for seconds in each.step_seconds])
        overhead = with_kwrap / without - 1
        beyond = not overhead <= OVERHEAD_BAR
        result = f"{with_kwrap:.3f} with kwrap, {without:.3f} without, in turn: {overhead:+.1%}"
        numbers = {"with_kwrap_seconds": with_kwrap, "without_kwrap_seconds": without, "overhead": overhead}
        if overhead != overhead:
            yield Measure(name, "failed", "no step of one of the two was seen", "2 % overhead", numbers)
        elif place.gpus:
            yield Measure(name, "failed" if beyond else "ok", result, "2 % overhead", numbers)
        else:
            yield Measure(name, "ok", f"{result} (a tiny model's steps on a CPU, held to no bar)", "", numbers)
    else:
        numbers = {"with_kwrap_seconds": with_kwrap}
        yield Measure(name, "ok", f"{with_kwrap:.3f} with kwrap's engine builtin", "", numbers)
        yield Measure("overhead over plain sd-scripts", "not measured", "no checkout: kwrap trainer install")
    yield measure_memory(place, max(clock.peak_bytes, clock_2.peak_bytes))
    yield measure_repeat(place, first, second, "default kernels, two equal runs")
    place.forget(second)


def measure_memory(place: Workplace, peak_bytes: int) -> Measure:
    """The peak that was seen against what `kwrap plan` says."""
    sizes = plan_training(place.effective(), read_folder_sizes(place.bench.world / "images")).sizes
    where = "GPU" if place.gpus else "host"
    parts = () if sizes is None else sizes.gpu_memory if place.gpus else sizes.host_memory
    planned = total_of(parts)
    result = f"{show_bytes(peak_bytes)} at the peak, {show_bytes(planned)} planned"
    numbers = {"peak_bytes": peak_bytes, "planned_bytes": planned}
    if not peak_bytes:
        return Measure(f"{where} memory", "failed", "no peak was seen", numbers=numbers)
    beyond = peak_bytes > planned * 1.05
    bar = "no more than planned + 5 %" if place.gpus else ""
    return Measure(f"{where} memory", "failed" if beyond and place.gpus else "ok", result, bar, numbers)


def measure_repeat(place: Workplace, one: Run, other: Run, name: str) -> Measure:
    """Whether two runs made the same network, and how far apart they are otherwise."""
    paths = [run.checkpoints / f"{run.name}.safetensors" for run in (one, other)]
    try:
        tensors = compare_networks(*paths)
    except Difference as found:
        losses = [[float(line["loss"]) for line in read_metrics(run)] for run in (one, other)]
        apart = max(abs(a - b) / max(abs(a), 1e-12) for a, b in zip(*losses, strict=True))
        result = f"not bit-identical: {found.message}; losses at most {apart:.1e} apart"
        # On a GPU that is what the default may lose; on a CPU kernels are always deterministic.
        return Measure(name, "ok" if place.gpus else "failed", result, "", {"identical": False, "losses_apart": apart})
    return Measure(name, "ok", f"bit-identical: {tensors} tensors", "", {"identical": True})


def measure_scaler(place: Workplace) -> Iterator[Measure]:
    """fp16 with steps that the GradScaler skips, then SIGKILL and a resume, under deterministic kernels."""
    site = str((shipped_folder("proofs") / "scaler_site").resolve())
    path = os.pathsep.join(filter(None, (site, os.environ.get("PYTHONPATH"))))
    high = {"PYTHONPATH": path, "KWRAP_PROVE_SCALE": str(HIGH_SCALE), DETERMINISTIC_VARIABLE: "1"}
    whole = place.train("scaler-whole", environment=high)
    killed = place.train("scaler-killed", (place.scale.kill,), environment=high)
    skipped = sum(bool(line.get("optimizer_step_skipped")) for line in read_metrics(whole))
    name = "steps skipped by the scaler, SIGKILL, resume, deterministic kernels"
    numbers: dict[str, Any] = {"skipped_optimizer_steps": skipped}
    try:
        likeness = compare_runs(whole, killed)
    except Difference as found:
        yield Measure(
            name, "failed", f"{skipped} skipped; {found.message}", "bit-identical", numbers | {"identical": False}
        )
        return
    place.forget(killed)
    place.forget(whole)
    told = f"{skipped} skipped; {likeness.describe()}, identical"
    yield Measure(
        name, "ok" if skipped else "failed", told, "skipped, and bit-identical", numbers | {"identical": True}
    )
    if place.gpus:
        kept = Run(place.bench.runs / "kwrap-1")
        usual = kept if kept.checkpoints.is_dir() else place.train("kwrap-1")
        fast = median_of([float(line["seconds"]) for line in read_metrics(usual)[2:]])
        slow = median_of([float(line["seconds"]) for line in read_metrics(whole)[2:]])
        yield Measure(
            "deterministic kernels cost", "ok", f"{slow / fast - 1:+.1%} time a step", "", {"ratio": slow / fast}
        )
        resumed = place.train("default-killed", (place.scale.kill,))
        yield measure_repeat(place, usual, resumed, "default kernels, SIGKILL and resume")


def measure_two_ranks(place: Workplace) -> Iterator[Measure]:
    """Two processes over NCCL, each on its GPU."""
    run = place.train("two-ranks", processes=2)
    run_kwrap(("verify", str(run.folder)), place.logs / "verify.log")
    seconds = median_of([float(line["seconds"]) for line in read_metrics(run)[2:]])
    result = f"trained and verified; {seconds:.3f} s a step of twice the images"
    yield Measure("two ranks over NCCL", "ok", result, "trained, and proved by verify", {"step_seconds": seconds})


def list_missing(place: Workplace) -> Iterator[Measure]:
    """What this machine cannot measure."""
    if not place.gpus:
        why = "this machine has no GPU"
        for name in (
            "seconds a step of full-size SDXL, and kwrap's overhead there",
            "GPU memory against the plan",
            "fp16 with Lion8bit and the Epsilon preset on CUDA",
            "cost of deterministic kernels, and what the default loses",
        ):
            yield Measure(name, "not measured", why)
    elif place.scale.name == "tiny":
        why = f"no GPU here has {show_bytes(FULL_SIZE_BYTES)}"
        yield Measure("full-size SDXL with the Epsilon preset", "not measured", why)
    if place.gpus < 2:
        yield Measure("two ranks over NCCL", "not measured", f"it needs two GPUs, here: {place.gpus}")


PARTS: dict[str, Measuring] = {
    "counts": measure_counts,
    "speed": measure_speed,
    "scaler": measure_scaler,
    "ranks": measure_two_ranks,
}
"""What can be asked for alone, in the order of measuring."""


def measure_parts(place: Workplace, chosen: Sequence[str]) -> Iterator[Measure]:
    """These parts in their order, then what was not measured; a part that fails is a measure, too."""
    for part in (name for name in PARTS if name in chosen):
        try:
            yield from PARTS[part](place)
        except KwrapError as fault:
            yield Measure(part, "failed", fault.message.splitlines()[0])
    yield from list_missing(place)
    for part in PARTS:
        if part not in chosen and part != "ranks":
            yield Measure(part, "not measured", "left out by --only")


def measure_machine(
    folder: Path,
    engine: str,
    scale: str = "",
    on_measure: Callable[[Measure], None] = lambda measure: None,
    only: Sequence[str] = (),
) -> Report:
    """Measure everything that this machine can, and write both reports into `folder`, anew after each measurement.

    `scale`: full or tiny; empty for what the GPUs hold. `only`: parts; the runs of the others are kept, and the report
    says that they were left out. A measurement that fails is reported, the others go on.
    """
    torch = ask_worker({"checks": ["torch"], "gpus": 1}).get("torch", {})
    found = torch.get("gpus", [])
    fits = bool(found) and min(gpu["memory_bytes"] for gpu in found) >= FULL_SIZE_BYTES
    place = Workplace(folder.absolute(), engine, SCALES[scale or ("full" if fits else "tiny")], len(found))
    versions = {name: find_version(name) for name in (*TESTED_ALONE, "accelerate", "diffusers")}
    report = Report(place.scale.name, engine, {"gpus": found, "versions": versions})
    place.make_inputs(keep_runs=bool(only))
    chosen = only or [part for part in PARTS if part != "ranks" or place.gpus > 1]
    for measure in measure_parts(place, chosen):
        report = report.with_measure(measure)
        report.write(place.folder)
        on_measure(measure)
    return report


def show_measure(measure: Measure) -> str:
    """One line for the terminal."""
    return f"{measure.status:<12}  {measure.name}: {measure.result}"


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when nothing that was measured failed; what could not be measured is named."""
    parser = argparse.ArgumentParser(prog="python -m kohaku_wrap.proving.gpu", description=__doc__)
    parser.add_argument("--engine", choices=("builtin", "sd-scripts"), help="default: sd-scripts where it is installed")
    parser.add_argument("--folder", type=Path, default=Path("gpu-report"), help="where to work (default: gpu-report)")
    parser.add_argument("--scale", choices=tuple(SCALES), default="", help="default: what the GPUs hold")
    parser.add_argument("--only", action="append", choices=tuple(PARTS), default=[], help="a part; may be repeated")
    parser.add_argument("--document", type=Path, help="the document to fill, where full size was measured")
    chosen = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.monotonic()
    engine = chosen.engine or ("sd-scripts" if find_trainer() else "builtin")
    report = measure_machine(
        chosen.folder, engine, chosen.scale, lambda measure: print(show_measure(measure), flush=True), chosen.only
    )
    if chosen.document and report.scale == "full" and not chosen.only:
        fill_document(chosen.document, report)
    print(f"in {time.monotonic() - started:.0f} s; the report: {chosen.folder / 'gpu-report.md'} and gpu-report.json")
    if report.not_measured:
        print(f"Not measured: {'; '.join(each.name for each in report.not_measured)}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    run_as_work(main)
