"""The optimizer and the schedule of a branch: moments of its parent's state, all else from its own options.

A plain load would bring the parent's rates, weight decay, betas and eps back, some of them after one step.
"""

from __future__ import annotations

import inspect
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from kohaku_wrap.training.records.attempts import Attempt
from kohaku_wrap.training.records.bad_steps import BadSteps
from kohaku_wrap.training.records.origin import Taken, name_optimizer, write_taken


def take_up_branch(
    optimizer: Any, schedule: Any, saved: Mapping[str, Any], attempt: Attempt, rank: int, names: Mapping[str, int]
) -> None:
    """Give a fresh optimizer what fits of its parent's moments and counters, and bring a fresh schedule to its place.

    `saved`: the parent's optimizer, as its `state_dict` was. `names`: the optimizer's group behind each name of a
    rate. What was taken is kept with the attempt.
    """
    origin = attempt.lock.origin
    assert origin is not None
    own = name_optimizer(attempt.lock.values)
    inner = getattr(optimizer, "optimizer", optimizer)
    if own.lower() == origin.optimizer.lower():
        is_same = attempt.lock.options_digest == origin.options_digest
        taken = take_moments(optimizer, inner, saved, {group: name for name, group in names.items()}, is_same)
    else:
        taken = Taken((), (f"moments: the optimizer was {origin.optimizer}, is {own}",))
    if origin.continues and schedule is not None:
        updates = attempt.start_optimizer_step - BadSteps.at_start(attempt).skipped
        advance(schedule, updates - attempt.lock.cycle.from_updates)
    if rank == 0:
        weights = f"all weights of optimizer step {origin.optimizer_step:,}"
        write_taken(attempt.folder, Taken((weights, *taken.taken), taken.left))
        for words in (*taken.taken, *(f"not taken: {each}" for each in taken.left)):
            print(words, flush=True)


def advance(schedule: Any, updates: int) -> None:
    """Bring a fresh schedule to its place after so many updates, with its rates in the optimizer's groups."""
    with warnings.catch_warnings():
        # torch warns of a schedule that steps before its optimizer.
        warnings.simplefilter("ignore")
        for _ in range(updates):
            schedule.step()


def take_moments(
    optimizer: Any, inner: torch.optim.Optimizer, saved: Mapping[str, Any], names: Mapping[int, str], is_same: bool
) -> Taken:
    """Load the moments and counters of each group of which every parameter's fit; no hyperparameter.

    `is_same`: all options are the parent's, so that no form of the moments has to be tried.
    """
    fresh = inner.state_dict()
    merged: dict[str, Any] = {"state": {}, "param_groups": [dict(group) for group in fresh["param_groups"]]}
    counters = inner.defaults.keys() - list_hyperparameters(type(inner))
    rest = list(saved["param_groups"])
    taken, left = [], []
    for number, group in enumerate(merged["param_groups"]):
        name = names.get(number, f"group {number}")
        parameters = inner.param_groups[number]["params"]
        why = f"the parent has no group of {len(parameters):,} parameters left"
        for candidate in [each for each in rest if len(each["params"]) == len(parameters)]:
            moments = [saved["state"].get(index, {}) for index in candidate["params"]]
            why = "" if is_same else find_misfit(inner, number, moments)
            if why:
                continue
            rest.remove(candidate)
            merged["state"] |= {at: each for at, each in zip(group["params"], moments, strict=True) if each}
            group.update({key: candidate[key] for key in counters if key in candidate})
            told = sum(bool(each) for each in moments)
            rest_words = "" if told == len(moments) else "; the others never had a gradient, and so none"
            taken.append(f"{name}: moments of {told:,} of {len(moments):,} parameters{rest_words}")
            break
        else:
            left.append(f"{name}: moments: {why}")
    optimizer.load_state_dict(merged)
    return Taken(tuple(taken), tuple(left))


def list_hyperparameters(kind: type) -> set[str]:
    """What the classes of an optimizer take as arguments; other entries of its groups are its own counters."""
    makers = [vars(each)["__init__"] for each in kind.__mro__ if "__init__" in vars(each)]
    return {name for each in makers for name in inspect.signature(each).parameters}


def find_misfit(inner: torch.optim.Optimizer, number: int, moments: list[Mapping[str, Any]]) -> str:
    """Why the parent's moments do not fit a group; empty where they do."""
    group = inner.param_groups[number]
    for parameter, found in zip(group["params"], moments, strict=True):
        has = dict(list_shapes(found))
        needs = try_step(inner, group, parameter) if found else has
        if needs is None:
            # It cannot be tried: one of them must at least be as large as the parameter.
            needs = has if parameter.shape in has.values() else {}
        if needs != has:
            made = f"{type(inner).__name__} with these options has {describe_shapes(needs)}"
            return f"those of the parent are {describe_shapes(has)}; {made}"
    return ""


def try_step(inner: torch.optim.Optimizer, group: Mapping[str, Any], parameter: torch.Tensor) -> Any:
    """The shapes of the moments that one step on a copy of a parameter makes; None where it cannot be tried."""
    probe: Any = object.__new__(type(inner))
    copy = parameter.detach().clone().requires_grad_()
    copy.grad = torch.zeros_like(copy)
    probe.__dict__ = {**vars(inner), "state": defaultdict(dict), "param_groups": [{**group, "params": [copy]}]}
    try:
        if hasattr(probe, "train"):
            # Optimizers without a schedule refuse to step otherwise.
            probe.train()
        type(inner).step(probe)
    except Exception:  # whatever an optimizer raises on one parameter alone: then it cannot be tried
        return None
    return dict(list_shapes(probe.state[copy]))


def list_shapes(moments: Mapping[str, Any]) -> Iterator[tuple[str, torch.Size]]:
    """Name and shape of what has more than one number; counters have none. bitsandbytes nests what it quantizes."""
    for name, value in moments.items():
        if isinstance(value, Mapping):
            yield from list_shapes(value)
        elif isinstance(value, torch.Tensor) and value.ndim:
            yield name, value.shape


def describe_shapes(shapes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {'×'.join(map(str, shape))}" for key, shape in shapes.items()) or "none"
