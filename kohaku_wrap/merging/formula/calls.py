"""The functions of a formula that are no sums: what each takes, and a call of one with exact coefficients."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction


@dataclass(frozen=True)
class Signature:
    """What a function takes: checkpoints or changes, then numbers."""

    example: str
    """A call, for messages."""

    least: int
    """How many checkpoints or changes at least."""

    most: int | None
    """And at most; None for any number."""

    of_changes: bool = False
    """Whether each must be a change, and so is the result; else all are checkpoints, or all are changes."""

    numbers: dict[str, Fraction | None] = field(default_factory=dict)
    """The numbers by name, in their order, with what they are unless given; None where they must be given."""


SIGNATURES = {
    "train_difference": Signature("train_difference(a, b, c)", 3, 3),
    "cosine": Signature("cosine(a, b)", 2, 2, numbers={"alpha": Fraction(0)}),
    "slerp": Signature("slerp(a, b, 0.5)", 2, 2, numbers={"t": None}),
    "dare": Signature("dare(tuned - base, 0.9, 7)", 1, None, True, {"drop": None, "seed": None}),
    "ties": Signature("ties(a - base, b - base)", 1, None, True, {"k": Fraction(1), "mass": Fraction(0)}),
}


def fault_of_number(name: str, value: Fraction) -> str:
    """What is wrong with a function's number, as words to come after it; empty where nothing is."""
    allowed = {
        "drop": ("is at least 0 and less than 1", 0 <= value < 1),
        "seed": ("is a whole number from 0 on", value >= 0 and value.denominator == 1),
        "k": ("is more than 0 and at most 1", 0 < value <= 1),
        "mass": ("is 0 or 1", value in (0, 1)),
    }
    words, is_allowed = allowed.get(name, ("", True))
    return "" if is_allowed else f"{name} {words}"


@dataclass(frozen=True)
class WeightedSum:
    """Exact coefficients that some tensors of the output share."""

    models: tuple[tuple[str, Fraction], ...]
    """Checkpoints and their coefficients, in the order of the formula."""

    networks: tuple[tuple[str, Fraction], ...] = ()
    """Networks and theirs."""

    calls: tuple[tuple[Call, Fraction], ...] = ()
    """Functions and theirs."""

    def __str__(self) -> str:
        parts = [f"{value} {name}" for name, value in self.models]
        parts += [f"{value} {call}" for call, value in self.calls]
        parts += [f"{value} net({name})" for name, value in self.networks]
        return " + ".join(parts).replace("+ -", "- ")

    @property
    def total(self) -> Fraction:
        """1 for a checkpoint, 0 for a change."""
        return sum((value for _, value in self.models), Fraction(0)) + sum(
            (value * call.total for call, value in self.calls), Fraction(0)
        )

    def names(self) -> list[str]:
        """The checkpoints, those inside functions too, each once."""
        inside = [name for call, _ in self.calls for part in call.arguments for name in part.names()]
        return list(dict.fromkeys([name for name, _ in self.models] + inside))

    def shares(self) -> dict[str, Fraction]:
        """How much each checkpoint counts for, a function's arguments as if it were the sum that it is nearest to."""
        shares = dict(self.models)
        for call, value in self.calls:
            for part, weight in zip(call.arguments, call.leanings(), strict=True):
                for name, share in part.shares().items():
                    shares[name] = shares.get(name, Fraction(0)) + value * weight * share
        return {name: share for name, share in shares.items() if share}


@dataclass(frozen=True)
class Call:
    """A function of sums, for the keys that have these coefficients."""

    function: str
    """A name of SIGNATURES."""

    arguments: tuple[WeightedSum, ...]
    """Without networks."""

    numbers: tuple[Fraction, ...]
    """All that the signature names, in its order."""

    def __str__(self) -> str:
        return f"{self.function}({', '.join(map(str, (*self.arguments, *self.numbers)))})"

    @property
    def total(self) -> Fraction:
        """What the coefficients of each argument sum to."""
        return self.arguments[0].total

    def leanings(self) -> list[Fraction]:
        """A weight for each argument: those of the sum that the function is nearest to."""
        if self.function == "train_difference":
            return [Fraction(1), Fraction(1), Fraction(-1)]
        if self.function == "slerp":
            return [1 - self.numbers[0], self.numbers[0]]
        return [Fraction(1, len(self.arguments))] * len(self.arguments)
