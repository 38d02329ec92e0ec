"""A run on 2 × 2, then 1 × 4, then 2 × 2 processes × accumulation: are inputs and rates the same at every step?

    python benchmarks/elastic.py                                   # builtin engine, AdamW and Lion8bit
    python benchmarks/elastic.py --engine sd-scripts               # an installed checkout

Each case trains to the end on 2 × 2, goes back to step 2, inside the warm-up, on one process, and back to a later
step on two. The ledger then holds steps that were trained in two or three shapes: images, captions, crops, time steps
and rates must agree bit by bit. Weights agree within a tolerance for AdamW in fp32; Lion amplifies the sign of
rounding, so its weights are shown and not judged.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

from kohaku_wrap.proving.killing import ProcessFailed, run_kwrap
from kohaku_wrap.proving.prove import Bench, Configuration
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.verifying.verify import verify_run

SETTINGS = (
    "effective_batch=8", "max_train_epochs=2", "save_every_n_steps=1", "save_precision=float", "states.keep=20",
    "lr_warmup_steps=4", "unet_lr=1e-4", "text_encoder_lr=5e-5",
)  # fmt: skip
BACK_TO = ((2, 1), (4, 2))
"""Optimizer step and processes of the second and third attempt."""

TOLERANCES = {"AdamW": 1e-4, "Lion8bit": None}
"""Of the largest difference of weights, relative to the largest weight of its tensor."""

UNMOVED = 5e-5
"""Half of what one AdamW step moves a weight. A tensor that stays below it in all steps has no gradient but rounding
(the time embedding before a norm with one channel a group), which AdamW scales up; it is counted, not judged."""


def train_in_three_shapes(bench: Bench, optimizer: str) -> Run:
    """One run of three attempts; the first and the second are left behind from a step on."""
    name = f"elastic-{optimizer.lower()}"
    site = bench.write_site(name, Configuration(processes=2, accumulation=2), workers=0)
    run = Run(bench.runs / name)
    shutil.rmtree(run.folder, ignore_errors=True)
    log = bench.folder / "logs" / f"{name}.log"
    settings = [part for setting in (*SETTINGS, f"optimizer_type={optimizer}") for part in ("--set", setting)]
    run_kwrap(("train", "demo", "--site", str(site), "--run", name, *settings), log)
    for step, processes in BACK_TO:
        run_kwrap(("resume", str(run.folder), "--step", str(step), "--processes", str(processes)), log)
    return run


def largest_difference(one: Path, other: Path) -> tuple[float, int]:
    """The largest difference by the largest weight of its tensor, and how many tensors were set aside as unmoved."""
    first, second = load_file(one), load_file(other)
    if first.keys() != second.keys():
        return float("inf"), 0
    found, unmoved = 0.0, 0
    for name, tensor in first.items():
        largest = float(tensor.double().abs().max())
        if largest < UNMOVED:
            unmoved += 1
            continue
        found = max(found, float((tensor.double() - second[name].double()).abs().max()) / largest)
    return found, unmoved


def judge(run: Run, optimizer: str) -> tuple[str, bool]:
    """The case's line, and whether it is as promised."""
    report = verify_run(run)
    network = f"{run.name}.safetensors"
    wide = run.abandoned / "before-attempt-2" / "checkpoints" / network
    narrow = run.abandoned / "before-attempt-3" / "checkpoints" / network
    pairs = [largest_difference(wide, narrow), largest_difference(wide, run.checkpoints / network)]
    difference, unmoved = max(pair[0] for pair in pairs), max(pair[1] for pair in pairs)
    tolerance = TOLERANCES[optimizer]
    within = tolerance is None or difference <= tolerance
    bar = "not judged" if tolerance is None else f"bar: {tolerance:g}"
    faults = "; ".join(f"{fault.kind} at step {fault.optimizer_step}: {fault.what}" for fault in report.faults)
    text = (
        f"{optimizer}, 2 × 2 → 1 × 4 → 2 × 2: {report.compared} positions in more than one shape, "
        f"{faults or 'images, captions, time steps and rates equal'}; "
        f"weights differ by {difference:.1e} ({bar}), {unmoved} tensors unmoved"
    )
    good = report.is_proved and report.compared > 0 and within
    return f"{'equal    ' if good else 'DIFFERENT'}  {text}", good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("builtin", "sd-scripts"), default="builtin")
    parser.add_argument("--optimizer", choices=tuple(TOLERANCES), action="append", help="only this one")
    parser.add_argument("--folder", type=Path, default=Path(".bench/elastic"), help="where to work")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.monotonic()
    bench = Bench(chosen.folder.absolute(), chosen.engine)
    good = 0
    optimizers = chosen.optimizer or list(TOLERANCES)
    try:
        bench.make_world()
        for optimizer in optimizers:
            line, as_promised = judge(train_in_three_shapes(bench, optimizer), optimizer)
            good += as_promised
            print(line, flush=True)
    except ProcessFailed as failed:
        print(failed, file=sys.stderr)
        return 1
    print(f"{len(optimizers)} cases, {good} equal, {chosen.engine} engine, {time.monotonic() - started:.0f} s")
    return 0 if good == len(optimizers) else 1


if __name__ == "__main__":
    sys.exit(main())
