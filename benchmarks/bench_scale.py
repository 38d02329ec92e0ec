"""What 5.2 million images cost: start-up, a rank's memory, growth of loader workers, and sd-scripts' own dataset.

    python benchmarks/bench_scale.py            # make bench-scale
    python benchmarks/bench_scale.py --images 500000
    python benchmarks/bench_scale.py --only exposure --folder SCRATCH

Memory is the proportional set size, so pages shared by ranks and workers count once. sd-scripts' dataset is
measured at a size that fits and extrapolated, where a checkout is installed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from epsilon_run import EPSILON_IMAGES, EPSILON_STEP, make_run

from kohaku_wrap.trainer.checkout import TrainerMissing, find_checkout
from kohaku_wrap.training.records.states import list_states

MEGABYTE = 1 << 20
BARS = {
    "first keys, seconds": 120.0,
    "memory of a rank, MB": 1500.0,
    "growth of a loader worker, MB": 200.0,
    "resume --dry-run, seconds": 10.0,
    "exposure of all tags, seconds": 150.0,
    "its peak memory, MiB": 1024.0,
    "asked again, seconds": 2.0,
}
UPSTREAM_ENTRIES = 200_000


def proportional_set_bytes() -> int:
    """This process's memory, pages shared by n processes counted as an n-th."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this kernel does not tell the proportional set size")


def draw_share(dataset: Any, share: int, shares: int, answer: Any) -> None:
    """Draw every `shares`-th batch of an epoch, as a loader worker does, and tell how memory grew."""
    from kohaku_wrap.training.data.sampler import PositionSampler

    sampler = PositionSampler(dataset.order, rank=share, processes=shares)
    keys = iter(sampler)
    dataset.draw_batch(next(keys))
    before, started, batches = proportional_set_bytes(), time.monotonic(), 0
    for key in keys:
        dataset.draw_batch(key)
        batches += 1
    answer.put((proportional_set_bytes() - before, batches, time.monotonic() - started))


def measure_rank(run_folder: Path, workers: int) -> dict[str, float]:
    """Start-up, memory of a rank and growth of its workers over an epoch's accesses; run in a process of its own."""
    import tomllib

    from kohaku_wrap.formats.caption_columns import Columns
    from kohaku_wrap.training.data.columns import ColumnsDataset
    from kohaku_wrap.training.data.items import ItemOptions, read_dataset_options
    from kohaku_wrap.training.data.sampler import PositionSampler
    from kohaku_wrap.training.records.folder import Run

    lock = Run(run_folder).lock
    options = read_dataset_options(tomllib.loads((run_folder / "dataset.toml").read_text()))
    before, started = proportional_set_bytes(), time.monotonic()
    columns = Columns.open(Path(options["image_dir"]))
    items = ItemOptions.from_dataset_options(options)
    dataset = ColumnsDataset(columns, items, lock.batch_per_gpu, lock.seed, lock.group, tokenize=None)
    first = next(iter(PositionSampler(dataset.order)))
    dataset.draw_batch(first)
    seconds = time.monotonic() - started
    memory = proportional_set_bytes() - before

    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    children = [context.Process(target=draw_share, args=(dataset, rank, workers, answers)) for rank in range(workers)]
    for child in children:
        child.start()
    grown = [answers.get() for _ in children]
    for child in children:
        child.join()
    return {
        "first keys, seconds": seconds,
        "memory of a rank, MB": memory / MEGABYTE,
        "growth of a loader worker, MB": max(growth for growth, _, _ in grown) / MEGABYTE,
        "batches drawn a second and worker": sum(batches / max(taken, 1e-9) for _, batches, taken in grown) / workers,
    }


def measure_upstream(run_folder: Path, entries: int) -> dict[str, float]:
    """Seconds and memory of sd-scripts' own dataset over the first `entries` images; run in a process of its own."""
    import tomllib

    from kohaku_wrap.formats.caption_columns import Columns
    from kohaku_wrap.training.data.items import read_dataset_options

    options = read_dataset_options(tomllib.loads((run_folder / "dataset.toml").read_text()))
    columns = Columns.open(Path(options["image_dir"]))
    with tempfile.TemporaryDirectory() as folder:
        cache = {
            str(columns.path_of(row)): {"caption": columns.caption_of(row), "resolution": columns.size_of(row)}
            for row in range(entries)
        }
        Path(folder, "metadata_cache.json").write_text(json.dumps(cache))
        del cache
        config = {
            "datasets": [{**rename_for_upstream(options), "subsets": [{"image_dir": folder, "cache_info": True}]}]
        }
        from kohaku_wrap.training.engines.sd_scripts.worker import enter_checkout

        enter_checkout(find_checkout())
        from library import config_util

        arguments = argparse.Namespace(**UPSTREAM_ARGUMENTS)
        before, started = proportional_set_bytes(), time.monotonic()
        generator = config_util.BlueprintGenerator(config_util.ConfigSanitizer(True, True, False, True))
        blueprint = generator.generate(config, arguments)
        group = config_util.generate_dataset_group_by_blueprint(blueprint.dataset_group)
        return {
            "seconds": time.monotonic() - started,
            # While the group is still there.
            "MB": (proportional_set_bytes() - before) / MEGABYTE if group else 0.0,
        }


