"""Prove on this machine that a commit of sd-scripts which kwrap does not know trains and resumes exactly.

Captions are compared with the commit's own dataset class; the small world is trained once as a whole, once killed and
resumed, and once on a supported commit; a part of the census of options is run. What was proved is kept under
`$KWRAP_HOME` by the digest of the checkout: from then on it is taken as a supported commit is.

`make prove ENGINE=sd-scripts COMMIT=C` proves a commit that is installed, a supported one too, and writes it into the
list of proved releases, docs/proved.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kohaku_wrap.config.fates import load_fates
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import home_folder, write_text
from kohaku_wrap.locks import holding_lock
from kohaku_wrap.outlets import run_as_work
from kohaku_wrap.processes import ask_python, setting_variables
from kohaku_wrap.proving.census import choose_rows, walk
from kohaku_wrap.proving.census_bench import CensusBench
from kohaku_wrap.proving.killing import Kill, training_threads
from kohaku_wrap.proving.likeness import Difference, compare_runs
from kohaku_wrap.proving.prove import Bench, Case, Configuration
from kohaku_wrap.trainer.checkout import (
    INSTALLED,
    Checkout,
    ImpossiblePair,
    find_checkout,
    find_commit,
    inspect_checkout,
    install_checkout,
    require_supported,
    require_transformers,
)
from kohaku_wrap.trainer.commits import (
    IMPORTED_FOLDERS,
    SUPPORTED,
    SUPPORTED_TEXT,
    TRAINING_SCRIPTS,
    TRIAL_VARIABLE,
    SupportedCommit,
    digest_sources,
    trainer_folder,
    write_proof,
)
from kohaku_wrap.trainer.corrections import require_anchors
from kohaku_wrap.trainer.git import run_git
from kohaku_wrap.trainer.installed import CHECKOUT_VARIABLE, is_decisive, list_versions, plain_name
from kohaku_wrap.trainer.requirements import InstallFailed, find_set, require_requirements, requirement_paths
from kohaku_wrap.training.records.folder import Run

ROWS = (
    "option.min_snr_gamma",
    "option.noise_offset",
    "option.loss_type",
    "option.max_grad_norm",
    "option.ip_noise_gamma",
    "option.highvram",
    "dataset.flip_aug",
    "dataset.shuffle_caption",
)
"""The part of the census: what the trainer's loss, noise and dataset make of options."""

KILLS = (Kill(0.5), Kill(1.3))


class NotProved(KwrapError):
    """Something of the proof was not as it must be."""


@dataclass(frozen=True)
class Step:
    """One thing that was tried."""

    tried: str
    """What."""

    result: str
    """What came of it."""

    seconds: float
    """How long it took."""


@dataclass(frozen=True)
class Proof:
    """What was proved of one checkout, and on what."""

    commit: SupportedCommit
    """As it is known from now on."""

    reference: str
    """The supported commit that it was compared with."""

    difference: str
    """The first record that differs from the reference; empty where all are equal."""

    date: str
    """The day, UTC."""

    versions: Mapping[str, str]
    """Of the packages that compute something."""

    steps: tuple[Step, ...]
    """All that was tried."""

    def about(self) -> dict[str, Any]:
        """All but the commit, as plain data."""
        return {name: value for name, value in asdict(self).items() if name != "commit"}


