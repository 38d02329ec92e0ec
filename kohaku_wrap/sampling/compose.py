"""A prompt in the model's own order, from tags or from a post, by the rules of the dataset's captions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kohaku_wrap.dataset.captions.explanation import PostExplanation
from kohaku_wrap.dataset.captions.plan import FATES, WRITTEN, plan_captions
from kohaku_wrap.dataset.captions.recipe import CaptionRecipe, words_of_recipe
from kohaku_wrap.dataset.captions.words import SEPARATOR
from kohaku_wrap.errors import UsageError
from kohaku_wrap.metadata.tags import TagTable
from kohaku_wrap.sampling.grammar import Piece, Prompt, escape_text, format_piece, parse_prompt

STYLE_PLACE = "{style}"
"""Where a prompt of a sheet wants its style; without it the style comes behind the leading people counts."""

WEIGHTED = re.compile(r"\((?P<words>.*):\s*(?P<weight>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*\)")
ESCAPED = re.compile(r"\\([\\()\[\]])")


@dataclass(frozen=True)
class ComposedPrompt:
    """A prompt made of tags."""

    text: str
    """In the webui's grammar."""

    groups: tuple[tuple[str, tuple[str, ...]], ...]
    """In the order of the prompt: group and its words, as the prompt has them."""

    left_out: tuple[tuple[str, str], ...] = ()
    """Tags that the dataset's rules leave out, each with the reason."""


def join_groups(groups: Sequence[tuple[str, Sequence[str]]], style: str, left_out: Sequence[tuple[str, str]] = ()
) -> ComposedPrompt:  # fmt: skip
    """The prompt of these groups; a style takes the place behind the artists."""
    if style:
        names = [name for name, _ in groups]
        if "artist" not in names:
            place = names.index("general") if "general" in names else len(names)
            groups = [*groups[:place], ("artist", ()), *groups[place:]]
        groups = [(name, [*words, style] if name == "artist" else words) for name, words in groups]
    text = ", ".join(word for _, words in groups for word in words)
    return ComposedPrompt(text, tuple((name, tuple(words)) for name, words in groups), tuple(left_out))


def compose_post(explanation: PostExplanation, style: str = "", keep_artists: bool = True) -> ComposedPrompt:
    """The prompt that a post's caption makes."""
    groups = [
        (name, [escape_text(word) for word in words] if keep_artists or name != "artist" else [])
        for name, words in explanation.groups
        if name != SEPARATOR
    ]
    return join_groups(groups, style)


def compose_tags(tags: str, recipe: CaptionRecipe, known: TagTable | None, style: str = "") -> ComposedPrompt:
    """The prompt of tags that commas part, written as the site or as a prompt has them, with weights or without.

    `known`: the database's tags, which tell characters, series and artists from general tags. Raises UsageError
    where there is no tag, PromptError.
    """
    wanted = dict(read_tag(tag) for tag in tags.split(",") if tag.strip())
    if not wanted:
        raise UsageError("--tags names no tag", 'For example: --tags "1girl, solo, smile, masterpiece, newest, safe"')
    words = words_of_recipe(recipe)
    own = {name: words[name] for name in wanted if name in words}
    named = {site_name(name, known): name for name in wanted if name not in own}
    table = TagTable(
        np.arange(len(named)), tuple(named), np.array([type_of(name, known) for name in named], dtype=np.int8),
        np.zeros(len(named), dtype=np.int64),
    )  # fmt: skip
    plan = plan_captions(recipe, table)
    slots = [slot for slot in plan.slots if slot != SEPARATOR]
    found: dict[str, list[str]] = {slot: [] for slot in slots}
    left_out = []
    for row, name in enumerate(table.names):
        weight = wanted[named[name]]
        fate = plan.fate_of_tag[row]
        if fate != WRITTEN:
            left_out.append((name, FATES[fate].replace("_", " ")))
            continue
        element = int(plan.element_of_tag[row])
        found[plan.slots[plan.slot_of[element]]].append(format_piece(Piece(plan.texts[element].as_py(), weight)))
    for name, group in own.items():
        if group in found:
            found[group].append(format_piece(Piece(name, wanted[name])))
        else:
            left_out.append((name, "group left out"))
    return join_groups([(slot, found[slot]) for slot in slots], style, left_out)


def read_tag(tag: str) -> tuple[str, float]:
    """A tag's words without escapes, and its weight; brackets that are part of a tag need no escape here."""
    text, weight = tag.strip(), 1.0
    if weighted := WEIGHTED.fullmatch(text):
        text, weight = weighted["words"].strip(), float(weighted["weight"])
    elif text.startswith(("(", "[")):
        (pieces, *_) = parse_prompt(text, lenient=True).parts
        if len(pieces) == 1 and pieces[0].weight != 1.0:
            return pieces[0].text.strip(), pieces[0].weight
    return ESCAPED.sub(r"\1", text), weight


def site_name(text: str, known: TagTable | None) -> str:
    """The tag as the site writes it."""
    name = text.replace(" ", "_")
    if known is None:
        return name
    return next((each for each in (name, text, name.lower()) if each in known.row_of_name), name)


def type_of(name: str, known: TagTable | None) -> int:
    """The kind of a tag, general where nobody knows it."""
    row = known.row_of_name.get(name) if known is not None else None
    return 0 if known is None or row is None else int(known.types[row])


def place_style(prompt: str, style: str, recipe: CaptionRecipe) -> str:
    """A prompt's text with its style: where it says {style}, else behind the people counts that it begins with."""
    if STYLE_PLACE in prompt:
        parts = [part.strip(" ,") for part in prompt.split(STYLE_PLACE)]
        return ", ".join(part for part in (parts[0], style, *parts[1:]) if part)
    if not style:
        return prompt
    people = {tag.replace("_", " ") for tag in recipe.people_tags}
    head, rest = [], prompt
    while rest.partition(",")[0].strip() in people:
        first, _, rest = rest.partition(",")
        head.append(first.strip())
    return ", ".join(part for part in (*head, style, rest.strip()) if part)


def words_of_prompt(prompt: Prompt) -> list[str]:
    """The tags of a prompt without weights, in order."""
    joined = ", ".join("".join(piece.text for piece in part) for part in prompt.parts)
    return [" ".join(word.split()) for word in joined.split(",") if word.strip()]
