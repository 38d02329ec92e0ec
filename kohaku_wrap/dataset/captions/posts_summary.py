"""What `kwrap report` shows of the posts that are trained, and the commands that made them ready."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from kohaku_wrap.dataset.captions.groups import GROUPS
from kohaku_wrap.dataset.captions.on_disk import CaptionImages
from kohaku_wrap.dataset.captions.plan import CaptionPlan
from kohaku_wrap.dataset.captions.summary import CaptionSummary, Seen, count_values, describe_scores
from kohaku_wrap.dataset.images.extracted import REPORT_FILE
from kohaku_wrap.dataset.selection_file import SelectedPosts, read_columns, take_numbers
from kohaku_wrap.dataset.years import UNKNOWN_YEAR
from kohaku_wrap.errors import DAMAGE, command_line
from kohaku_wrap.files import parse_json, read_regular
from kohaku_wrap.metadata.filters import RATINGS
from kohaku_wrap.metadata.posts import UNKNOWN_NUMBER
from kohaku_wrap.metadata.source import Source


def summarise_posts(
    database: Source,
    plan: CaptionPlan,
    posts: SelectedPosts,
    images: CaptionImages,
    captions: tuple[CaptionSummary, Sequence[Seen]],
    selection: Path,
    folder: Path,
    made_by: str,
) -> dict[str, Any]:
    """Counts over the posts whose images are there; `captions`: what was seen of them while `made_by` wrote them."""
    here = images.places
    summary, seen = captions
    texts = plan.texts.slice(0, len(plan.slot_of))
    groups = {
        slot: texts.filter(pa.array(plan.slot_of == number)).to_pylist()
        for number, slot in enumerate(plan.slots)
        if slot in GROUPS
    }
    column = read_columns(selection, "score")["score"]
    scores = take_numbers(selection, "score", column, UNKNOWN_NUMBER)[here]
    return {
        **summary.describe(seen, groups),
        "db_digest": posts.about.get("db_digest", ""),
        "edition": posts.about.get("edition", {}).get("name", ""),
        "seed": posts.about.get("seed"),
        "made_by": {**list_commands(database, posts, selection, folder), "caption": made_by},
        "selected": len(posts),
        "missing_images": len(posts) - len(images),
        "dropped": posts.about.get("counts", {}).get("dropped", {}),
        "ratings": count_values(posts.ratings[here], {-1: "unknown", **dict(enumerate(RATINGS))}),
        "years": count_values(posts.years[here], {UNKNOWN_YEAR: "unknown"}),
        "scores": describe_scores(scores[scores != UNKNOWN_NUMBER]),
    }


def list_commands(database: Source, posts: SelectedPosts, selection: Path, folder: Path) -> dict[str, str]:
    """The commands that came before, with the places of now; that of `extract` only where its report is there."""
    dataset, tags = posts.about.get("dataset", ""), database.edition.tag_table
    chosen, out = selection.absolute(), folder.absolute()
    more = ("--tags", tags.absolute()) if tags else ()
    commands = {"select": command_line("select", dataset, "--db", database.path, "--out", chosen, *more)}
    with suppress(*DAMAGE):
        report = parse_json(read_regular(out / REPORT_FILE))
        more = ("--max-pixels", limit) if (limit := report.get("max_pixels")) else ()
        tars = Path(report["tars"]).absolute()
        commands["extract"] = command_line("extract", chosen, "--tars", tars, "--out", out, *more)
    return commands
