"""Merges measured beside their bars: gamma rev1 against cat + cp and sd-mecha, baking, functions and networks.

Run: make bench-merge. It takes 25 GB of disk under .bench/ and removes what it made; sd-mecha is installed from PyPI
into an environment of its own. A ratio is the median of pairs measured in turn; bring the machine to rest first.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from sdxl_shapes import Shape, list_tensors

from kohaku_wrap.formats.safetensors import encode_header, lay_out_tensors

FORMULA = "beta7 + 0.8 * (anxl3 - anxl2) + 0.5 * (base7 - beta7)"
NAMES = ("beta7", "anxl3", "anxl2", "base7")
FILE_BYTES = 1_800_000_000
POOL_ELEMENTS = (1 << 24) + 7919
SAMPLE_SECONDS = 0.02
MIB = 1 << 20
RIVAL = "sd-mecha==1.1.8"
RIVAL_TORCH = "torch==2.13.0"

RIVAL_SCRIPT = """
import sys, pathlib, sd_mecha
from sd_mecha.extensions.builtin.merge_methods.linear import add_difference, subtract
folder, threads, buffer_bytes = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
beta7, anxl3, anxl2, base7 = (sd_mecha.model(folder / f"{name}.safetensors") for name in sys.argv[5:])
recipe = add_difference(beta7, subtract(anxl3, anxl2), alpha=0.8)
recipe = add_difference(recipe, subtract(base7, beta7), alpha=0.5)
options = {} if threads < 0 else dict(
    threads=threads, total_buffer_size=buffer_bytes, check_finite_output=False, omit_non_finite_inputs=False,
    check_extra_keys=False, validate_mm_contract=False, memoize_intermediates=False)
sd_mecha.merge(recipe, output=sys.argv[4], **options)
"""

INSIDE_SCRIPT = """
import sys, time, pathlib
from kohaku_wrap.merging.file_metadata import build_metadata
from kohaku_wrap.merging.hashes import hash_files
from kohaku_wrap.merging.planning import plan_merge
from kohaku_wrap.merging.running import run_merge
formula, output, *pairs = sys.argv[1:]
paths = {name: pathlib.Path(path) for name, path in (pair.split("=") for pair in pairs)}
started = time.perf_counter()
plan = plan_merge(formula, paths)
found = hash_files([header.path for header in plan.headers.values()])
run_merge(plan, pathlib.Path(output), build_metadata(plan, dict(zip(plan.headers, found))))
print(time.perf_counter() - started)
"""


class Report:
    """Collects figures and prints each beside its bar."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.missed: list[str] = []

    def add(self, name: str, value: float, unit: str, bar: str = "", met: bool | None = None) -> None:
        self.figures[name] = value
        verdict = "" if met is None else ("ok" if met else "MISSED")
        if met is False:
            self.missed.append(name)
        print(f"{name:<62} {value:>10.2f} {unit:<6} {bar:<22} {verdict}", flush=True)

    def add_ratio(self, name: str, measured: list[float], floors: list[float], bar: float) -> None:
        """The median over pairs of a measured time to its floor, and the least and the greatest; inf: no bar."""
        ratios = sorted(ours / floor for ours, floor in zip(measured, floors, strict=True))
        named = f"{name}, {ratios[0]:.2f} to {ratios[-1]:.2f}"
        if bar < math.inf:
            self.add(named, median(ratios), "x", f"bar: <= {bar:g}", median(ratios) <= bar)
        else:
            self.add(named, median(ratios), "x")


def write_checkpoint(path: Path, tensors: Iterable[tuple[str, Shape]], seed: int, pool: torch.Tensor) -> None:
    """A checkpoint of numbers like trained weights: a shared base, and small differences by `seed`."""
    listed = list(tensors)
    spots = lay_out_tensors((name, "F16", shape) for name, shape in listed)
    with path.open("wb") as stream:
        stream.write(encode_header(spots, {"modelspec.license": "for measuring"}))
        place = 0
        for _, shape in listed:
            left = math.prod(shape)
            while left:
                base, drift = place % (1 << 23), (place * 7 + seed * 999_983) % (1 << 23)
                size = min(left, 1 << 23)
                values = pool[base : base + size] + 0.05 * pool[drift : drift + size] * bool(seed)
                stream.write(values.half().numpy().tobytes())
                left -= size
                place += size


