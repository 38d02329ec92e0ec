"""Prompts read as the webui reads them, and written back."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kohaku_wrap.sampling.grammar import Piece, Prompt, PromptError, format_prompt, parse_prompt

PUBLISHED = [
    ("normal text", [("normal text", 1.0)]),
    ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
    (r"\(literal\]", [("(literal]", 1.0)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    ("", []),
    ("[less]", [("less", 1 / 1.1)]),
    ("((twice))", [("twice", 1.1 * 1.1)]),
    ("(a:1.3)", [("a", 1.3)]),
    ("( spaced : 0.5 )", [(" spaced ", 0.5)]),
    ("(a:.5) (b:2.) (c:-1) (d:+1.5)", [("a", 0.5), (" ", 1.0), ("b", 2.0), (" ", 1.0), ("c", -1.0), (" ", 1.0),
                                       ("d", 1.5)]),
    ("(re:zero)", [("re:zero", 1.1)]),
    ("[re:zero]", [("re:zero", 1 / 1.1)]),
    ("fate (series:1.2), x", [("fate ", 1.0), ("series", 1.2), (", x", 1.0)]),
    (r"ask \(askzy\), (jiu ye sang:1.1), (rumoon:0.9)", [("ask (askzy), ", 1.0), ("jiu ye sang", 1.1), (", ", 1.0),
                                                         ("rumoon", 0.9)]),
    (r"\\(a)", [("\\", 1.0), ("a", 1.1)]),
    (r"\o/", [("o/", 1.0)]),
    ("a :) b] c", [("a :) b] c", 1.0)]),
    ("two\nlines", [("two\nlines", 1.0)]),
]  # fmt: skip
"""What the webui's own parser gives; the first four and UNCLOSED stand in its source."""

UNCLOSED = [
    ("(unbalanced", [("unbalanced", 1.1)], 0),
    ("a [b (c", [("a ", 1.0), ("b ", 1 / 1.1), ("c", 1.1 * (1 / 1.1))], 5),
    (
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        [
            ("a ", 1.0),
            ("house", 1.5730000000000004),
            (" ", 1.1),
            ("on", 1.0),
            (" a ", 1.1),
            ("hill", 0.55),
            (", sun, ", 1.1),
            ("sky", 1.4641000000000006),
            (".", 1.1),
        ],
        2,
    ),
]


def pieces_of(prompt: Prompt) -> list[list[tuple[str, float]]]:
    return [[(piece.text, piece.weight) for piece in part] for part in prompt.parts]


@pytest.mark.parametrize("source,wanted", PUBLISHED, ids=[source for source, _ in PUBLISHED])
def test_it_reads_as_the_webui(source: str, wanted: list[tuple[str, float]]) -> None:
    for lenient in (False, True):
        assert pieces_of(parse_prompt(source, lenient)) == [wanted]


@pytest.mark.parametrize("source,wanted,place", UNCLOSED, ids=[source for source, _, _ in UNCLOSED])
def test_an_unclosed_bracket_is_refused_at_its_place_or_reaches_to_the_end(
    source: str, wanted: list[tuple[str, float]], place: int
) -> None:
    with pytest.raises(PromptError) as refused:
        parse_prompt(source)
    assert refused.value.place == place
    line, mark = refused.value.message.splitlines()[1:]
    assert line[mark.index("^")] == source[place] and f"character {place + 1}" in refused.value.message
    assert "--lenient" in refused.value.next_step
    assert pieces_of(parse_prompt(source, lenient=True)) == [wanted]


def test_break_cuts_and_takes_the_spaces_around_it() -> None:
    assert pieces_of(parse_prompt("a, \n BREAK b (c:1.2) BREAK")) == [[("a,", 1.0)], [("b ", 1.0), ("c", 1.2)], []]
    assert pieces_of(parse_prompt("BREAKFAST, xBREAK")) == [[("BREAKFAST, xBREAK", 1.0)]]
    with pytest.raises(PromptError, match="BREAK inside brackets"):
        parse_prompt("(a BREAK b)")
    assert pieces_of(parse_prompt("(a BREAK b)", lenient=True)) == [[("a", 1.1), ("BREAK", -1.1), ("b", 1.1)]]