class Trial:
    """One proof in the making."""

    def __init__(self, checkout: Checkout, folder: Path, on_note: Callable[[str], None]) -> None:
        self.checkout = checkout
        self.is_edited = not checkout.commit or checkout.is_changed or was_edited(checkout.path)
        self.name = f"{checkout.name}-changed" if self.is_edited else checkout.name
        self.folder = folder
        self.on_note = on_note
        self.steps: list[Step] = []

    def step(self, tried: str, work: Callable[[], str]) -> None:
        """Do one part, and write down what came of it. A part that raises ends the proof as NotProved."""
        started = time.monotonic()
        try:
            result = work()
        except KwrapError as fault:
            raise NotProved(
                f"sd-scripts {self.name} is not proved: {tried}: {fault.message}", fault.next_step
            ) from fault
        self.steps.append(Step(tried, result, round(time.monotonic() - started, 1)))
        self.on_note(f"{tried}: {result}")

    def run(self, reference: Checkout, *, accept_difference: bool) -> Proof:
        """The whole proof. Raises NotProved."""
        digest, date = digest_sources(self.checkout.path), datetime.now(UTC).date().isoformat()
        commit = SupportedCommit(self.name, self.checkout.commit, digest)
        if self.is_edited:
            commit = replace(commit, commit=f"files-{digest[:12]}")
        require_anchors(self.checkout.path, self.checkout.name)
        answer: dict[str, Any] = {}
        self.step("captions", lambda: self.compare_captions(answer))
        commit = replace(commit, joins_by_separator=bool(answer["joins_by_separator"]), support="on trial")
        trial = write_proof(commit, {}, self.folder / "trial.json")
        difference = ""
        with setting_variables({TRIAL_VARIABLE: str(trial), CHECKOUT_VARIABLE: str(self.checkout.path)}):
            whole, killed, known = self.train(reference)
            self.step("killed and resumed", lambda: compare_runs(whole, killed).describe())
            try:
                self.step(f"compared with {reference.name}", lambda: compare_runs(known, whole).describe())
            except NotProved as found:
                if not accept_difference or not isinstance(found.__cause__, Difference):
                    advice = f"Add --accept-difference to keep it as exact here, not equal to {reference.name}."
                    raise NotProved(found.message, advice) from found
                difference = found.__cause__.message
                self.steps.append(Step(f"compared with {reference.name}", f"accepted: {difference}", 0.0))
            self.step("options", self.try_options)
        support = f"exact here on {date}, not equal to {reference.name}: {difference}"
        if not difference:
            support = f"proved on this machine on {date}, identical to {reference.name}"
        versions = {name: version for name, version in list_versions(requirement_paths()).items() if is_decisive(name)}
        return Proof(replace(commit, support=support), reference.name, difference, date, versions, tuple(self.steps))

    def compare_captions(self, answer: dict[str, Any]) -> str:
        """Have the commit's own dataset change captions."""
        answer |= ask_python("kohaku_wrap.training.engines.sd_scripts.compare_captions", self.checkout.path)
        if found := answer.get("difference"):
            raise Difference(found)
        joint = "caption_separator" if answer["joins_by_separator"] else "a comma"
        return f"{answer['texts']:,} texts are the same; shuffled tags are joined by {joint}"

    def train(self, reference: Checkout) -> tuple[Run, Run, Run]:
        """The small world as a whole, with kills, and on the reference."""
        bench = Bench(self.folder, "sd-scripts")
        own, theirs = (Configuration(trainer=str(each.path)) for each in (self.checkout, reference))
        cases = (
            Case("whole", "", (), configuration=own),
            Case("killed", "", KILLS, (0, 2), own),
            Case("reference", "", (), configuration=theirs),
        )
        runs: list[Run] = []

        def work() -> str:
            bench.make_world()
            with training_threads() as pool:
                runs.extend(pool.map(bench.train, cases))
            return f"uninterrupted, with {len(KILLS)} kills, and on {reference.name}"

        self.step("trainings", work)
        return runs[0], runs[1], runs[2]

    def try_options(self) -> str:
        """Some rows of the table of fates. Raises Difference for one that says otherwise."""
        with CensusBench(self.folder, 1) as bench:
            seen = list(walk(bench, choose_rows(load_fates(), list(ROWS)), 1))
        if wrong := [each for each in seen if each.is_wrong]:
            raise Difference(wrong[0].line())
        return f"{len(seen)} of the census, each as kwrap's table says"


def was_edited(checkout: Path) -> bool:
    """Whether git knows the files that are trained with otherwise than they are."""
    paths = (*TRAINING_SCRIPTS, *IMPORTED_FOLDERS)
    return (checkout / ".git").exists() and bool(run_git(["status", "--porcelain", "--", *paths], checkout).strip())


def prove_checkout(
    checkout: Checkout,
    folder: Path,
    source: str = "",
    *,
    accept_difference: bool = False,
    keep: bool = True,
    on_note: Callable[[str], None] = lambda note: None,
) -> Proof:
    """Prove a checkout, working in `folder`, and with `keep` have it taken like a supported one from then on.

    Raises NotProved, AnchorsMissing, MissingRequirements, ImpossiblePair.

    `source`: where a supported commit to compare with is got from, where none is installed.
    """
    require_requirements()
    require_transformers(checkout)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    reference = find_reference(checkout, source or str(checkout.path), on_note)
    trial = Trial(checkout, folder.absolute(), on_note)
    on_note(f"Proving sd-scripts {trial.name} against {reference.name}; this takes some minutes")
    proof = trial.run(reference, accept_difference=accept_difference)
    if keep:
        write_proof(proof.commit, proof.about())
    return proof


