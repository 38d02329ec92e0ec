"""`kwrap evaluate judge` and `judges`: what a judge says of a folder of pictures, and which kinds there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from kohaku_wrap.cli.options import FOLDER, PATH
from kohaku_wrap.cli.output import list_first, print_answer, progress_bar, verb, wants_json
from kohaku_wrap.errors import UsageError, command_line
from kohaku_wrap.outlets import go_on_without_reader
from kohaku_wrap.wording import show_path

JUDGED = ".judged"


@verb("""
  kwrap evaluate judge look --judge wd-swinv2-tagger-v3
  kwrap evaluate judge look --judge anime_aesthetic/swinv2pv3 --result looks.json
  kwrap evaluate judge look --judge ccip-caformer-24-randaug-pruned \\
      --reference images
  kwrap evaluate judge other --judge wd-swinv2-tagger-v3 \\
      --against look/judged-tagger.json
""")
@click.argument("sheet", metavar="SHEET_DIR", type=PATH)
@click.option("--judge", "judge_folder", required=True, type=PATH, metavar="DIR", help="A judge.")
@click.option(
    "--reference",
    type=PATH,
    metavar="DIR",
    help="Pictures to find the Fréchet distance to, such as posts that were not trained.",
)
@click.option("--result", type=PATH, metavar="FILE", help="Usually SHEET_DIR/judged-KIND.json.")
@click.option("--against", multiple=True, type=PATH, metavar="FILE", help="Another judged-KIND.json.")
@click.option(
    "--threads", type=click.IntRange(1, 1024), default=1, show_default=True, metavar="N", help="Of the judge."
)
def judge(
    sheet: Path,
    judge_folder: Path,
    reference: Path | None,
    result: Path | None,
    against: tuple[Path, ...],
    threads: int,
) -> None:
    """Judge a folder of pictures.

    A tagger shows how many of the prompted tags it sees, by tag and model; an aesthetic judge how good the pictures
    look; a corruption judge which are broken; and any of them how far the pictures are from --reference. Each picture
    is looked at once: what a judge says of it is kept beside the sheet. Two models, or two results with --against, are
    compared over the pictures that both drew from the same prompt, seed, size and sampler.
    """
    from kohaku_wrap.evaluation.judge_folders import open_judge
    from kohaku_wrap.evaluation.judges import KINDS
    from kohaku_wrap.evaluation.looking import Looker
    from kohaku_wrap.evaluation.sheet_judging import (
        MEASURES,
        choose_references,
        compose_result,
        list_pictures,
        look_at_all,
    )
    from kohaku_wrap.evaluation.sheet_pairs import lay_over, read_other
    from kohaku_wrap.files import write_text

    opened = open_judge(judge_folder, threads=threads)
    for path in against:
        read_other(path, KINDS, opened.describe())
    if opened.kind.name not in MEASURES and reference is None:
        raise UsageError(
            f"a judge of kind {opened.kind.name} says nothing of a picture alone",
            "Give --reference DIR for a distance, or score characters with `kwrap evaluate ccip`.",
        )
    pictures = list_pictures(sheet)
    others = choose_references(reference) if reference else []
    looker = Looker(opened, sheet / JUDGED)
    with progress_bar("judge", "pictures") as report:
        looked, unreadable = look_at_all(looker, pictures, report, sheet)
    with progress_bar("reference", "pictures") as report:
        compared, odd = look_at_all(looker, others, report)
    document = compose_result(opened, looked, [*unreadable, *odd], compared)
    for path in against:
        lay_over(document, path, KINDS)
    file = result or sheet / f"judged-{opened.kind.name}.json"
    write_text(file, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    rows: list[tuple[str, Any]] = [("judge", document["judge"]["title"])]
    rows += [(each["title"], describe(each)) for each in document["models"]]
    rows += [(f"{pair['from']} → {pair['to']}", describe_pair(pair)) for pair in document["pairs"]]
    if document["all"].get("frechet"):
        rows.append(("weakness", document["all"]["frechet"]["weakness"]))
    rows += list_first("unreadable", document["unreadable"])
    payload = {"file": file, "result": document}
    following = command_line("evaluate", "judge", "OTHER_DIR", "--judge", judge_folder, "--against", show_path(file))
    print_answer(payload, f"Pictures in {sheet}", [*rows, ("result", file)], following)


def describe(found: dict[str, Any]) -> str:
    """What came out for one model, in words."""
    parts = [f"{found['pictures']:,} pictures"]
    if recall := found.get("recall"):
        parts.append(f"{100 * recall['mean']:.1f} % of the prompted tags are seen ({spread(recall, 100)} %)")
    if found.get("pictures_without_known_tag"):
        parts.append(f"{found['pictures_without_known_tag']:,} without a prompted tag that the judge knows")
    if score := found.get("score"):
        parts.append(f"{score['mean']:.2f} of 6 ({spread(score)})")
    if "corrupted" in found:
        parts.append(f"{found['corrupted']:,} broken")
    if distance := found.get("frechet"):
        value = distance["distance"]
        shown = "none: one picture alone" if value is None else f"{value:.4g}"
        few = ", from few pictures" if distance["is_few"] else ""
        parts.append(f"Fréchet distance {shown} to {distance['reference_pictures']:,} pictures{few}")
    return "; ".join(parts)


def describe_pair(pair: dict[str, Any]) -> str:
    """What two models differ by, in words."""
    shown = "no picture of both has the same prompt, seed, size and sampler"
    if apart := pair["difference"]:
        ends = f"{apart['low']:+.4f} to {apart['high']:+.4f}"
        shown = f"{apart['mean']:+.4f} ({ends}), paired over {pair['pictures']:,} pictures"
    if pair["frechet_difference"] is not None:
        shown += f"; Fréchet distance {pair['frechet_difference']:+.4g}, without an interval"
    return shown


def spread(interval: dict[str, float], factor: float = 1) -> str:
    """From where to where."""
    digits = 1 if factor > 1 else 2
    return f"{factor * interval['low']:.{digits}f} to {factor * interval['high']:.{digits}f}"


SMALL_TAGS = ("1girl", "1boy", "solo", "smile", "long_hair", "scenery", "no_humans", "sky")


@verb(
    """
  kwrap evaluate judges
  kwrap evaluate judges --small judges