@pytest.mark.parametrize(
    "source,words,place",
    [
        ("x [a:b:0.5]", "schedules", 2),
        ("[a:0.5]", "schedules", 0),
        ("[a::10]", "schedules", 0),
        ("[a (b:1.2):c: 5 ]", "schedules", 0),
        ("[cow|horse]", "alternations", 0),
        ("a cat AND a dog", "AND", 6),
        ("1girl, \udcff", "no UTF-8", 7),
        ("(x:1,2)", "1,2 is not a plain decimal", 3),
        ("(x:1e3)", "1e3 is not a plain decimal", 3),
        ("(x:nan)", "nan is not a plain decimal", 3),
        ("(x:1.1.1)", "1.1.1 is not a weight", 3),
        ("(x:.)", r"\. is not a weight", 3),
        ("(x:" + "9" * 400 + ")", "is not a weight", 3),
    ],
)
def test_what_is_not_read_is_refused_by_name(source: str, words: str, place: int) -> None:
    with pytest.raises(PromptError, match=words) as refused:
        parse_prompt(source)
    assert refused.value.place == place and refused.value.next_step


@pytest.mark.parametrize("source", ["[re:zero]", "(a:b:1.2)", "SAND, ANDROID", "a|b", r"[\|_\|]", "[(a:0.5)]"])
def test_what_only_looks_like_it_is_read(source: str) -> None:
    assert parse_prompt(source).parts


def webui(text: str) -> list[tuple[str, float]]:
    """The webui's rules in the shortest form, for text without BREAK: an own reading of the published behaviour."""
    rule = re.compile(r"\\\(|\\\)|\\\[|\\]|\\\\|\\|\(|\[|:\s*([+-]?[.\d]+)\s*\)|\)|]|[^\\()\[\]:]+|:")
    found: list[list[str | float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def scale(start: int, by: float) -> None:
        for entry in found[start:]:
            entry[1] *= by  # type: ignore[operator]

    for token in rule.finditer(text):
        if token[0].startswith("\\"):
            found.append([token[0][1:], 1.0])
        elif token[0] in opened:
            opened[token[0]].append(len(found))
        elif token[1] is not None and opened["("]:
            scale(opened["("].pop(), float(token[1]))
        elif token[0] == ")" and opened["("]:
            scale(opened["("].pop(), 1.1)
        elif token[0] == "]" and opened["["]:
            scale(opened["["].pop(), 1 / 1.1)
        else:
            found.append([token[0], 1.0])
    for start in opened["("]:
        scale(start, 1.1)
    for start in opened["["]:
        scale(start, 1 / 1.1)
    merged: list[tuple[str, float]] = []
    for word, weight in found:
        if word and merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + str(word), float(weight))
        elif word:
            merged.append((str(word), float(weight)))
    return merged


@given(st.text("ab ,.:12()[]\\\n", max_size=30))
@example("(a:1.2")
@example("([a)]")
def test_any_text_is_read_as_the_webui_or_refused(text: str) -> None:
    try:
        prompt = parse_prompt(text, lenient=True)
    except PromptError:
        return
    assert pieces_of(prompt) == [webui(text)]


@given(st.text(st.sampled_from("ab :1.2()[]\\|\n BREAKND"), max_size=40) | st.text(max_size=40), st.booleans())
@example("BREAK A ND (BREAK:2)", True)
@example("a \\ BREAK \\ b", False)
def test_what_is_written_is_read_again(text: str, lenient: bool) -> None:
    try:
        prompt = parse_prompt(text, lenient)
    except PromptError:
        return
    assert parse_prompt(format_prompt(prompt)) == prompt


words = st.text(st.sampled_from("ab :1.2()[]\\|\n BREAKND_"), min_size=1, max_size=12) | st.text(min_size=1, max_size=8)
weights = st.floats(allow_nan=False, allow_infinity=False) | st.just(1.0)
parts = st.lists(st.builds(Piece, words, weights), max_size=4).map(
    lambda pieces: tuple(p for at, p in enumerate(pieces) if at == 0 or pieces[at - 1].weight != p.weight)
)


@given(st.lists(parts, min_size=1, max_size=3))
@example([(Piece("a ", 1.0),), (Piece(" b", 1.0),)])
@example([(Piece("AND BREAK", 1e-7),)])
def test_any_prompt_comes_back_from_its_text(listed: list[tuple[Piece, ...]]) -> None:
    prompt = Prompt(tuple(listed))
    assert parse_prompt(format_prompt(prompt)) == prompt


def test_weights_are_written_as_plain_decimals() -> None:
    assert format_prompt(Prompt(((Piece("a", 1e-7), Piece("b", 1e21)),))) == "(a:0.0000001)(b:1000000000000000000000)"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\x1b]0;pwn\x07\x1b[2J", "\ufffd]0;pwn\ufffd\ufffd[2J\n             ^"),
        ("(" * 100_000, f"{'(' * 51}…\n    ^"),
        (f"(a:{'9' * 5000})", "^" * 50),
    ],
)
def test_the_mark_stands_under_its_place_whatever_is_shown(text: str, line: str) -> None:
    with pytest.raises(PromptError) as caught:
        parse_prompt(text)
    assert caught.value.message.endswith(line) and len(caught.value.message) < 300
