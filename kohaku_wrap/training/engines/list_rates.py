"""The rate of each optimizer group after each update, by the engine's own scheduler on a dummy optimizer.

Called as `python -m kohaku_wrap.training.engines.list_rates RUN` with a JSON document on stdin: `groups`, how many the
optimizer had, `names`, what the metrics call them, and `chapters`, the lengths of the run. All else comes from the
run's lock. Prints a JSON list of lists,
one an update, or ends with code 1 and the reason on stderr.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kohaku_wrap.config.trainer_arguments import render_literals, render_network_args
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.formats.network_names import KOHYA_LORA, LYCORIS
from kohaku_wrap.processes import answer
from kohaku_wrap.trainer.builtin_options import BuiltinOptions
from kohaku_wrap.trainer.checkout import find_checkout, require_supported
from kohaku_wrap.training.engines.schedule import options_of_cycle
from kohaku_wrap.training.records.chapters import Cycle, find_cycle
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.lock import Lock

NETWORKS = {LYCORIS: "LycorisNetworkKohya", KOHYA_LORA: "LoRANetwork"}
"""Network modules whose groups are made here, and the class that makes them."""

BLOCK_RATES = ("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold")
PLUS_RATIOS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
TEXT, UNET = "lr_text_encoder", "lr_unet"
ENCODER_NAMES = ("lora_te1_layer", "lora_te2_layer")

MakeGroups = Callable[[Any], Any]
"""From the network to what its `prepare_optimizer_params` returns."""


class UnknownGroups(KwrapError):
    """The lock does not say which groups the optimizer had."""


class DummyModule(nn.Module):
    """Stands for one module of the network; LoRA+ knows the second half by its name."""

    def __init__(self, name: str, has_up: bool) -> None:
        super().__init__()
        self.lora_name = name
        self.lora_down = nn.Linear(1, 1, bias=False)
        if has_up:
            self.lora_up = nn.Linear(1, 1, bias=False)


def dummy_networks(module: str, arguments: Mapping[str, Any], parts: Sequence[set[str]]) -> Iterator[Any]:
    """Networks of the trainer's own class that may stand for the run's, one dummy module a part."""
    if module not in NETWORKS or any(name in arguments for name in BLOCK_RATES):
        raise UnknownGroups(f"the groups of {module} with these network_args are not known here")
    kind: Any = getattr(importlib.import_module(module), NETWORKS[module])
    for has_up in (True, False):
        for chosen in parts:
            network = kind.__new__(kind)
            nn.Module.__init__(network)
            network.block_lr = False
            for name in PLUS_RATIOS:
                setattr(network, name, float(arguments[name]) if arguments.get(name) else None)
            text = [DummyModule(name, has_up) for name in ENCODER_NAMES] if TEXT in chosen else []
            network.text_encoder_loras = text
            network.unet_loras = [DummyModule("lora_unet_layer", has_up)] if UNET in chosen else []
            yield network


def possible_parts(values: Mapping[str, Any], names: Sequence[str]) -> list[set[str]]:
    """Which parts of the model may have been trained, by the metrics or else by the lock."""
    known = {each.removesuffix("_plus") for each in names} & {TEXT, UNET}
    if known:
        return [known]
    if values.get("network_train_unet_only"):
        return [{UNET}]
    if values.get("network_train_text_encoder_only"):
        return [{TEXT}]
    return [{TEXT, UNET}, {UNET}, {TEXT}]


def find_groups(networks: Iterator[Any], make: MakeGroups, count: int) -> list[dict[str, Any]]:
    """The groups of the first network that has so many. Raises UnknownGroups where none has."""
    for network in networks:
        made = make(network)
        groups = made[0] if isinstance(made, tuple) else made
        groups = [{**group, "params": list(group["params"])} for group in groups]
        if len(groups) == count:
            return groups
    raise UnknownGroups(f"the ledger has {count} groups of the optimizer, the lock explains another number")


def list_rates(groups: list[dict[str, Any]], default: float, make_schedule: Callable[[Any], Any], updates: int) -> Any:
    """(updates, groups) the rate that each update is made with."""
    optimizer = torch.optim.SGD(groups, lr=default)
    schedule = make_schedule(optimizer)
    rates = []
    for _ in range(updates):
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return rates


def rates_of_builtin(lock: Lock, count: int, names: Sequence[str]) -> Any:
    """By the builtin engine's own functions."""
    from kohaku_wrap.training.engines.builtin.schedule import create_schedule

    options = BuiltinOptions.from_config(trainer_values(lock), on_cpu=False)
    arguments: dict[str, Any] = dict(text.split("=", 1) for text in options.network_args)
    groups = find_groups(
        dummy_networks(options.network_module, arguments, possible_parts(lock.values, names)),
        lambda network: network.prepare_optimizer_params(
            options.rate_of_text_encoders, options.unet_lr, options.learning_rate
        ),
        count,
    )
    return join_chapters(
        lock,
        lambda cycle: list_rates(
            groups,
            options.learning_rate,
            lambda optimizer: create_schedule(optimizer, options, cycle),
            cycle.optimizer_steps,
        ),
    )


