"""What `kwrap caption` shows without writing: one post, one image, and what captions are made of."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kohaku_wrap.cli.output import print_answer, print_lines, progress_bar, wants_json
from kohaku_wrap.wording import count_of, format_share

if TYPE_CHECKING:
    from kohaku_wrap.dataset.captions.explanation import PostExplanation
    from kohaku_wrap.dataset.captions.recipe import CaptionRecipe
    from kohaku_wrap.dataset.captions.statistics import CaptionStatistics
    from kohaku_wrap.dataset.captions.text_table import TextTable
    from kohaku_wrap.dataset.own.folder_captions import FolderStatistics
    from kohaku_wrap.metadata.source import Source

RARE_SHOWN = 20


def print_explanation(
    database: Source,
    recipe: CaptionRecipe,
    post_id: int,
    selection: Path | None,
    texts: TextTable | None,
) -> None:
    """Print one post's caption, group by group."""
    from kohaku_wrap.dataset.captions.explanation import explain_post

    explanation = explain_post(database, recipe, post_id, selection, texts)
    groups = [{"group": group, "words": list(words)} for group, words in explanation.groups]
    payload = {"style": recipe.style, **asdict(explanation), "groups": groups}
    print_answer(payload, f"Post {post_id}, {recipe.style} style", rows_of_explanation(explanation))
    if not wants_json():
        print_lines(explanation.caption)


def rows_of_explanation(explanation: PostExplanation) -> list[tuple[str, Any]]:
    """A group a line, then what was left out, then where the other words come from."""
    rows: list[tuple[str, Any]] = [
        (group, "" if group == "|||" else ", ".join(words) or "(none)") for group, words in explanation.groups
    ]
    left_out: dict[str, list[str]] = {}
    for tag in explanation.tags:
        if tag.fate != "written":
            left_out.setdefault(tag.fate.replace("_", " "), []).append(tag.name or "(no such tag)")
    rows += [(f"left out: {fate}", ", ".join(names)) for fate, names in left_out.items()]
    known = {percentile: cutoff for percentile, cutoff in explanation.cutoffs.items() if cutoff is not None}
    cutoffs = ", ".join(f"{percentile} %: > {cutoff}" for percentile, cutoff in known.items())
    favourites = "unknown" if explanation.fav_count is None else f"{explanation.fav_count:,}"
    rows.append(("rating and favourites", f"{explanation.rating}, {favourites}" + (f" ({cutoffs})" if cutoffs else "")))
    rows.append(("uploaded", f"{explanation.created_at or '(no date)'}: {explanation.year or 'unknown year'}"))
    return rows


def print_image(image: Path, folder: Path | None) -> None:
    """Print the row of an image and what is trained of it."""
    from kohaku_wrap.dataset.own.folder_captions import explain_image

    found = explain_image(image, folder)
    rows: list[tuple[str, Any]] = [("id", str(found.id)), ("file", found.file)]
    rows += [("imported from", found.source)] if found.source else []
    rows += [("size", f"{found.size[0]} × {found.size[1]} pixels"), ("subset", found.subset)]
    rows.append(("an epoch trains it", f"{found.repeats:,} × the template's num_repeats"))
    rows += [(f"option {name}", str(value)) for name, value in found.options.items()]
    rows += [("caption from", found.origin)] if found.origin else []
    rows += [("caption", line) for line in found.raw.split("\n")]
    rows += [("text", found.text)] if found.text else []
    rows += [
        ("trained" if len(found.trained) == 1 else "one is trained", line or "(nothing)") for line in found.trained
    ]
    print_answer(asdict(found), str(image), rows)


