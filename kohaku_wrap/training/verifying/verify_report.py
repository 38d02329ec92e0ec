"""What `kwrap verify` reports: how far the ledger proves the run, and in which words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.networks import Network
from kohaku_wrap.training.verifying.ledger_checks import LOSS_TOLERANCE, Fault, Overlaps
from kohaku_wrap.training.verifying.line_checks import Check


@dataclass(frozen=True)
class Repeat:
    """What an attempt trained that a later one trained again."""

    attempt: int
    """The attempt whose work was left behind."""

    first_optimizer_step: int
    """The first step trained again, counted from 1."""

    last_optimizer_step: int
    """The last one, perhaps in part."""

    records: int
    """Micro-batches."""


@dataclass(frozen=True)
class VerifyReport:
    """What the ledger proves."""

    run: Run
    """The run."""

    attempts: int
    """Attempts that left records."""

    records: int
    """Micro-batches recorded, repeats included."""

    optimizer_steps: int
    """Whole optimizer steps proved, from the first on."""

    total_optimizer_steps: int
    """Of the run."""

    is_finished: bool
    """Whether the run has its final network."""

    positions: int
    """Positions trained exactly once, fills included."""

    fills: int
    """Of these, the ones that only complete an epoch's last optimizer step."""

    substitutes: int
    """Batches in which an unreadable image was replaced."""

    in_progress: int
    """Micro-batches of an optimizer step that is not whole yet."""

    order_checked: bool
    """Whether the images at each position were recomputed from seed and dataset."""

    compared: int
    """Positions recorded by more than one attempt, whose digests were compared."""

    skipped_images_loaded: int
    """Images that resumes opened for positions already trained; 0 when skipping costs nothing."""

    repeats: tuple[Repeat, ...]
    """What crashes repeated."""

    faults: tuple[Fault, ...]
    """Empty when all is proved."""

    notes: tuple[str, ...]
    """What the reader should know."""

    deep_samples: int
    """Micro-batches recomputed from images and captions."""

    skipped_steps: int
    """Optimizer steps on the line that the GradScaler skipped."""

    non_finite_steps: int
    """Optimizer steps on the line whose mean loss was no number."""

    checks: tuple[Check, ...]
    """What was looked at and what was not: order, losses, options, skipped steps, rates, networks, deep."""

    unverified: tuple[str, ...]
    """Options of the run that are left to the trainer: it is proved except for these."""

    changed_after: tuple[str, ...]
    """What is no longer as lock or records say, networks too; the ledger is not held against it."""

    @property
    def is_proved(self) -> bool:
        return not self.faults


def describe_losses(overlaps: Overlaps) -> Check:
    """What the comparison of losses came to."""
    if not overlaps.positions:
        return Check("losses", True, "no position was trained twice")
    parts = []
    if overlaps.exact:
        parts.append(f"{overlaps.exact:,} compared bit for bit")
    if overlaps.loose:
        parts.append(
            f"{overlaps.loose:,} compared to within {LOSS_TOLERANCE:.0%}, the largest difference {overlaps.largest:.2%}"
        )
    if overlaps.left_out:
        parts.append(f"{overlaps.left_out:,} not, as the attempts have other options by --allow")
    return Check("losses", overlaps.left_out == 0, "; ".join(parts))


def describe_networks(networks: Sequence[Network]) -> Check:
    """Whether the checkpoints are what the run wrote."""
    if not networks:
        return Check("networks", True, "none is there")
    unknown = [network.path.name for network in networks if not network.written]
    changed = [network.path.name for network in networks if network.is_changed]
    same = len(networks) - len(unknown) - len(changed)
    parts = [f"{same:,} as the run wrote them"] if same else []
    parts += [f"not what the run wrote: {', '.join(changed)}"] if changed else []
    parts += [f"{', '.join(unknown)}: the run has no sha256 of what it wrote"] if unknown else []
    return Check("networks", not unknown, "; ".join(parts))
