"""`kwrap prompt`: a prompt read, built in the model's order, or checked against what the model has seen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kohaku_wrap.cli.next_steps import read_site_paths
from kohaku_wrap.cli.options import PATH
from kohaku_wrap.cli.output import print_answer, print_json, print_lines, print_table, verb, wants_json
from kohaku_wrap.errors import UsageError, command_line
from kohaku_wrap.sampling.grammar import Prompt, format_prompt, parse_prompt
from kohaku_wrap.sampling.styles import find_style, list_styles
from kohaku_wrap.wording import count_of

if TYPE_CHECKING:
    from kohaku_wrap.sampling.chunks import Chunk, Tokenizer
    from kohaku_wrap.sampling.compose import ComposedPrompt
    from kohaku_wrap.sampling.lint import Finding

MOST_OF_CHUNK = 30
"""Characters of its end that are shown."""

ALL_STYLES = "?"
"""What --style means without a name."""


@verb(
    """
  kwrap prompt "1girl, ask \\(askzy\\), (smile:1.1), masterpiece"
  kwrap prompt --tags "smile, 1girl, hatsune_miku, newest" --db danbooru2023.db
  kwrap prompt --tags "1girl, solo, masterpiece" --style kohaku-1
  kwrap prompt --post 5982731 --db danbooru2023.db
  kwrap prompt --style

\b
The grammar is the webui's: (x) is 1.1 times as strong, [x] is weaker by as
much, (x:1.2) says it; brackets nest, a backslash makes a bracket a plain
character; BREAK starts a new chunk of 75 tokens. [a:b:0.5], [a|b] and AND are
refused.
""",
    writes=False,
)
@click.argument("text", required=False)
@click.option("--post", "post_id", type=int, metavar="ID", help="Build the prompt that a post's caption makes.")
@click.option("--tags", metavar='"A, B"', help="Build a prompt of these tags, in the model's order.")
@click.option(
    "--style",
    "style_name",
    is_flag=False,
    flag_value=ALL_STYLES,
    metavar="[NAME]",
    help="Add a style prompt; without NAME list them all.",
)
@click.option("--db", type=PATH, help="The database; default: that of site.toml here.")
@click.option("--captions", type=PATH, metavar="IMAGES", help="Check against trained captions.")
@click.option("--dataset", default="epsilon", show_default=True, metavar="DATASET", help="Whose caption rules.")
@click.option("--template", default="epsilon", show_default=True, metavar="NAME", help="Whose trained token length.")
@click.option("--tokenizer", type=PATH, metavar="DIR", help="CLIP tokenizers; default: site's.")
@click.option("--lenient", is_flag=True, help="Read an open bracket as the webui does: 1.1 up to the end.")
def command(
    text: str | None,
    post_id: int | None,
    tags: str | None,
    style_name: str | None,
    db: Path | None,
    captions: Path | None,
    dataset: str,
    template: str,
    tokenizer: Path | None,
    lenient: bool,
) -> None:
    """Read, build or check a prompt.

    TEXT is read as the webui reads it and shown as weighted pieces and chunks with their tokens. --tags and --post
    build a prompt in the order of the model's captions. What the model can hardly know is listed: unknown and rare
    tags, brackets that are not escaped, quality and rating words of other models, more tokens than were trained.
    """
    from kohaku_wrap.config.layers import load_layers
    from kohaku_wrap.dataset.captions.explanation import explain_post
    from kohaku_wrap.dataset.recipe import load_dataset
    from kohaku_wrap.metadata.opening import open_metadata
    from kohaku_wrap.metadata.tags import read_tags
    from kohaku_wrap.sampling.compose import compose_post, compose_tags, place_style
    from kohaku_wrap.sampling.lint import find_oddities, vocabulary_of_captions, vocabulary_of_tags

    given = [name for name, value in (("TEXT", text), ("--post", post_id), ("--tags", tags)) if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} cannot be combined", "Give one of them.")
    if style_name == ALL_STYLES and not given:
        show_styles()
        return
    if not given and not style_name:
        raise UsageError(
            "no prompt is given", 'For example: `kwrap prompt "1girl, smile"`. Or give --tags, --post ID or --style.'
        )
    if style_name == ALL_STYLES:
        raise UsageError("--style names no style", "`kwrap prompt --style` alone lists them.")
    style = find_style(style_name).prompt if style_name else ""
    found = load_dataset(dataset)
    recipe = found.caption
    place = find_database(db, required=post_id is not None)
    database = open_metadata(place, found.metadata) if place else None
    known = read_tags(database) if database else None
    composed = None
    if post_id is not None and database is not None:
        # A style takes the place of a post's artists.
        composed = compose_post(explain_post(database, recipe, post_id), style, keep_artists=not style)
    elif tags is not None:
        composed = compose_tags(tags, recipe, known, style)
    source = composed.text if composed else place_style(text or "", style, recipe)
    prompt = parse_prompt(source, lenient)
    tokenizers, chunks = cut(prompt, tokenizer)
    tokens = [sum(len(chunk.tokens) for chunk in own) for own in chunks]
    vocabulary = None
    if captions is not None:
        vocabulary = vocabulary_of_captions(captions)
    elif known is not None and place is not None:
        vocabulary = vocabulary_of_tags(known, recipe, place)
    effective, _ = load_layers(template)
    trained_tokens = int(effective.get("max_token_length") or 75)
    findings = find_oddities(source, prompt, recipe, vocabulary, max(tokens), trained_tokens)
    document = describe(source, prompt, tokenizers, chunks, composed, findings)
    if wants_json():
        print_json(document)
    else:
        show(document, lenient)


def find_database(db: Path | None, required: bool) -> Path | None:
    """The metadata set of --db, or the site's; None without one."""
    if db is None and (paths := read_site_paths(Path())) and paths.db.is_file():
        return paths.db
    if db is None and required:
        raise UsageError("--db DB is missing: --post needs it", "Name the danbooru2023 database.")
    return db