""",
    writes=False,
)
@click.option(
    "--small", "folder", type=FOLDER, metavar="DIR",
    help="Build a small judge of each kind there, for tests.",
)  # fmt: skip
def judges(folder: Path | None) -> None:
    """List the kinds of judges, their files, and where to get them.

    A judge is a folder of ONNX files, in the layout in which they are published. kwrap fetches nothing: download the
    folder and name it with --judge. A judge of your own is a folder with a judge.toml: kind, and what differs of size,
    resize, interpolation, layout, channels, scale, mean, deviation, output, labels, threshold, model, title.
    """
    from kohaku_wrap.evaluation.judges import KINDS

    made: list[Path] = []
    if folder is not None:
        go_on_without_reader(is_document=wants_json())
        from kohaku_wrap.evaluation.small_judges import build_small_judges

        made = build_small_judges(folder, SMALL_TAGS)
    kinds = [
        {"kind": kind.name, "measures": kind.measures, "files": kind.files, "published": kind.published}
        for kind in KINDS.values()
    ]
    rows: list[tuple[str, Any]] = [("small judge, for tests", path) for path in made]
    for kind in KINDS.values() if not made else ():
        rows += [
            (kind.name, kind.measures),
            ("  files", ", ".join(kind.files)),
            ("  published", kind.published),
        ]
    following = ("evaluate", "judge", "SHEET_DIR", "--judge", folder / "tagger" if folder else "FOLDER")
    print_answer({"kinds": kinds, "made": made}, "Judges", rows, command_line(*following))
