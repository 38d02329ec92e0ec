"""The arithmetic of epochs, batches and optimizer steps: the one place where steps are counted."""

from __future__ import annotations

from dataclasses import dataclass

from kohaku_wrap.errors import KwrapError


class BadOrder(KwrapError):
    """The numbers given do not make an order of batches."""


def divisors_of(number: int) -> list[int]:
    """All whole numbers that divide `number`, ascending."""
    return [each for each in range(1, number + 1) if number % each == 0]


@dataclass(frozen=True)
class Position:
    """Where training stands after some optimizer steps."""

    epoch: int
    """Counted from 0."""

    micro_batch: int
    """Micro-batches that each process has done in this epoch."""

    global_position: int
    """Global batch positions of this epoch that all processes together have done."""


@dataclass(frozen=True)
class StepCount:
    """The arithmetic of epochs, positions and optimizer steps; independent of the number of processes."""

    batches: int
    """Batches of one epoch, all buckets together."""

    group: int
    """Batches in one optimizer step: processes times accumulation."""

    def __post_init__(self) -> None:
        if self.batches < 1 or self.group < 1:
            raise BadOrder(
                f"{self.batches} batches in groups of {self.group} cannot be trained",
                "Check that the dataset holds images and that the effective batch is at least the batch per GPU.",
            )

    @property
    def optimizer_steps_per_epoch(self) -> int:
        return -(-self.batches // self.group)

    @property
    def positions_per_epoch(self) -> int:
        """Batches and the fills that complete the last optimizer step."""
        return self.optimizer_steps_per_epoch * self.group

    def accumulation(self, processes: int) -> int:
        """Micro-batches of one process in an optimizer step; raises BadOrder where they do not divide."""
        if processes < 1 or self.group % processes:
            raise BadOrder(
                f"{processes} processes do not divide the {self.group} batches of an optimizer step",
                f"The number of processes may be {', '.join(map(str, divisors_of(self.group)))}.",
            )
        return self.group // processes

    def micro_batches_per_process(self, processes: int) -> int:
        """Micro-batches of one process in an epoch; always whole optimizer steps."""
        return self.optimizer_steps_per_epoch * self.accumulation(processes)

    def position_of(self, optimizer_steps_done: int, processes: int) -> Position:
        """The position at which the step after `optimizer_steps_done` starts."""
        epoch, steps_in_epoch = divmod(optimizer_steps_done, self.optimizer_steps_per_epoch)
        return Position(
            epoch=epoch,
            micro_batch=steps_in_epoch * self.accumulation(processes),
            global_position=steps_in_epoch * self.group,
        )

    def optimizer_step_of(self, epoch: int, position: int) -> int:
        """The optimizer step, counted from 1 over the whole run, that trains this global position."""
        return epoch * self.optimizer_steps_per_epoch + position // self.group + 1


@dataclass(frozen=True)
class Bucket:
    """One bucket that holds images."""

    width: int
    """Pixels."""

    height: int
    """Pixels."""

    images: int
    """Images in it, repeats included."""

    batches: int
    """Batches in an epoch: images by batch, rounded up."""


@dataclass(frozen=True)
class StepPlan:
    """What one training will count."""

    images: int
    """Images in one epoch, repeats included."""

    buckets: tuple[Bucket, ...]
    """By width, then height."""

    batch_size: int
    """Images in a full micro-batch of one process."""

    processes: int
    """Training processes."""

    accumulation: int
    """Micro-batches of one process per optimizer step."""

    batches: int
    """Batches in one epoch, over all buckets and processes."""

    micro_batches_per_epoch: int
    """Micro-batches of one process in one epoch, as sd-scripts counts them: batches by processes, rounded up."""

    optimizer_steps_per_epoch: int
    """Weight updates in one epoch."""

    epochs: int
    """Epochs, the last one perhaps cut short."""

    total_optimizer_steps: int
    """Weight updates in all."""

    @property
    def group(self) -> int:
        """Micro-batches per optimizer step over all processes."""
        return self.processes * self.accumulation

    @property
    def effective_batch(self) -> int:
        """Images per optimizer step where all batches are full."""
        return self.group * self.batch_size

    @property
    def fills_per_epoch(self) -> int:
        """Batches that kwrap's order repeats so that the epoch's last optimizer step is whole."""
        return self.optimizer_steps_per_epoch * self.group - self.batches

    @property
    def bucket_fill(self) -> float:
        """Images by places in the batches: 1 where every batch is full."""
        return self.images / (self.batches * self.batch_size)

    @property
    def images_per_optimizer_step(self) -> float:
        """The mean of images in one weight update."""
        return self.images / self.optimizer_steps_per_epoch
