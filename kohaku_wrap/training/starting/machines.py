"""Several machines of one attempt: how accelerate is told of them, and what a run must say about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kohaku_wrap.errors import UsageError, command_line
from kohaku_wrap.training.records.folder import Run

SEVERAL = "Several are said in the site before `kwrap train`: [machine] accelerate = { num_machines = 2, … }"


@dataclass(frozen=True)
class Machines:
    """The machines that train an attempt together, and which of them this is."""

    count: int = 1
    """How many."""

    rank: int = 0
    """Of this one; 0 supervises and writes the records."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `accelerate launch` that say how they find each other."""

    def arguments(self) -> Iterator[str]:
        """Of `accelerate launch`, for several processes."""
        if self.count > 1:
            options = {**self.options, "num_machines": self.count, "machine_rank": self.rank}
        else:
            left_out = ("num_machines", "main_process_ip")
            options = {"main_process_port": 0}
            options |= {name: value for name, value in self.options.items() if name not in left_out}
        yield "--multi_gpu"
        for name, value in options.items():
            if value is not False:
                yield f"--{name}"
            if not isinstance(value, bool):
                yield str(value)


ONE_MACHINE = Machines()


def refuse_machines(run: Run, machines: int, processes: int) -> None:
    """Raise UsageError where the run is of fewer machines, or the processes cannot be shared out."""
    most = run.lock.machines
    if machines > most:
        raise UsageError(
            f"run {run.name} was made for {most} machine{'s' if most > 1 else ''}, not for {machines}",
            SEVERAL,
        )
    if processes % machines:
        raise UsageError(
            f"{processes} processes cannot be shared by {machines} machines",
            "Give --processes, over all machines, or --machines.",
        )


def refuse_rank(run: Run, machine_rank: int) -> None:
    """Raise UsageError unless the run has a machine of that rank besides machine 0."""
    machines = run.lock.machines
    if machines == 1:
        raise UsageError(f"run {run.name} is of one machine", SEVERAL)
    if not 0 < machine_rank < machines:
        raise UsageError(
            f"run {run.name} has no machine of rank {machine_rank} to train along",
            f"It is of {machines} machines: rank 0 is `{command_line('resume', run.folder)}` itself, the "
            f"others are 1 to {machines - 1}.",
        )