def list_first(limit_bytes: int) -> list[tuple[str, Shape]]:
    """Tensors of the UNet until they reach `limit_bytes` in fp16."""
    chosen, size = [], 0
    for name, shape in list_tensors():
        if name.startswith("model.diffusion_model.") and size < limit_bytes:
            chosen.append((name, shape))
            size += 2 * math.prod(shape)
    return chosen


def factor_of(size: int, wanted: int) -> int:
    """The largest divisor of `size` up to `wanted`."""
    return max(divisor for divisor in range(1, wanted + 1) if size % divisor == 0)


def parts_of_lokr(shape: Shape) -> dict[str, Shape]:
    """Full matrices, factor 4."""
    rows, columns = factor_of(shape[0], 4), factor_of(shape[1], 4)
    return {"lokr_w1": (rows, columns), "lokr_w2": (shape[0] // rows, shape[1] // columns, *shape[2:])}


def parts_of_lora(shape: Shape) -> dict[str, Shape]:
    """Rank 16."""
    return {"lora_up.weight": (shape[0], 16, *[1 for _ in shape[2:]]), "lora_down.weight": (16, *shape[1:])}


def write_network(
    path: Path, tensors: Iterable[tuple[str, Shape]], parts_of: Callable[[Shape], dict[str, Shape]], pool: torch.Tensor
) -> None:
    """A network over all weights of the UNet with two or more dimensions."""
    parts: list[tuple[str, Shape]] = []
    for name, shape in tensors:
        if name.startswith("model.diffusion_model.") and len(shape) >= 2:
            path_in_unet = name.removeprefix("model.diffusion_model.").removesuffix(".weight")
            module = "lora_unet_" + path_in_unet.replace(".", "_")
            of_module: dict[str, Shape] = {"alpha": (), **parts_of(shape)}
            parts += [(f"{module}.{part}", its_shape) for part, its_shape in of_module.items()]
    write_checkpoint(path, sorted(parts), 0, pool * 0.1)


def run_timed(command: list[str], folder: Path) -> float:
    """Wall seconds of a command that must succeed, once earlier writes are on disk."""
    os.sync()
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment(folder))
    return time.perf_counter() - started


def timed(action: Callable[[], object]) -> float:
    """Seconds of the clock."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def run_measured(command: list[str], folder: Path) -> tuple[float, float]:
    """Wall seconds and peak anonymous memory in MiB, its children included."""
    os.sync()
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment(folder))
        peak = 0
        while child.poll() is None:
            peak = max(peak, anonymous_bytes(child.pid))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
        if child.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command[:4])} failed:\n{errors.read().decode()[-2000:]}")
    return seconds, peak / MIB


def processor_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def anonymous_bytes(process: int) -> int:
    """RssAnon of a process, from /proc."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def environment(folder: Path) -> dict[str, str]:
    settings = {"KWRAP_HOME": str(folder / "home"), "LYCORIS_KERNEL_BACKEND": "torch", "LYCORIS_KERNEL_TUNE": "off"}
    return {**os.environ, **settings}


def best_of(times: int, run: Callable[[], float]) -> float:
    return min(run() for _ in range(times))


def remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def measure_gamma(folder: Path, report: Report, times: int, pool: torch.Tensor) -> None:
    """Gamma rev1 over four files against cat + cp."""
    tensors = list_first(FILE_BYTES)
    files = [folder / f"{name}.safetensors" for name in NAMES]
    for seed, path in enumerate(files):
        write_checkpoint(path, tensors, seed, pool)
    os.sync()
    print(f"{len(tensors)} tensors, {files[0].stat().st_size:,} bytes a file")
    output, copy = folder / "merged.safetensors", folder / "copy.safetensors"
    pairs = [f"{name}={path}" for name, path in zip(NAMES, files, strict=True)]
    merge = [sys.executable, "-m", "kohaku_wrap", "merge", "gamma-rev1", "-o", str(output)]
    merge += [word for pair in pairs for word in ("-m", pair)]

    def floor() -> float:
        remove(copy)
        os.sync()
        with Path(os.devnull).open("wb") as sink:
            started = time.perf_counter()
            subprocess.run(["cat", *map(str, files)], check=True, stdout=sink)
            subprocess.run(["cp", str(files[0]), str(copy)], check=True)
            return time.perf_counter() - started

    def inside() -> float:
        remove(output)
        os.sync()
        command = [sys.executable, "-c", INSIDE_SCRIPT, FORMULA, str(output), *pairs]
        return float(
            subprocess.run(command, check=True, capture_output=True, text=True, env=environment(folder)).stdout
        )

    report.add("dry run of gamma rev1", best_of(3, lambda: run_timed([*merge, "--dry-run"], folder)), "s")
    report.add("first merge, inputs hashed too", run_timed(merge, folder), "s")
    floors, wholes, peaks, insides = [], [], [], []
    for _ in range(times):
        floors.append(floor())
        remove(output)
        seconds, peak = run_measured(merge, folder)
        wholes.append(seconds)
        peaks.append(peak)
        insides.append(inside())
    report.add("cat of the inputs + cp of one", median(floors), "s")
    report.add("merge, whole process, warm", median(wholes), "s")
    report.add_ratio("  … / (cat + cp)", wholes, floors, 3)
    report.add("merge without start-up", median(insides), "s")
    report.add_ratio("  … / (cat + cp)", insides, floors, 2)
    report.add("peak anonymous memory", max(peaks), "MiB", "bar: <= 400", max(peaks) * MIB <= 400e6)
    remove(copy)
    run_timed(merge, folder)
    other = folder / "one-thread.safetensors"
    run_timed([*merge[:6], str(other), *merge[7:], "--threads", "1"], folder)
    same = filecmp.cmp(output, other, shallow=False)
    report.add("same bytes for 1 thread and all (1 is yes)", float(same), "", "bar: 1", same)
    remove(other)
    verified = run_timed([*merge, "--verify"], folder)
    report.add("merge with --verify", verified, "s")


def measure_rival(folder: Path, report: Report) -> None:
    """sd-mecha on the same files, at its defaults and at its best settings."""
    environment_folder = folder / "sd-mecha"
    if not (environment_folder / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment_folder)], check=True)
        pip = [str(environment_folder / "bin" / "pip"), "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, RIVAL_TORCH, RIVAL], check=True)
    output = folder / "rival.safetensors"
    found = []
    cases = {
        "default settings": (-1, 0),
        "1 thread": (1, 1 << 28),
        "2 threads": (2, 1 << 28),
        "4 threads": (4, 1 << 30),
    }
    for name, (threads, buffer_bytes) in cases.items():
        remove(output)
        command = [str(environment_folder / "bin" / "python"), "-c", RIVAL_SCRIPT]
        command += [str(folder), str(threads), str(buffer_bytes), str(output), *NAMES]
        seconds, peak = run_measured(command, folder)
        found.append((seconds, peak))
        report.add(f"sd-mecha, {name}", seconds, "s")
        report.add(f"sd-mecha, {name}, peak anonymous memory", peak, "MiB")
    seconds = min(seconds for seconds, _ in found) / report.figures["merge, whole process, warm"]
    report.add("sd-mecha's best time / kwrap's", seconds, "x", "bar: >= 10", seconds >= 10)
    memory = min(peak for _, peak in found) / report.figures["peak anonymous memory"]
    report.add("sd-mecha's least memory / kwrap's", memory, "x", "bar: >= 5", memory >= 5)
    remove(output)


def measure_baking(folder: Path, report: Report, times: int, pool: torch.Tensor) -> None:
    """Networks over a full-size SDXL against copying the file."""
    tensors = list_tensors()
    base = folder / "base.safetensors"
    write_checkpoint(base, tensors, 1, pool)
    # No bar for the LoRA's time: its products of matrices are lycoris-lora's, whose import alone takes three seconds.
    for kind, parts_of, bar in (("LoKr", parts_of_lokr, 3.0), ("LoRA", parts_of_lora, math.inf)):
        network = folder / "network.safetensors"
        write_network(network, tensors, parts_of, pool)
        os.sync()
        print(f"{base.stat().st_size:,} bytes of checkpoint, {network.stat().st_size:,} of a {kind}")
        measure_bake(folder, report, times, kind, base, network, bar)
        remove(network)
    remove(base)


def measure_bake(folder: Path, report: Report, times: int, kind: str, base: Path, network: Path, bar: float) -> None:
    """Copying and baking in turn, the median of the pairs.

    kwrap's file is on the disk before it gets its name, so the floor is a copy that is on the disk too.
    """
    copy, output = folder / "copy.safetensors", folder / "baked.safetensors"
    command = [sys.executable, "-m", "kohaku_wrap", "merge", "base + 1.0 * net(network)", "-o", str(output)]
    command += ["-m", f"base={base}", "-m", f"network={network}"]
    run_timed([*command, "--dry-run"], folder)
    run_timed([sys.executable, "-m", "kohaku_wrap", "inspect", str(base)], folder)
    copies, unsynced, bakes, peaks = [], [], [], []
    for _ in range(times):
        remove(copy, output)
        unsynced.append(run_timed(["cp", str(base), str(copy)], folder))
        copies.append(unsynced[-1] + timed(lambda: subprocess.run(["sync", str(copy)], check=True)))
        remove(copy)
        seconds, peak = run_measured(command, folder)
        bakes.append(seconds)
        peaks.append(peak)
    report.add("cp of the full-size checkpoint, and sync of the copy", median(copies), "s")
    report.add(f"baking the {kind}, whole process", median(bakes), "s")
    report.add_ratio("  … / (cp + sync)", bakes, copies, bar)
    report.add_ratio("  … / cp into memory", bakes, unsynced, math.inf)
    report.add("  peak anonymous memory", max(peaks), "MiB", "bar: <= 400", max(peaks) * MIB <= 400e6)
    remove(output)


WIDE = {
    "the change as a LoRA of rank 32": (["tuned - base", "--as", "lora", "--rank", "32"], 180.0, 1.5e9),
    "slerp(base, tuned, 0.5)": (["slerp(base, tuned, 0.5)"], math.inf, 400e6),
    "train_difference of three": (["train_difference(base, tuned, base)"], math.inf, 400e6),
    "base + ties with k = 0.2": (["base + ties(tuned - base, 0.5 * tuned - 0.5 * base, 0.2)"], math.inf, 400e6),
    "base + dare of one change": (["base + dare(tuned - base, 0.9, 7)"], math.inf, 400e6),
}
"""What is made of two full-size files: words, and bars on processor seconds and bytes of memory."""


def measure_wide(folder: Path, report: Report, pool: torch.Tensor, limit_bytes: int) -> None:
    """A change as a network, and functions: processor time, which other work on the machine changes little."""
    tensors = list_tensors() if not limit_bytes else list_first(limit_bytes)
    paths = {name: folder / f"{name}.safetensors" for name in ("base", "tuned")}
    for seed, path in enumerate(paths.values(), start=1):
        write_checkpoint(path, tensors, seed, pool)
    pairs = [word for name, path in paths.items() for word in ("-m", f"{name}={path}")]
    output = folder / "made.safetensors"
    run_timed([sys.executable, "-m", "kohaku_wrap", "inspect", *map(str, list(paths.values())[:1])], folder)
    run_timed([sys.executable, "-m", "kohaku_wrap", "inspect", *map(str, list(paths.values())[1:])], folder)
    for name, (words, bar_seconds, bar_bytes) in WIDE.items():
        remove(output)
        before = processor_seconds()
        seconds, peak = run_measured(
            [sys.executable, "-m", "kohaku_wrap", "merge", *words, *pairs, "-o", str(output)], folder
        )
        used = processor_seconds() - before
        bar = f"bar: <= {bar_seconds:g}" if bar_seconds < math.inf else ""
        report.add(f"{name}, processor time", used, "s", bar, used <= bar_seconds if bar else None)
        report.add("  by the clock", seconds, "s")
        report.add("  peak anonymous memory", peak, "MiB", f"bar: <= {bar_bytes / 1e6:g} MB", peak * MIB <= bar_bytes)
    remove(output, *paths.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path(".bench") / "merge", help="where files are made and removed"
    )
    parser.add_argument("--times", type=int, default=5, help="pairs; the median counts")
    parser.add_argument("--only", choices=("gamma", "rival", "bake", "wide"), action="append", help="parts to run")
    parser.add_argument("--wide-bytes", type=int, default=0, help="size of the files of `wide`; else full SDXL")
    parser.add_argument("--keep", action="store_true", help="leave the files")
    asked = parser.parse_args()
    parts = asked.only or ["gamma", "rival", "bake", "wide"]
    asked.folder.mkdir(parents=True, exist_ok=True)
    folder = asked.folder.resolve()
    torch.set_num_threads(1)
    pool = torch.from_numpy(np.random.default_rng(1).standard_normal(POOL_ELEMENTS, dtype=np.float32) * 0.03)
    report = Report()
    try:
        if "gamma" in parts or "rival" in parts:
            measure_gamma(folder, report, asked.times, pool)
        if "rival" in parts:
            measure_rival(folder, report)
        remove(*(folder / f"{name}.safetensors" for name in (*NAMES, "merged")))
        if "bake" in parts:
            measure_baking(folder, report, asked.times, pool)
        if "wide" in parts:
            measure_wide(folder, report, pool, asked.wide_bytes)
    finally:
        if not asked.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"load_average": os.getloadavg(), "missed": report.missed}))
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