def print_folder(folder: Path, rare: int, tokenizer: Path | None) -> None:
    """Print what the captions in an image folder are made of."""
    from kohaku_wrap.dataset.own.folder_captions import measure_folder

    with progress_bar("count", "images") as progress:
        found = measure_folder(folder, tokenizer, rare_below=rare, on_progress=progress)
    rows: list[tuple[str, Any]] = [("captions", found.images), ("images an epoch", found.epoch_images)]
    for each in found.subsets:
        options = "".join(f", {name} = {value!r}" for name, value in each["options"].items())
        words = ", ".join(f"{word} ({uses:,})" for word, uses in found.frequent[each["name"]][:5])
        rows.append((each["name"], f"{each['images']:,} images × {each['repeats']:,}{options}: {words}"))
    counts = {"with nothing to train": found.empty, "of several lines": found.several_lines,
              "without |||": found.without_separator}  # fmt: skip
    rows += [(f"captions {what}", count) for what, count in counts.items() if count]
    rows.append(("distinct words", found.distinct_words))
    print_answer(
        asdict(found),
        f"Captions in {folder}, {found.style} style",
        [*rows, *rows_of_rare(found.rare, rare), *rows_of_tokens(found, max(found.images, 1))],
    )


def rows_of_rare(words: tuple[tuple[str, int], ...], below: int) -> list[tuple[str, Any]]:
    """The rarest words as a line of a table, where there are any."""
    if not words:
        return []
    first = ", ".join(f"{word} ({uses:,})" for word, uses in words[:RARE_SHOWN])
    more = ", …; all with --json" if len(words) > RARE_SHOWN else ""
    return [(f"in fewer than {below:,} captions", f"{len(words):,} words: {first}{more}")]


def rows_of_tokens(statistics: CaptionStatistics | FolderStatistics, captions: int) -> list[tuple[str, Any]]:
    """Lengths in tokens, and what is cut, as lines of a table."""
    quantiles = ", ".join(f"{name}: {length:,}" for name, length in statistics.token_quantiles.items())
    how = "an estimate, no tokenizer at hand" if statistics.tokens_by == "estimate" else statistics.tokens_by
    cut = [(f"cut at max_token_length {limit}", f"{count_of(count, 'caption')} ({format_share(count / captions)})")
           for limit, count in statistics.cut.items()]  # fmt: skip
    return [("tokens a caption", f"{quantiles} ({how})"), *cut]


def print_statistics(
    database: Source,
    selection: Path,
    recipe: CaptionRecipe,
    rare: int,
    tokenizer: Path | None,
    texts: TextTable | None,
    jobs: int | None,
) -> None:
    """Print what the captions are made of."""
    from kohaku_wrap.dataset.captions.statistics import measure_captions
    from kohaku_wrap.metadata.parallel import usable_threads

    with progress_bar("count", "posts") as progress:
        statistics = measure_captions(
            database,
            selection,
            recipe,
            tokenizer,
            spill_folder=selection.absolute().parent,
            rare_below=rare,
            threads=jobs or usable_threads(),
            on_progress=progress,
            texts=texts,
        )
    rows = rows_of_statistics(statistics, rare)
    print_answer(asdict(statistics), f"Captions of {selection}, {recipe.style} style", rows)


def rows_of_statistics(statistics: CaptionStatistics, rare: int) -> list[tuple[str, Any]]:
    """The statistics as lines of a table."""
    posts = max(statistics.posts, 1)
    total = max(sum(statistics.groups.values()), 1)
    rows: list[tuple[str, Any]] = [("captions", statistics.posts), ("distinct words", statistics.distinct_words)]
    for group, count in statistics.groups.items():
        words = ", ".join(
            f"{word} ({format_share(uses / posts)})" for word, uses in statistics.frequent.get(group, ())[:5]
        )
        rows.append(
            (group, f"{count:,} words, {format_share(count / total)} of all, {count / posts:.1f} a caption: {words}")
        )
    rows += rows_of_rare(statistics.rare, rare)
    rows += [(f"tags: {fate.replace('_', ' ')}", count) for fate, count in statistics.tags.items() if count]
    rows += [(f"posts: {what.replace('_', ' ')}", count) for what, count in statistics.lacking.items() if count]
    rows += [
        (
            f"popularity at least {least}",
            f"{count:,} tags of the database, {statistics.used_popularity[least]:,} of them here",
        )
        for least, count in statistics.popularity.items()
    ]
    return rows + rows_of_tokens(statistics, posts)
