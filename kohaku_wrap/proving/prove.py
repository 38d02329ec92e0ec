"""The proof of exact resume: real trainings, killed with SIGKILL and resumed, compared bit by bit.

`make prove`, or `python -P -m kohaku_wrap.proving.prove`. Each case trains once uninterrupted and once with kills,
through the `kwrap` command; cases of the same configuration share the uninterrupted run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
import tomllib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from kohaku_wrap.config.site import load_site
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import shipped_folder, write_text
from kohaku_wrap.formats.caption_rows import CAPTIONS_FILE
from kohaku_wrap.formats.toml_text import toml_text
from kohaku_wrap.outlets import run_as_work
from kohaku_wrap.proving.killing import (
    Kill,
    ProcessFailed,
    cache_with_kill,
    run_kwrap,
    train_with_kills,
    training_threads,
)
from kohaku_wrap.proving.likeness import Difference, compare_runs
from kohaku_wrap.trainer.commits import installed_checkouts, list_known
from kohaku_wrap.trainer.installed import CHECKOUT_VARIABLE, find_trainer, read_trainer_commit
from kohaku_wrap.training.records.folder import Run

POSTS = 24
"""Of the small world that is trained on; about half of them are selected with an image."""

SETTINGS = ("max_train_epochs=2", "save_every_n_steps=2", "save_precision=float", "states.keep=2")
"""Over the demo template: states often, and checkpoints that hide no bit."""

BATCH_PER_PROCESS = 2


@dataclass(frozen=True)
class Configuration:
    """What an uninterrupted run and its killed counterpart have in common."""

    processes: int = 1
    """Processes that train together."""

    accumulation: int = 2
    """Micro-batches of each process in an optimizer step."""

    batch: int = BATCH_PER_PROCESS
    """Images of each process in a micro-batch."""

    trainer: str = ""
    """The sd-scripts checkout; empty for the one that a training would use."""

    data: str = "kwrap"
    """Whose dataset is trained from; `sd-scripts` is the trainer's own."""

    both: tuple[str, ...] = ()
    """Settings of the template that the uninterrupted run has too."""

    @property
    def name(self) -> str:
        commit = f"-{Path(self.trainer).name[:7]}" if self.trainer else ""
        own = "-own-data" if self.data != "kwrap" else ""
        size = f"b{self.batch}" if self.batch != BATCH_PER_PROCESS else ""
        both = "".join(f"-{each.partition('=')[0]}" for each in self.both)
        return f"p{self.processes}a{self.accumulation}{size}{commit}{own}{both}"

    @property
    def environment(self) -> dict[str, str]:
        return {CHECKOUT_VARIABLE: self.trainer} if self.trainer else {}


@dataclass(frozen=True)
class Case:
    """One way to interrupt a training."""

    name: str
    """For the run's folder."""

    says: str
    """What is shown, in words."""

    kills: tuple[Kill, ...]
    """One an attempt; the attempt after the last one finishes."""

    workers: tuple[int, ...] = (0,)
    """Loader workers of each attempt; the last number also holds for later ones."""

    configuration: Configuration = Configuration()
    """What is trained."""

    settings: tuple[str, ...] = ()
    """Of the template, beside SETTINGS: a shorter length."""

    longer: Mapping[int, tuple[str, ...]] = field(default_factory=dict, compare=False)
    """Attempts that `kwrap extend` begins, and how much longer each makes the run."""

    branched: int = 0
    """The attempt that `kwrap branch` begins, in a new run with nothing changed; 0 for none."""

    moved: int = 0
    """The attempt before which the run is moved and renamed; 0 for none."""

    cached: bool = False
    """Whether it trains from cached latents; the caching is killed in its middle too."""


def read_cases() -> tuple[Case, ...]:
    """The cases of proofs/resume.toml, which says what each key means."""
    document = tomllib.loads((shipped_folder("proofs") / "resume.toml").read_text(encoding="utf-8"))
    return tuple(read_case(case) for case in document["case"])


def read_case(case: Mapping[str, Any]) -> Case:
    """One case, whose keys are the fields of Case and of its Configuration."""
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in case.items()}
    shared = {each.name: given.pop(each.name) for each in fields(Configuration) if each.name in given}
    given["kills"] = tuple(Kill(**kill) for kill in case["kills"])
    given["longer"] = {int(attempt): tuple(options) for attempt, options in case.get("longer", {}).items()}
    return Case(**given, configuration=Configuration(**shared))


