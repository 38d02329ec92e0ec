"""`kwrap report` on a long run: seconds and bytes, against Python that reads its numbers and writes as many bytes.

python benchmarks/bench_report.py [--steps 20354] [--attempts 5] [--pictures 2000] [--whole]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from epsilon_run import make_run

from kohaku_wrap.formats.toml_text import toml_text
from kohaku_wrap.training.records.folder import Run

BAR_SECONDS = 3.0
BAR_BYTES = 2_000_000
TIMES = 5
PROMPTS = 20
FLOOR = """import json, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
open(sys.argv[2], "wb").write(bytes(int(sys.argv[3])))
"""


def write_attempts(run: Run, steps: int, attempts: int, *, whole: bool) -> None:
    """Attempts that crash one after another; each goes on a little before the end of the one before, or from the start.

    `whole`: each attempt has all steps.
    """
    generator = np.random.default_rng(3)
    with run.metrics.open("w") as stream:
        for number in range(1, attempts + 1):
            start = 0 if whole else max(0, (number - 1) * steps // attempts - 50)
            end = steps if whole else number * steps // attempts
            folder = run.attempts / str(number)
            folder.mkdir(parents=True)
            about = {"format": 2, "number": number, "processes": 4, "accumulation": 16, "workers": 8,
                     "start_optimizer_step": start, "state": None, "allow": []}  # fmt: skip
            (folder / "attempt.json").write_text(json.dumps(about))
            kind = "finished" if number == attempts else "crash"
            ended = {
                "kind": kind,
                "message": "bench",
                "optimizer_step": end,
                "unix_seconds": 1.7e9 + end,
                "exit_code": 0,
            }
            (folder / "end.json").write_text(json.dumps(ended))
            (folder / "supervisor.lock").touch()
            losses, seconds = generator.gamma(4.0, 0.03, end - start), generator.normal(49.5, 1.0, end - start)
            for step, loss, took in zip(range(start + 1, end + 1), losses, seconds, strict=True):
                line = {"optimizer_step": step, "epoch": 0, "micro_batch": step * 16, "loss": loss,
                        "lr_text_encoder": 1e-5 * step / steps, "lr_unet": 2e-5, "seconds": took, "images": 256,
                        "attempt": number}  # fmt: skip
                stream.write(json.dumps(line) + "\n")


def write_pictures(run: Run, pictures: int) -> None:
    """Pictures of PROMPTS prompts at equal distances, each with kwrap's record of its sheet; not inside the page."""
    for place in range(pictures // PROMPTS):
        folder = run.samples / f"optimizer-step-{(place + 1) * 200:08d}"
        folder.mkdir(parents=True)
        names = [f"{prompt:02d}_{place:08d}_{prompt * 7919 + place:012x}.png" for prompt in range(PROMPTS)]
        for name in names:
            (folder / name).write_bytes(bytes(4000))
        labels = {name: {"prompt": f"{prompt + 1}: 1girl, solo, a prompt of the usual length, great quality"}
                  for prompt, name in enumerate(names)}  # fmt: skip
        document = {"format": 1, "files": {}, "tokenizers": {}, "pictures": labels}
        (folder / "sheet.json").write_text(json.dumps(document))


def measure(*words: object) -> tuple[float, float]:
    """The shortest time of a command on the clock, and of its processor, in seconds."""
    best = (float("inf"), float("inf"))
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for _ in range(TIMES):
        before, started = os.times(), time.perf_counter()
        subprocess.run([sys.executable, *map(str, words)], check=True, env=settings, stdout=subprocess.DEVNULL)
        after = os.times()
        took = after.children_user + after.children_system - before.children_user - before.children_system
        best = min(best, (time.perf_counter() - started, took))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_354)
    parser.add_argument("--attempts", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=2_000)
    parser.add_argument("--whole", action="store_true", help="Each attempt has all steps.")
    parser.add_argument("--folder", type=Path, help="Made there and kept, in place of a folder that is removed.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        run = make_run(folder, 10_000)
        tables = dict(run.lock.tables)
        tables["plan"] = {**tables["plan"], "total_optimizer_steps": arguments.steps}
        run.lock_file.write_text(toml_text(tables), encoding="utf-8")
        run.forget_lock()
        write_attempts(run, arguments.steps, arguments.attempts, whole=arguments.whole)
        write_pictures(run, arguments.pictures)
        page = folder / "page.html"
        seconds, processor = measure("-m", "kohaku_wrap", "report", run.folder, "-o", page)
        size = page.stat().st_size
        floor, floor_processor = measure("-c", FLOOR, run.metrics, folder / "floor", size)
    print(f"{arguments.steps:,} steps, {arguments.attempts} attempts, {arguments.pictures:,} pictures by reference")
    print(
        f"page   {seconds:.2f} s, processor {processor:.2f} s (bar {BAR_SECONDS:g} s); {size:,} bytes ({BAR_BYTES:,})"
    )
    print(
        f"floor  {floor:.2f} s, processor {floor_processor:.2f} s: each line of the metrics read, as many bytes written"
    )
    print(f"ratio  {processor / floor_processor:.1f} of processor time")


if __name__ == "__main__":
    main()
