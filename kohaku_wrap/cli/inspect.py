"""`kwrap inspect`: what a checkpoint, a network or a metadata database is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from kohaku_wrap.cli.options import refuse_idle, tags_option
from kohaku_wrap.cli.output import (
    ESCAPES_IN_LINES,
    print_answer,
    print_lines,
    progress_bar,
    verb,
    wants_json,
)
from kohaku_wrap.errors import command_line
from kohaku_wrap.merging.inspecting import FileReport, describe_report, inspect_file, recorded_hashes, short_metadata
from kohaku_wrap.merging.replays import as_table
from kohaku_wrap.wording import count_of, show_bytes


def rows_of_recipe(report: FileReport) -> list[tuple[str, Any]]:
    """The merge that made the file, as lines."""
    if not isinstance(report.recipe, dict):
        return [("merge recipe", report.recipe)] if report.recipe is not None else []
    recipe = report.recipe
    rows: list[tuple[str, Any]] = [("merge formula", recipe.get("formula", recipe.get("interp_method", "")))]
    sums = [entry for entry in as_list(recipe.get("coefficients")) if isinstance(entry, dict)]
    rows += [("computed", f"{entry.get('sum')}  ({entry.get('tensors')} tensors)") for entry in sums]
    for table in ("models", "networks"):
        for name, sha256 in as_table(recipe.get(table)).items():
            file = as_table(report.parents.get(str(sha256))).get("name", "")
            rows.append((f"parent {name}", f"{str(sha256)[:10]} {file}"))
    rows += [("decision", line) for line in as_list(recipe.get("decisions"))]
    return rows


def as_list(value: Any) -> list[Any]:
    """A list of metadata, which anyone may have written; empty where it is none."""
    return value if isinstance(value, list) else []


def describe_origin(file: Path, sha256: str) -> dict[str, Any]:
    """The run among whose checkpoints the file lies, and whether that run wrote it; empty for other files.

    `sha256`: of the file; empty where it was not computed.
    """
    from kohaku_wrap.training.records.folder import Run, is_run
    from kohaku_wrap.training.records.networks import list_written

    folder = file.resolve().parent
    if folder.name != "checkpoints" or not is_run(folder.parent):
        return {}
    written = list_written(Run(folder.parent)).get(file.name, "")
    is_same = written == sha256 if written and sha256 else None
    return {"run": str(folder.parent), "written_sha256": written or None, "is_as_written": is_same}


def tell_origin(origin: Mapping[str, Any]) -> str:
    """Whether a file among a run's checkpoints is what the run wrote."""
    run, written = Path(origin["run"]).name, origin["written_sha256"]
    if not written:
        return f"unknown: run {run} has no sha256 of what it wrote under this name"
    if origin["is_as_written"] is None:
        return f"run {run} wrote the sha256 {written[:10]}… under this name; not compared"
    return f"as run {run} wrote it" if origin["is_as_written"] else f"not what run {run} wrote: {written}"


def print_report(report: FileReport, origin: Mapping[str, Any]) -> None:
    from kohaku_wrap.merging.hashes import find_auto_v1

    header = report.header
    rows: list[tuple[str, Any]] = [
        ("kind", report.kind),
        ("size", f"{show_bytes(header.size_bytes)} ({header.size_bytes:,} bytes)"),
        ("tensors", len(header.tensors)),
    ]
    rows += list(report.parts.items())
    rows += [
        (name, f"{count_of(tensors, 'tensor')}, {count_of(elements, 'number')}, {show_bytes(size)}")
        for name, (tensors, elements, size) in report.dtypes.items()
    ]
    if report.hashes:
        rows += [("AutoV1", find_auto_v1(header.path)), ("AutoV2", report.hashes.auto_v2)]
        rows += [("sha256", report.hashes.sha256), ("AutoV3", report.hashes.auto_v3)]
        rows += [("sha256 of the data", report.hashes.data_sha256)]
    rows += list(recorded_hashes(report).items())
    rows += [("of the run", tell_origin(origin))] if origin else []
    rows += sorted(short_metadata(header.metadata).items())
    rows += rows_of_recipe(report)
    payload = {**describe_report(report), "of_run": origin or None}
    next_step = "" if report.replay else command_line("inspect", header.path, "--json")
    print_answer(payload, str(header.path), rows, next_step)
    if report.replay and not wants_json():
        print_lines(f"Made by (the file names may have changed since): {report.replay}")


@verb(
    """
  kwrap inspect model.safetensors
  kwrap inspect epsilon.safetensors --json
  kwrap inspect danbooru.db
  kwrap inspect danbooru2024
  kwrap inspect posts-snapshot.parquet
  kwrap inspect e621.csv --dataset e621 --tags tags.csv
  kwrap inspect look/1girl-solo_1_b49353a7ae64.png
""",
    writes=False,
)
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@click.option("--dataset", metavar="DATASET", help="Whose [metadata] says how another site's metadata is read.")
@tags_option
@click.option("--no-hash", is_flag=True, help="Do not read the data for the hashes; the header alone is quick.")
def command(file: Path, dataset: str | None, tag_table: Path | None, no_hash: bool) -> None:
    """Show what a checkpoint, network, picture or database is.

    FILE is a checkpoint or network in safetensors form: its kind, keys, types, hashes, metadata and merge recipe are
    shown, and of one among a run's checkpoints whether the run wrote it. Or it is a metadata set, a file or a folder:
    its edition, what that lacks, its counts, ratings and what a selection would drop. Or it is a folder of tars: how
    they are named and which posts each holds. Or it is a picture that kwrap drew: how, and the command that draws it
    again.
    """
    from kohaku_wrap.dataset.images.tar_layouts import holds_images
    from kohaku_wrap.metadata.opening import is_metadata
    from kohaku_wrap.sampling.pictures import is_png

    if is_png(file):
        refuse_idle("with a picture", of=("dataset", "tag_table"))
        inspect_picture(file)
        return
    if file.is_dir() and holds_images(file):
        refuse_idle("with tars", of=("dataset", "tag_table"))
        inspect_tars(file)
        return
    if dataset or tag_table or is_metadata(file):
        inspect_database(file, dataset, tag_table)
        return
    with progress_bar("hash", "bytes") as report_progress:
        report = inspect_file(file, not no_hash, report_progress)
    origin = describe_origin(file, report.hashes.sha256 if report.hashes else "")
    print_report(report, origin)