def find_reference(checkout: Checkout, source: str, on_note: Callable[[str], None]) -> Checkout:
    """A supported commit other than the checkout's own: one that is installed, else from `source`. Raises NotProved."""
    others = [known for known in SUPPORTED if known.commit != checkout.commit or checkout.is_changed]
    for known in others:
        folder = trainer_folder() / known.commit
        if folder.is_dir() and (found := inspect_checkout(folder, INSTALLED)).is_supported:
            with suppress(ImpossiblePair):
                return require_supported(found)
    for known in others:
        with suppress(InstallFailed, ImpossiblePair):
            return install_checkout(source, known.commit, on_note)[0]
    raise NotProved(
        f"sd-scripts {checkout.name} is not proved: no supported commit is here to compare with, nor in {source}",
        f"Install one, and try again: kwrap trainer install. Supported: {SUPPORTED_TEXT}.",
    )


LISTED = ("accelerate", "diffusers", "lycoris-lora", "torch", "transformers")
LIST_HEAD = """# Releases of sd-scripts that were proved

Written by `make prove ENGINE=sd-scripts COMMIT=C`: on a CPU, trained as a whole, killed, resumed, compared with another
supported commit and with a part of the option census; see [exact resume](exact-resume.md#another-commit-of-sd-scripts).

| commit | hash | set of versions | identical to | date | versions |
|---|---|---|---|---|---|
"""


def write_list(proof: Proof, path: Path) -> None:
    """Put a proof into the list of proved releases, in place of an older one of the same commit and set of versions."""
    text = path.read_text(encoding="utf-8") if path.exists() else LIST_HEAD
    rows = [line for line in text.removeprefix(LIST_HEAD).splitlines() if line]
    versions = ", ".join(f"{name} {found}" for name, found in proof.versions.items() if plain_name(name) in LISTED)
    same = f"no: {proof.difference}" if proof.difference else proof.reference
    pair = f"| {proof.commit.name} | {proof.commit.commit[:10]} | {find_set() or 'default'} |"
    rows = [row for row in rows if not row.startswith(pair)]
    rows.append(f"{pair} {same} | {proof.date} | {versions} |")
    write_text(path, LIST_HEAD + "\n".join(rows) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when the commit is proved."""
    parser = argparse.ArgumentParser(prog="python -P -m kohaku_wrap.proving.prove_trainer", description=__doc__)
    parser.add_argument("--commit", required=True, help="a tag or hash that is installed")
    parser.add_argument("--folder", type=Path, default=Path("prove/trainer"), help="where to work")
    parser.add_argument("--list", type=Path, default=Path("docs/proved.md"), help="the list of proved releases")
    chosen = parser.parse_args(arguments)
    known = find_commit(chosen.commit)
    checkout = find_checkout(known.commit if known else chosen.commit)
    if known and checkout.commit != known.commit:
        raise NotProved(
            f"{CHECKOUT_VARIABLE} points at {checkout.path}, which is not at {known.name} but at {checkout.name}",
            f"Unset {CHECKOUT_VARIABLE}, or prove that checkout by: kwrap trainer prove",
        )
    shutil.rmtree(chosen.folder, ignore_errors=True)
    # That of a supported commit is for the list alone.
    proof = prove_checkout(checkout, chosen.folder, keep=not checkout.is_supported, on_note=print)
    write_list(proof, chosen.list)
    return 0


@contextmanager
def proof_folder(checkout: Checkout) -> Iterator[Path]:
    """Where a proof works, beside the proofs that are kept: empty at first, and removed when the block ends well.

    Raises NotProved where another process tries the same files.
    """
    folder = home_folder() / "proofs" / "work" / digest_sources(checkout.path)[:12]
    folder.parent.mkdir(parents=True, exist_ok=True)
    busy = NotProved(
        f"sd-scripts {checkout.name}: another process is proving these files already",
        "Wait for it, then look: kwrap trainer show",
    )
    with holding_lock(folder.with_suffix(".lock"), busy):
        shutil.rmtree(folder, ignore_errors=True)
        yield folder
        shutil.rmtree(folder)


if __name__ == "__main__":
    run_as_work(main)
