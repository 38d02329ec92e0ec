"""The options that the builtin engine takes, and the many that it refuses by name."""

from __future__ import annotations

from typing import Any

import pytest

from kohaku_wrap.errors import ProblemsFound
from kohaku_wrap.trainer.builtin_options import BuiltinOptions

NEEDED = {
    "pretrained_model_name_or_path": "model.safetensors",
    "output_dir": "out",
    "output_name": "name",
    "tokenizer_cache_dir": "tokenizers",
    "seed": 1,
}


def read(values: dict[str, Any], on_cpu: bool = True) -> BuiltinOptions:
    return BuiltinOptions.from_config({"any": NEEDED, "other": values}, on_cpu)


def problems(values: dict[str, Any], on_cpu: bool = True) -> set[str]:
    with pytest.raises(ProblemsFound) as found:
        read(values, on_cpu)
    return {problem.where for problem in found.value.problems}


def test_all_faults_come_at_once_by_name() -> None:
    faults = {"xformers": True, "v_parameterization": True, "learning_rat": 1.0, "optimizer_type": "Prodigy"}
    assert problems(faults | {"lr_scheduler": "polynomial", "network_module": "networks.lora"}) == {
        *faults, "lr_scheduler", "network_module",
    }  # fmt: skip


def test_what_is_off_anyway_is_no_fault() -> None:
    read({"xformers": False, "cache_latents": False, "loss_type": "l2", "clip_skip": None, "logging_dir": "logs"})


def test_missing_options_are_named() -> None:
    with pytest.raises(ProblemsFound) as found:
        BuiltinOptions.from_config({}, True)
    assert {problem.where for problem in found.value.problems} == set(NEEDED)


def test_fp16_needs_a_gpu() -> None:
    assert problems({"mixed_precision": "fp16"}) == {"mixed_precision"}
    assert read({"mixed_precision": "fp16"}, on_cpu=False).mixed_precision == "fp16"


def test_warmup_needs_a_schedule_that_has_one() -> None:
    assert problems({"lr_scheduler": "constant", "lr_warmup_steps": 4}) == {"lr_warmup_steps"}
    assert read({"lr_scheduler": "cosine", "lr_warmup_steps": 0.25}).warmup_optimizer_steps(40) == 10
    assert read({"lr_scheduler": "cosine", "lr_warmup_steps": 7}).warmup_optimizer_steps(40) == 7


def test_arguments_must_be_pairs_with_literals() -> None:
    assert problems({"optimizer_args": ["betas=0.9,0.95", "weight_decay"]}) == {"optimizer_args"}
    assert problems({"optimizer_args": ["betas=nine"]}) == {"optimizer_args"}
    assert problems({"network_args": ["algo"]}) == {"network_args"}


@pytest.mark.parametrize(("value", "rate"), [(None, None), (1e-5, 1e-5), ([1e-5], 1e-5), ([3e-5, 4e-5], 3e-5)])
def test_lycoris_takes_the_first_text_encoder_rate(value: Any, rate: float | None) -> None:
    assert read({"text_encoder_lr": value}).rate_of_text_encoders == rate