def inspect_picture(file: Path) -> None:
    """Show how a picture was drawn, and the command that draws it again."""
    from kohaku_wrap.sampling.pictures import read_record
    from kohaku_wrap.sampling.replaying import describe_picture

    record, pixels = read_record(file)
    described = describe_picture(file, record, pixels)
    cell = record.cell
    rows: list[tuple[str, Any]] = [("prompt", cell.prompt), ("negative", cell.negative or "(none)")]
    rows += [(name.replace("_", " "), value) for name, value in cell.describe().items()
             if name not in ("prompt", "negative", "format", "compute", "model", "tokenizers", "seed")]  # fmt: skip
    rows += [("seed", str(cell.seed)), ("computed", ", ".join(f"{k} {v}" for k, v in asdict(cell.compute).items()))]
    sizes = f"original and target {cell.width}x{cell.height}, crop at 0, 0"
    if second := cell.second_size:
        sizes += f"; in the second pass {second[1]}x{second[0]}"
    rows.append(("size conditions", sizes))
    for number, each in enumerate(record.files):
        weight = f" at {each.weight}" if each.weight else ""
        kind = "VAE" if each.part else "network" if number else "checkpoint"
        rows.append((kind, f"{each.name}{weight}, sha256 {each.sha256}"))
    if record.optimizer_step is not None:
        rows.append(("optimizer step", record.optimizer_step))
    rows.append(("prediction by", record.prediction_from or "nothing says it; epsilon was assumed"))
    rows.append(("drawn by", ", ".join(f"{name} {version}" for name, version in record.versions.items())))
    rows.append(("device", record.device_name))
    rows.append(("pixels", "as drawn" if described["pixels_as_drawn"] else "changed since it was drawn"))
    rows += [("not known here", name) for name in described["unknown_files"]]
    print_answer(described, str(file), rows)
    # Not broken to the terminal's width: it is to be copied.
    if not wants_json():
        click.echo(f"Drawn again by:\n{described['replay']}".translate(ESCAPES_IN_LINES))


def inspect_tars(folder: Path) -> None:
    """Show how the tars of a folder are named, and which posts each holds."""
    from kohaku_wrap.dataset.images.tar_layouts import describe_tars
    from kohaku_wrap.dataset.images.tars import list_tar

    described = describe_tars(folder, lambda path: len(list_tar(path).members))
    payload = {"folder": str(folder), "kind": "tars of images", **described}
    layouts = described.pop("layouts")
    described["not_regular_files"] = ", ".join(described["not_regular_files"]) or None
    rows: list[tuple[str, Any]] = [("kind", "tars of images"), *layouts.items()]
    rows += [
        ("size", show_bytes(value)) if name == "size_bytes" else (name.replace("_", " "), value)
        for name, value in described.items()
        if value is not None
    ]
    next_step = command_line("extract", "SELECTION.parquet", "--tars", folder)
    print_answer(payload, str(folder), rows, next_step)


def describe_entry(name: str, value: Any) -> str:
    """A count, or the column of the file that a column is read from, once where both have one name."""
    if isinstance(value, int):
        return f"{name} {value:,}"
    return name if name == value else f"{name}: {value}"


def inspect_database(file: Path, dataset: str | None, tag_table: Path | None) -> None:
    """Show a metadata database."""
    from kohaku_wrap.dataset.images.tar_layouts import count_plain
    from kohaku_wrap.dataset.recipe import load_dataset
    from kohaku_wrap.metadata.columns import DANBOORU
    from kohaku_wrap.metadata.description import describe_database

    mapping = load_dataset(dataset).metadata if dataset else DANBOORU
    described = asdict(describe_database(file, replace(mapping, tag_table=tag_table)))
    images = count_plain(file) if file.is_dir() else {}
    payload = {"file": str(file), "kind": "metadata database", **described, "images": images}
    rows: list[tuple[str, Any]] = [("kind", "metadata database")]
    for name, value in described.items():
        if isinstance(value, Mapping):
            if name == "lacks":
                rows += [(f"lacks: {what}", sentence) for what, sentence in value.items()]
                continue
            value = ", ".join(describe_entry(*entry) for entry in value.items())
        elif isinstance(value, tuple):
            value = ", ".join(value)
        elif name == "size_bytes":
            name, value = "size", f"{show_bytes(value)} ({value:,} bytes)"
        if name != "path" and value not in (None, ""):
            rows.append((name.replace("_", " "), value))
    rows += [(f"images: {layout}", says) for layout, says in images.items()]
    name = dataset or "epsilon"
    words = ["--tags", tag_table] if tag_table else []
    next_step = command_line("select", name, "--db", file, "--out", f"{Path(name).stem}.parquet", *words)
    print_answer(payload, str(file), rows, next_step)