@dataclass(frozen=True)
class Bench:
    """The world and the folder that all runs of one proof share."""

    folder: Path
    """Where everything is made."""

    engine: str
    """builtin or sd-scripts."""

    @property
    def runs(self) -> Path:
        return self.folder / "runs" / self.engine

    @property
    def latents(self) -> Path:
        """Cached ones, a folder a case."""
        return self.runs / ".latents"

    @cached_property
    def world(self) -> Path:
        return self.folder / "world"

    def make_world(self) -> None:
        """The embedded world with its dataset made ready, by kwrap's own commands; what is there is kept."""
        if (self.world / "images" / CAPTIONS_FILE).exists():
            return
        log = self.folder / "logs" / "world.log"
        run_kwrap(("demo", str(self.world), "--posts", str(POSTS)), log)
        paths, selection = load_site(self.world / "site.toml").paths, str(self.world / "demo.parquet")
        run_kwrap(("select", "demo", "--db", str(paths.db), "--out", selection), log)
        run_kwrap(("extract", selection, "--tars", str(paths.tars), "--out", str(paths.images)), log)
        run_kwrap(("caption", selection, "--db", str(paths.db), "--out", str(paths.images), "--dataset", "demo"), log)

    def write_site(self, case: str, configuration: Configuration, workers: int) -> Path:
        """The world's site with the processes and workers of a case."""
        machine = {"processes": configuration.processes, "batch_per_gpu": configuration.batch, "workers": workers}
        path = self.folder / "sites" / f"{self.engine}-{case}.toml"
        paths = {"runs": self.runs, "latents": self.latents / case}
        return write_site_of(self.world, path, paths, {"engine": self.engine, **machine})

    def train(self, case: Case) -> Run:
        """The case's run, trained to its end through all kills."""
        configuration = case.configuration
        effective_batch = configuration.processes * configuration.accumulation * configuration.batch
        site = self.write_site(case.name, configuration, case.workers[0])
        settings = [
            f"effective_batch={effective_batch}",
            f'kwrap.data="{configuration.data}"',
            *SETTINGS,
            *configuration.both,
            *case.settings,
        ]
        options = ["demo", "--site", str(site), *(part for setting in settings for part in ("--set", setting))]
        arguments = ["train", *options, "--run", case.name]
        run = Run(self.runs / case.name)
        logs = self.folder / "logs" / self.engine
        if case.cached:
            cache_with_kill(("cache", *options), self.latents / case.name, logs / f"{case.name}-cache.log")
        return train_with_kills(
            run,
            tuple(arguments),
            case.kills,
            case.workers,
            logs,
            configuration.environment,
            case.longer,
            case.branched,
            case.moved,
        )


def write_site_of(world: Path, path: Path, paths: Mapping[str, Path], machine: Mapping[str, Any]) -> Path:
    """Write the world's site at another place, with these paths and this machine; what is None is left out."""
    document = tomllib.loads((world / "site.toml").read_text(encoding="utf-8"))
    every_path = {**{name: world / below for name, below in document["paths"].items()}, **paths}
    document["paths"] = {name: str(every.resolve()) for name, every in every_path.items()}
    document["machine"] |= machine
    write_text(path, toml_text(document))
    return path


def prove(bench: Bench, cases: tuple[Case, ...]) -> int:
    """Train and compare all cases, printing a line for each; how many were identical."""
    references = {
        case.configuration: Case(f"whole-{case.configuration.name}", "", (), configuration=case.configuration)
        for case in cases
    }
    identical = 0
    with training_threads() as pool:
        # The longest first, so that none is left alone at the end.
        whole = {key: pool.submit(bench.train, reference) for key, reference in references.items()}
        ordered = sorted(cases, key=lambda case: -len(case.kills) * case.configuration.processes)
        killed = {case: pool.submit(bench.train, case) for case in ordered}
        for case in cases:
            line, same = judge(case, whole[case.configuration], killed[case])
            identical += same
            print(line, flush=True)
    return identical


def judge(case: Case, whole: Future[Run], killed: Future[Run]) -> tuple[str, bool]:
    """The line of a case and whether both runs are the same bit for bit."""
    try:
        likeness = compare_runs(whole.result(), killed.result())
    except (Difference, ProcessFailed) as found:
        return f"DIFFERENT  {case.says}: {found.message}", False
    return f"identical  {case.says}: {likeness.describe()}", True


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kohaku_wrap.proving.prove", description=__doc__)
    parser.add_argument("--engine", choices=("builtin", "sd-scripts"), default="builtin")
    parser.add_argument("--upstream", action="store_true", help="prove plain sd-scripts instead, without kwrap")
    parser.add_argument("--folder", type=Path, default=Path("prove"), help="where to work (default: prove)")
    parser.add_argument("--case", action="append", metavar="NAME", help="only this case; again for more")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when every case is identical."""
    chosen = parse_arguments(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.monotonic()
    cases = choose_cases(chosen.engine, chosen.case)
    bench = Bench(chosen.folder.absolute(), chosen.engine)
    bench.make_world()
    if chosen.upstream:
        from kohaku_wrap.proving.prove_upstream import prove_upstream

        total, identical = prove_upstream(bench.world, bench.folder / "runs" / "upstream")
    else:
        shutil.rmtree(bench.runs, ignore_errors=True)
        print(f"{len(cases)} cases with the {bench.engine} engine; each is trained, killed and resumed", flush=True)
        total, identical = len(cases), prove(bench, cases)
    print(f"in {time.monotonic() - started:.0f} s, runs in {bench.runs}")
    print(f"{total} cases, {identical} identical")
    return 0 if identical == total else 1


def other_commits() -> Iterator[Case]:
    """One case on each supported or proved commit of sd-scripts that is installed beside the one that is used."""
    used = find_trainer()
    for folder in installed_checkouts():
        known = next(each for each in list_known() if each.commit == folder.name)
        if used is not None and read_trainer_commit(used) != known.commit:
            configuration = Configuration(accumulation=4, trainer=str(folder))
            yield Case(f"commit-{known.name}", f"sd-scripts {known.name}", (Kill(0.6),), (0,), configuration)


def choose_cases(engine: str, names: list[str] | None) -> tuple[Case, ...]:
    """All cases of the engine, or those named. Raises KwrapError."""
    own = engine == "sd-scripts"
    cases = tuple(case for case in read_cases() if own or case.configuration.data == "kwrap")
    cases += tuple(other_commits()) if own else ()
    if not names:
        return cases
    known = {case.name: case for case in cases}
    if unknown := [name for name in names if name not in known]:
        raise KwrapError(f"no case is called {', '.join(unknown)}", f"There are: {', '.join(known)}.")
    return tuple(known[name] for name in names)


if __name__ == "__main__":
    run_as_work(main)