def cut(prompt: Prompt, folder: Path | None) -> tuple[list[Tokenizer], list[list[Chunk]]]:
    """Both tokenizers, or an estimate in their place, and the chunks that each makes."""
    from kohaku_wrap.sampling.chunks import ESTIMATE, cut_chunks, load_tokenizers

    if folder is None and (paths := read_site_paths(Path())):
        folder = paths.tokenizers
    tokenizers = list(load_tokenizers(folder) or [ESTIMATE])
    return tokenizers, [cut_chunks(prompt, tokenizer) for tokenizer in tokenizers]


def describe(
    source: str,
    prompt: Prompt,
    tokenizers: list[Tokenizer],
    chunks: list[list[Chunk]],
    composed: ComposedPrompt | None,
    findings: list[Finding],
) -> dict[str, Any]:
    """What `--json` prints."""

    return {
        "prompt": source,
        "written": format_prompt(prompt),
        "pieces": [[{"text": piece.text, "weight": piece.weight} for piece in part] for part in prompt.parts],
        "tokenizers": [
            {
                "tokenizer": tokenizer.name,
                "tokens": sum(len(chunk.tokens) for chunk in own),
                "chunks": [
                    {"tokens": len(chunk.tokens), "pieces": [[piece.text, piece.weight] for piece in chunk.pieces]}
                    for chunk in own
                ],
            }
            for tokenizer, own in zip(tokenizers, chunks, strict=True)
        ],
        "groups": {name: list(words) for name, words in composed.groups} if composed else None,
        "left_out": dict(composed.left_out) if composed else None,
        "findings": [{"kind": each.kind, "word": each.word, "what": each.what} for each in findings],
    }


def show(document: dict[str, Any], lenient: bool) -> None:
    """Print pieces, chunks and findings, and the prompt last, to copy; what was left open is closed."""
    rows: list[tuple[str, Any]] = []
    for group, words in (document["groups"] or {}).items():
        rows.append((group, ", ".join(words) or "(none)"))
    rows += [("left out", f"{tag}: {reason}") for tag, reason in (document["left_out"] or {}).items()]
    for number, part in enumerate(document["pieces"]):
        rows += [("BREAK", "")] if number else []
        rows += [(f"× {piece['weight']:.4g}", piece["text"].strip() or repr(piece["text"])) for piece in part]
    first, *others = document["tokenizers"]
    same = all(other["chunks"] == first["chunks"] for other in others)
    how = "an estimate, no tokenizer at hand" if first["tokenizer"] == "estimate" else "both tokenizers"
    for number, entry in enumerate([first] if same else document["tokenizers"], start=1):
        for place, chunk in enumerate(entry["chunks"], start=1):
            whose = how if same else f"tokenizer {number}"
            last = chunk["pieces"][-1][0].strip() if chunk["pieces"] else "(empty)"
            last = last if len(last) <= MOST_OF_CHUNK else f"…{last[-MOST_OF_CHUNK:]}"
            rows.append((f"chunk {place}", f"{count_of(chunk['tokens'], 'token')} of 75, up to {last!r} ({whose})"))
    print_table("Prompt", rows)
    if findings := [(each["kind"], f"{each['word']}: {each['what']}".lstrip(": ")) for each in document["findings"]]:
        print_table("To look at", findings)
    print_lines(document["written" if lenient else "prompt"])


def show_styles() -> None:
    """List all styles."""

    styles = list_styles()
    rows = [(name, style.prompt) for name, style in styles.items()]
    next_step = command_line("prompt", "--tags", "1girl, solo", "--style", next(iter(styles), "NAME"))
    print_answer({"styles": [vars(each) for each in styles.values()]}, "Styles", rows, next_step)
