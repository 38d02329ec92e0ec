"""Every option has a row in the table of fates, and a row cannot be made of anything else."""

import pytest

from kohaku_wrap.config.code_names import load_signatures
from kohaku_wrap.config.fates import (
    Fate,
    fate_of,
    fate_of_key,
    list_unverified,
    load_fates,
    parse_fates,
)
from kohaku_wrap.config.layers import load_layers
from kohaku_wrap.config.templates import list_templates
from kohaku_wrap.trainer.options import load_recorded_table


def test_every_option_has_a_row() -> None:
    table, rows = load_recorded_table(), load_fates()
    assert len(table.options) >= 196
    missing = [name for name in table.options if not {("option", name), ("dataset", name)} & rows.keys()]
    missing += [name for name in table.dataset_options if ("dataset", name) not in rows]
    taken = {name for entry in load_signatures().values() for name in entry["arguments"] or ()}
    missing += [name for name in taken if ("optimizer_args", name) not in rows]
    assert missing == []


def test_every_row_says_why_or_how_it_is_tried() -> None:
    for (place, name), fate in load_fates().items():
        assert fate.reason if fate.kind in ("refused", "unverified") else not fate.reason, (place, name)
        if fate.kind in ("weights", "files"):
            assert fate.other is not None or fate.untestable or fate.given_by, (place, name)


MOST_LEFT_TO_THE_TRAINER = 15


def test_few_are_left_to_the_trainer_and_no_shipped_template_uses_one() -> None:
    assert sum(fate.kind == "unverified" for fate in load_fates().values()) <= MOST_LEFT_TO_THE_TRAINER
    names = [template.name for template in list_templates() if template.origin != "yours"]
    assert names
    for name in names:
        effective, _ = load_layers(name)
        fates = {key: fate_of_key(key) for key in effective.entries}
        assert {key for key, fate in fates.items() if fate and fate.kind in ("refused", "unverified")} == set(), name


def test_a_name_of_both_files_is_found_in_either_place() -> None:
    assert fate_of("option", "shuffle_caption") == fate_of("dataset", "shuffle_caption")
    assert fate_of("preset", "name_algo_map.lora_unet.factor") == fate_of("preset", "map.factor")


def test_what_no_row_names_is_unverified_and_in_the_digest() -> None:
    fate = fate_of("option", "an_option_of_next_year")
    assert fate.kind == "unverified" and fate.in_digest
    files = {
        "trainer.toml": "[training]\nseed = 1\nan_option_of_next_year = 2\n",
        "dataset.toml": "[[datasets]]\nbatch_size = 2\n[[datasets.subsets]]\nnum_repeats = 1\ntwice_as_new = true\n",
    }
    assert list_unverified(files) == ("an_option_of_next_year", "twice_as_new")
    assert list_unverified({}) == ()
    assert fate_of("optimizer_args", "an_argument_of_ones_own") == Fate(
        "weights", untestable="not in kwrap's table: an argument of a class of its own"
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('[options]\na = {fate = "files"}', r"\[options\] is no place"),
        ('[option]\na = {fate = "maybe"}', "option.a: 'maybe' is no fate"),
        ('[option]\na = {fate = "files", ohter = 1}', "option.a: .*ohter"),
    ],
)
def test_a_row_of_anything_else_is_refused(row: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_fates(row)


def test_places_lengths_and_what_an_attempt_may_have_are_not_in_the_digest() -> None:
    for name in ("pretrained_model_name_or_path", "max_train_steps", "gradient_accumulation_steps", "save_state"):
        assert not fate_of("option", name).in_digest
    for name in ("min_snr_gamma", "xformers", "torch_compile", "train_batch_size"):
        assert fate_of("option", name).in_digest


def test_kwraps_own_keys_have_a_fate_too() -> None:
    kinds = {key: fate.kind for key in ("effective_batch", "kwrap.data", "states.keep") if (fate := fate_of_key(key))}
    assert kinds == {"effective_batch": "weights", "kwrap.data": "weights", "states.keep": "files"}
    assert fate_of_key("notes_of_ones_own.colour") is None