UPSTREAM_ARGUMENTS = {"train_batch_size": 4, "debug_dataset": False, "max_token_length": 225, "seed": 0}


def rename_for_upstream(options: dict[str, Any]) -> dict[str, Any]:
    """The bucket options alone: captions come from the cache."""
    names = ("resolution", "batch_size", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")
    return {name: options[name] for name in names if name in options}


def in_own_process(task: str, run_folder: Path, number: int) -> dict[str, float]:
    """Measure in a fresh interpreter, so that no earlier allocation counts."""
    command = [sys.executable, __file__, "--task", task, "--run", str(run_folder), "--number", str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{task} failed:\n{done.stderr[-3000:]}")
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def time_resume(run_folder: Path) -> float:
    """Seconds of `kwrap resume --step 13600 --dry-run`, whole process; a smaller run has an earlier step."""
    step = list_states(run_folder / "states")[-1][0]
    started = time.monotonic()
    command = [sys.executable, "-m", "kohaku_wrap", "resume", str(run_folder), "--step", str(step), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"resume failed:\n{done.stdout}{done.stderr}")
    return time.monotonic() - started


def make_trained_run(folder: Path, images: int) -> None:
    """A run whose ledger says that it trained up to Epsilon's published step, with 40 tags a caption."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
    from written_ledgers import write_life

    run = make_run(folder, images, draws_tags=True)
    run.ledger.mkdir(exist_ok=True)
    write_life(run, 1, 4, 0, min(EPSILON_STEP, run.lock.total_optimizer_steps - 1))


def measure_exposure(run_folder: Path) -> dict[str, float]:
    """Seconds and peak memory of `kwrap evaluate exposure`, whole process, and seconds of the next call."""
    command = [sys.executable, "-m", "kohaku_wrap", "evaluate", "exposure", str(run_folder), "--threads", "2"]
    figures: dict[str, float] = {}
    for name in ("exposure of all tags, seconds", "asked again, seconds"):
        started = time.monotonic()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"exposure ended with code {child.returncode}")
        figures[name] = time.monotonic() - started
        figures.setdefault("its peak memory, MiB", usage.ru_maxrss / 1024)
        figures[f"{name.split(',')[0]}, seconds of processor time"] = usage.ru_utime + usage.ru_stime
    return figures


def show(images: int, figures: dict[str, float]) -> None:
    """Print each figure beside its bar."""
    print(f"\n{images:,} images")
    for name, value in figures.items():
        bar = BARS.get(name)
        verdict = "" if bar is None else f"   bar {bar:>7,.0f}   {'ok' if value <= bar else 'MISSED'}"
        print(f"  {name:<36} {value:>12,.1f}{verdict}")


def show_upstream(images: int, run_folder: Path) -> None:
    """Print sd-scripts' own dataset beside ours, extrapolated from a size that fits."""
    try:
        find_checkout()
    except TrainerMissing:
        print("  sd-scripts' own dataset: not measured; `kwrap trainer install`, or set KWRAP_SD_SCRIPTS to a checkout")
        return
    small, large = (in_own_process("upstream", run_folder, n) for n in (UPSTREAM_ENTRIES // 4, UPSTREAM_ENTRIES))
    scale = (images - UPSTREAM_ENTRIES // 4) / (UPSTREAM_ENTRIES - UPSTREAM_ENTRIES // 4)
    print(f"\nsd-scripts' own dataset with cache_info, extrapolated from {UPSTREAM_ENTRIES:,} images")
    for name in ("seconds", "MB"):
        print(f"  {name + ' a rank':<36} {small[name] + (large[name] - small[name]) * scale:>12,.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=EPSILON_IMAGES)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keep the made-up run here, and use it if it is there")
    parser.add_argument("--only", choices=["exposure"], help="measure that alone, on captions of its own")
    parser.add_argument("--task", choices=["rank", "upstream", "trained"], help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task == "trained":
        make_trained_run(arguments.run, arguments.number)
        print("{}")
        return
    if arguments.task:
        measure = measure_rank if arguments.task == "rank" else measure_upstream
        print(json.dumps(measure(arguments.run, arguments.number)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        run_folder = folder / "runs" / "epsilon"
        if arguments.only:
            # By another process: the peak of a child's memory begins with what its parent has.
            if not run_folder.is_dir():
                in_own_process("trained", folder, arguments.images)
            show(arguments.images, measure_exposure(run_folder))
            return
        if not run_folder.is_dir():
            print(f"making {arguments.images:,} captions …", flush=True)
            make_run(folder, arguments.images)
        figures = in_own_process("rank", run_folder, arguments.workers)
        figures["resume --dry-run, seconds"] = time_resume(run_folder)
        show(arguments.images, figures)
        show_upstream(arguments.images, run_folder)


if __name__ == "__main__":
    main()