def rates_of_sd_scripts(lock: Lock, count: int, names: Sequence[str]) -> Any:
    """By the functions of the checkout that the lock names."""
    from kohaku_wrap.training.engines.sd_scripts.worker import enter_checkout

    enter_checkout(require_supported(find_checkout(lock.trainer_commit)))
    sdxl_train_network = importlib.import_module("sdxl_train_network")
    objects = importlib.import_module("kohaku_wrap.training.engines.sd_scripts.objects")
    make_schedule = objects.find_object("get_scheduler_fix")
    args: argparse.Namespace = sdxl_train_network.setup_parser().parse_args([])
    for name, value in trainer_values(lock).items():
        setattr(args, name, value)

    def make(network: Any) -> Any:
        rates = args.text_encoder_lr
        if hasattr(network, "prepare_optimizer_params_with_multiple_te_lrs"):
            return network.prepare_optimizer_params_with_multiple_te_lrs(rates, args.unet_lr, args.learning_rate)
        rate = (rates[0] if rates else None) if isinstance(rates, list) else rates
        return network.prepare_optimizer_params(rate, args.unet_lr, args.learning_rate)

    networks = dummy_networks(args.network_module, lock.table("network_args"), possible_parts(vars(args), names))
    groups = find_groups(networks, make, count)

    def list_cycle(cycle: Cycle) -> Any:
        own = argparse.Namespace(**vars(args) | options_of_cycle(cycle))
        return list_rates(
            groups,
            args.learning_rate,
            lambda optimizer: make_schedule(args=own, optimizer=optimizer, num_processes=1),
            cycle.optimizer_steps,
        )

    return join_chapters(lock, list_cycle)


def join_chapters(lock: Lock, list_cycle: Callable[[Cycle], Any]) -> Any:
    """(updates, groups) of the whole run: each chapter's own part of the cycle that it is in."""
    rates: list[Any] = []
    chapters = lock.chapters
    for number, chapter in enumerate(chapters):
        cycle = find_cycle(chapters[: number + 1])
        rates = rates[: chapter.from_updates]
        rates += list_cycle(cycle)[chapter.from_updates - cycle.from_updates :]
    return rates


def trainer_values(lock: Lock) -> dict[str, Any]:
    """The trainer's options as the lock has them, with its tables of arguments as the trainer takes them."""
    values = dict(lock.values)
    if arguments := lock.table("network_args"):
        values["network_args"] = render_network_args(arguments)
    for name in ("optimizer_args", "lr_scheduler_args"):
        if arguments := lock.table(name):
            values[name] = render_literals(arguments)
    return values


def rates_of_lock() -> Any:
    """The rates that the request on stdin asks for."""
    asked = json.load(sys.stdin)
    run = Run(Path(sys.argv[1]).resolve())
    lock = run.suppose({**run.lock.tables, "chapters": asked["chapters"]}).lock
    engines = {"builtin": rates_of_builtin, "sd-scripts": rates_of_sd_scripts}
    return engines[lock.engine](lock, int(asked["groups"]), asked["names"])


if __name__ == "__main__":
    answer(rates_of_lock)
    # Threads of the trainer's packages may outlive this module.
    os._exit(0)
