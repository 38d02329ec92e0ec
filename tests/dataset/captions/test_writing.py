"""Caption files: every form, written whole, only where something changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from kohaku_wrap.cli import run_program
from kohaku_wrap.cli.caption import command
from kohaku_wrap.dataset.captions.folder import CaptionsBusy, lock_captions
from kohaku_wrap.dataset.captions.quality import SelectionNeeded
from kohaku_wrap.dataset.captions.recipe import CaptionRecipe
from kohaku_wrap.dataset.captions.report import CaptionReport, Changes
from kohaku_wrap.dataset.captions.writing import write_captions
from kohaku_wrap.dataset.recipe import load_dataset, read_dataset
from kohaku_wrap.dataset.selection import select_posts
from kohaku_wrap.formats.caption_rows import NoImages
from kohaku_wrap.metadata import relations, streamed
from kohaku_wrap.metadata.database import open_database

ALL = ("txt", "cache", "jsonl")
Extract = Callable[..., None]


class Folder:
    """A database, a selection and an image folder."""

    def __init__(self, path: Path, writer: ModuleType, extract: Extract) -> None:
        self.path = path
        self.writer, self.extract = writer, extract
        self.database = writer.write_layout(path / "a.db", writer.make_world(150))
        self.selection = path / "sel.parquet"
        self.images = path / "images"
        self.select({"drop": {"after_sample": ["deleted", "gold", "no_still_image"]}})

    def select(self, selection: dict[str, Any]) -> None:
        dataset = read_dataset({"selection": selection, "caption": {"suffix": ["rating"]}}, "mine")
        select_posts(open_database(self.database), dataset, self.selection)

    def write(self, formats: tuple[str, ...] = ALL, **caption: Any) -> CaptionReport:
        recipe = read_dataset({"caption": caption}, "mine").caption
        database = open_database(self.database)
        return write_captions(database, self.selection, self.images, recipe, formats, "mine", threads=2)

    @property
    def ids(self) -> list[int]:
        ids: list[int] = pq.read_table(self.selection).column("id").to_pylist()
        return ids

    def texts(self) -> dict[str, str]:
        return {path.stem: path.read_text("utf-8") for path in self.images.glob("*/*.txt")}

    def cache(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.images / "metadata_cache.json").read_text("utf-8"))
        return content

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.images / "captions.jsonl").read_text("utf-8").splitlines()]

    def columns(self) -> pa.Table:
        with pa.memory_map(str(self.images / "captions.arrow")) as source:
            return pa.ipc.open_file(source).read_all()


@pytest.fixture
def folder(tmp_path: Path, writer: ModuleType, extract: Extract) -> Folder:
    return Folder(tmp_path, writer, extract)


def test_every_form_tells_the_same(folder: Folder) -> None:
    folder.extract(folder.selection, folder.images, skip=(folder.ids[3], folder.ids[7]))
    report = folder.write()
    rows = folder.columns().to_pylist()
    assert report.posts == len(folder.ids) and report.images == len(rows) == len(folder.ids) - 2
    assert [row["id"] for row in rows] == [one for one in folder.ids if one not in (folder.ids[3], folder.ids[7])]
    cache = folder.cache()
    assert list(cache) == [str(folder.images / row["file"]) for row in rows]
    for row in rows:
        entry = cache[str(folder.images / row["file"])]
        assert entry == {"caption": row["caption"], "resolution": [row["width"], row["height"]]}
        assert row["width"] == 20 + row["id"] % 30 and (folder.images / row["file"]).is_file()
    assert folder.texts() == {str(row["id"]): row["caption"] for row in rows}
    by_path = {line["image_path"]: line for line in folder.lines()}
    assert len(folder.lines()) == len(by_path) == len(folder.ids)
    for row in rows:
        line = by_path.pop(str(folder.images / row["file"]))
        assert line["caption"] == row["caption"] and line["image_size"] == [row["width"], row["height"]]
    missing = sorted(by_path)
    assert [Path(path).stem for path in missing] == sorted(str(folder.ids[place]) for place in (3, 7))
    assert all("image_size" not in line for line in by_path.values())


@pytest.mark.parametrize("columns", [{"x": [1]}, {"id": [1], "caption": [2]}, {"id": ["a"]}])
def test_an_arrow_file_of_another_program_is_replaced(folder: Folder, columns: dict[str, list[Any]]) -> None:
    folder.extract(folder.selection, folder.images)
    table = pa.table(columns)
    with pa.OSFile(str(folder.images / "captions.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert folder.write(("jsonl",)).formats["arrow"] == Changes(written=len(folder.ids))
    assert folder.columns()["id"].to_pylist() == folder.ids


def test_columns_carry_their_digest(folder: Folder) -> None:
    folder.extract(folder.selection, folder.images)
    report = folder.write(("jsonl",))
    table = folder.columns()
    about = json.loads(table.schema.metadata[b"kwrap"])
    assert about["prompt_format"].startswith("<1girl/1boy/1other/...>, <character>, <series>, <artists>, <gener")
    assert about["selection_sha256"] == hashlib.sha256(folder.selection.read_bytes()).hexdigest()
    told = "".join(
        f"{row['id']}\t{row['file']}\t{row['width']}\t{row['height']}\t{row['caption']}\n" for row in table.to_pylist()
    )
    assert about["digest"] == report.digest == hashlib.sha256(told.encode()).hexdigest()
    assert about["count"] == table.num_rows and about["style"] == "kohaku" and about["dataset"] == "mine"
    assert table.schema.field("caption").type == pa.large_string()
    # The footer's schema has the digest too: readers may take either.
    assert b"0" * 64 not in (folder.images / "captions.arrow").read_bytes()


def test_digest_does_not_depend_on_pieces(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.extract(folder.selection, folder.images)
    whole = folder.write(("cache", "jsonl"))
    before = {name: (folder.images / name).read_bytes() for name in ("metadata_cache.json", "captions.jsonl")}
    monkeypatch.setattr(streamed, "ROWS_A_BATCH", 100)
    monkeypatch.setattr(relations, "IDS_A_QUERY", 5)
    pieces = folder.write(("cache", "jsonl"))
    assert pieces.digest == whole.digest and pieces.formats["cache"] == Changes(unchanged=len(folder.ids))
    assert {name: (folder.images / name).read_bytes() for name in before} == before
    assert pieces.formats["arrow"] == Changes(unchanged=len(folder.ids))
    # What lies there now has many batches, which are compared with one.
    monkeypatch.undo()
    assert folder.write(("txt",)).formats["arrow"] == Changes(unchanged=len(folder.ids))


def test_captions_hold_what_json_must_escape(folder: Folder) -> None:
    folder.extract(folder.selection, folder.images)
    folder.write()
    captions = [line["caption"] for line in folder.lines()]
    assert any('holding "sign"' in caption for caption in captions)
    assert any("\\||/" in caption for caption in captions)


def test_non_ascii_tags_and_folders(tmp_path: Path, writer: ModuleType, extract: Extract) -> None:
    home = tmp_path / 'bilder "ä"'
    home.mkdir()
    folder = Folder(home, writer, extract)
    with closing(sqlite3.connect(folder.database)) as connection, connection:
        connection.execute("UPDATE tag SET name = 'größe_ö' WHERE name = 'solo'")
    folder.extract(folder.selection, folder.images)
    folder.write()
    assert any("größe ö" in text for text in folder.texts().values())
    assert {entry["caption"] for entry in folder.cache().values()} == set(folder.texts().values())
    assert all(Path(path).is_file() for path in folder.cache())


def stamps(folder: Folder) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.images.rglob("*") if path.is_file()}


def test_nothing_is_rewritten_without_need(folder: Folder) -> None:
    folder.extract(folder.selection, folder.images)
    first = folder.write()
    count = len(folder.ids)
    assert first.formats == {name: Changes(written=count) for name in ("txt", "cache", "jsonl", "arrow")}
    before = stamps(folder)
    second = folder.write()
    assert second.formats == {name: Changes(unchanged=count) for name in ("txt", "cache", "jsonl", "arrow")}
    assert stamps(folder) == before


def test_only_what_changed_is_written_and_what_is_gone_removed(folder: Folder) -> None:
    folder.extract(folder.selection, folder.images)
    folder.write()
    ids, before = folder.ids, folder.texts()
    with closing(sqlite3.connect(folder.database)) as connection, connection:
        connection.execute("UPDATE post SET rating = (rating + 1) % 4, fav_count = 5000 WHERE id = ?", (ids[5],))
    folder.select({"drop": {"after_sample": ["deleted", "gold", "no_still_image"]}, "strata": [{"last_id": ids[-4]}]})
    report = folder.write(quality={"cutoffs": "published"})
    report = folder.write(quality={"cutoffs": "published"})
    assert set(folder.texts()) == {str(one) for one in folder.ids} and len(folder.ids) == len(ids) - 3
    assert report.formats["txt"] == Changes(unchanged=len(ids) - 3)
    assert folder.texts()[str(ids[5])] != before[str(ids[5])]


def test_removed_and_changed_are_counted(folder: Folder) -> None:
    folder.extract(folder.selection, folder.images)
    folder.write(suffix=["rating"])
    ids = folder.ids
    (folder.images / f"{ids[0] % 1000:04d}" / f"{ids[0]}.txt").write_text("by hand")
    (folder.images / f"{ids[1] % 1000:04d}" / f"{ids[1]}.txt").unlink()
    with closing(sqlite3.connect(folder.database)) as connection, connection:
        connection.execute("UPDATE post SET rating = (rating + 1) % 4 WHERE id = ?", (ids[2],))
    folder.select({"drop": {"after_sample": ["deleted", "gold", "no_still_image"]}, "strata": [{"last_id": ids[-4]}]})
    report = folder.write(suffix=["rating"])
    assert report.formats["arrow"] == Changes(written=1, unchanged=len(ids) - 4, removed=3)
    assert report.formats["txt"] == Changes(written=3, unchanged=len(ids) - 6, removed=3)
    assert report.changes == report.formats["txt"]
    assert not list(folder.images.rglob(".*"))


def test_a_text_that_kwrap_did_not_write_stays(folder: Folder) -> None:
    folder.extract(folder.selection, folder.images)
    folder.write()
    note = folder.images / "0001" / "999001.txt"
    note.parent.mkdir(exist_ok=True)
    note.write_text("mine")
    folder.write()
    assert note.read_text() == "mine"


def test_images_gone_since_extract_are_left_out(folder: Folder) -> None:
    folder.extract(folder.selection, folder.images)
    gone = next(folder.images.glob(f"*/{folder.ids[4]}.*"))
    gone.unlink()
    report = folder.write()
    assert report.vanished == 1 and report.images == len(folder.ids) - 1
    assert str(gone) not in folder.cache()
    assert len(folder.lines()) == len(folder.ids)


def test_without_images_only_the_lines(folder: Folder) -> None:
    report = folder.write()
    assert set(report.formats) == {"jsonl"} and "run `kwrap extract`" in report.notes[0]
    assert [path.name for path in folder.images.iterdir()] == ["captions.jsonl"]
    with pytest.raises(NoImages, match="nothing was extracted into this folder"):
        folder.write(("txt", "cache"))


def test_other_peoples_images_are_not_captioned(folder: Folder) -> None:
    folder.extract(folder.selection, folder.images)
    ids = folder.ids
    folder.select({"strata": [{"first_id": ids[10], "last_id": ids[20]}]})
    report = folder.write()
    assert report.images <= report.posts <= ids[20] - ids[10] + 1
    assert len(folder.cache()) == report.images


def test_another_database_and_stale_files_are_told(folder: Folder) -> None:
    folder.extract(folder.selection, folder.images)
    folder.write()
    with closing(sqlite3.connect(folder.database)) as connection, connection:
        connection.execute("DELETE FROM posttagrelation WHERE id > 500")
    report = folder.write(("txt",))
    assert report.notes[0] == "the database is not the one that the selection was made from"
    assert [note.split(" is from an earlier call")[0] for note in report.notes[1:]] == [
        str(folder.images / "metadata_cache.json"),
        str(folder.images / "captions.jsonl"),
    ]


def test_texts_that_are_not_written_again_are_told(folder: Folder) -> None:
    folder.extract(folder.selection, folder.images)
    images = folder.write(("txt",)).images
    assert folder.write(("cache",)).notes == (
        f".txt files beside {images} images were not written now; add txt to --format to write them",
    )


def test_what_a_killed_call_left_is_removed(folder: Folder) -> None:
    folder.extract(folder.selection, folder.images)
    for name in (".captions.arrow.1.part", ".captions.jsonl.1.part", ".metadata_cache.json.1.part", ".captioning"):
        (folder.images / name).write_bytes(b"half")
    folder.write()
    assert not list(folder.images.rglob(".*"))


def test_two_calls_do_not_share_a_folder(folder: Folder) -> None:
    folder.extract(folder.selection, folder.images)
    before = folder.write()
    with lock_captions(folder.images), pytest.raises(CaptionsBusy, match="or `kwrap import` writes in"):
        folder.write()
    assert folder.write().digest == before.digest


def test_a_text_is_replaced_whole_or_not_at_all(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.extract(folder.selection, folder.images)
    folder.write(("txt",))
    before = folder.texts()
    monkeypatch.setattr("kohaku_wrap.dataset.captions.formats.os.write", lambda descriptor, content: 1)
    with pytest.raises(OSError, match="No space left"):
        folder.write(("txt",), suffix=["rating"])
    assert folder.texts() == before


def test_rows_out_of_order_are_sorted_and_told(
    folder: Folder, writer: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relations, "IDS_A_QUERY", 5)
    folder.extract(folder.selection, folder.images)
    expected = folder.write()
    world = writer.make_world(150)
    # Later rows first, but each post's own rows in their order: the captions must be the same.
    world.relations.sort(key=lambda row: -row[0])
    folder.database.unlink()
    writer.write_layout(folder.database, world, indexed=False)
    report = folder.write()
    assert report.sorted_rows and not expected.sorted_rows
    assert report.digest == expected.digest
    assert not list(folder.images.rglob(".*"))


def test_moved_folder_is_relocated(folder: Folder) -> None:
    folder.extract(folder.selection, folder.images)
    folder.write()
    moved = folder.path / "elsewhere" / "pictures"
    shutil.copytree(folder.images, moved)
    gone = next(moved.glob(f"*/{folder.ids[0]}.*g"))
    gone.unlink()
    result = CliRunner().invoke(command, ["--relocate", "--out", str(moved), "--json"])
    assert result.exit_code == 0, result.output
    count = len(folder.ids)
    document = json.loads(result.stdout)
    assert document["relocated"] == {"metadata_cache.json": count - 1, "captions.jsonl": count}
    assert document["missing"] == 1
    old = {Path(path).name: entry for path, entry in folder.cache().items()}
    folder.images = moved
    assert {Path(path).name: entry for path, entry in folder.cache().items()} == {
        name: entry for name, entry in old.items() if name != gone.name
    }
    assert all(Path(path).is_file() and path.startswith(str(moved)) for path in folder.cache())
    assert all(line["image_path"].startswith(str(moved)) for line in folder.lines())


def test_only_own_files_are_relocated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(["caption", "--relocate", "--out", str(tmp_path)]) == 1
    assert "neither metadata_cache.json nor captions.jsonl" in capsys.readouterr().err
    foreign = json.dumps({"/a/b.jpg": {"caption": "x", "resolution": [1, 2]}}, indent=2)
    (tmp_path / "metadata_cache.json").write_text(foreign)
    assert run_program(["caption", "--relocate", "--out", str(tmp_path)]) == 1
    assert (tmp_path / "metadata_cache.json").read_text() == foreign


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.jsonl", b'{"image_path": 5}\n'),
        ("captions.jsonl", b'{"image_path": "b.jpg"}\n'),
        ("captions.jsonl", b'{"caption": "a"}\n'),
        ("captions.jsonl", b"[1]\n"),
        ("captions.jsonl", b"\xff\n"),
        ("metadata_cache.json", b'{\n"/a/\xff/b.png": 1\n}\n'),
        ("metadata_cache.json", b'{\n"b.png": 1\n}\n'),
    ],
)
def test_a_file_of_another_form_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    assert run_program(["caption", "--relocate", "--out", str(tmp_path)]) == 1
    assert f"{name}: not in the form that `kwrap caption` writes" in capsys.readouterr().err
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, content)]


def test_command_takes_the_rules_of_the_selection(folder: Folder) -> None:
    folder.extract(folder.selection, folder.images)
    arguments = [str(folder.selection), "--db", str(folder.database), "--out", str(folder.images), "--json"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["dataset"] == "mine" and document["written"] == len(folder.ids)
    assert set(document["formats"]) == {"cache", "jsonl", "arrow"}
    shown = CliRunner().invoke(command, [*arguments[:-1], "--format", "txt,cache,jsonl"]).stdout
    named = [line.split("  ")[0] for line in shown.splitlines() if "unchanged" in line]
    assert named == [".txt files", "captions.arrow", "metadata_cache.json", "captions.jsonl"]
    caption = next(iter(folder.cache().values()))["caption"]
    assert caption.rsplit(" ||| ", 1)[1] in ("safe", "sensitive", "nsfw", "nsfw, explicit")
    result = CliRunner().invoke(command, [*arguments, "--dataset", "epsilon", "--style", "hakubooru"])
    document = json.loads(result.stdout)
    assert document["dataset"] == "epsilon" and document["style"] == "hakubooru"
    assert all(entry["caption"].count("|||") == 1 for entry in folder.cache().values())


def test_a_rating_that_nothing_was_counted_of_has_no_cutoffs(tmp_path: Path) -> None:
    (tmp_path / "posts.csv").write_text("id,tag_string_general,rating\n1,solo,g\n")
    arguments = ["--post", "1", "--db", str(tmp_path / "posts.csv")]
    assert "general, unknown\n" in CliRunner().invoke(command, arguments).stdout
    document = json.loads(CliRunner().invoke(command, [*arguments, "--json"]).stdout)
    assert set(document["cutoffs"].values()) == {None}


def test_command_explains_one_post(folder: Folder) -> None:
    post = str(folder.ids[0])
    result = CliRunner().invoke(command, ["--post", post, "--db", str(folder.database)])
    assert result.exit_code == 0 and result.stdout.splitlines()[-1].count(" ||| ") == 2
    result = CliRunner().invoke(command, ["--post", post, "--db", str(folder.database), "--json"])
    document = json.loads(result.stdout)
    assert [group["group"] for group in document["groups"]] == [
        "people", "character", "series", "artist", "|||", "general", "|||", "quality", "year", "meta", "rating",
    ]  # fmt: skip


def test_a_tag_table_that_is_not_needed_is_noted(folder: Folder) -> None:
    words = ["--post", str(folder.ids[0]), "--db", str(folder.database)]
    plain, given = (CliRunner().invoke(command, [*words, *more]) for more in ([], ["--tags", "tags.csv"]))
    assert given.stdout == plain.stdout and not plain.stderr
    assert given.stderr.startswith("note: --tags tags.csv is not read")


def test_an_explained_caption_is_the_one_that_is_written(folder: Folder) -> None:
    caption = {"suffix": ["quality"], "quality": {"cutoffs": "selection"}}
    dataset = folder.path / "mine.toml"
    dataset.write_text('[selection]\n[caption]\nsuffix = ["quality"]\n[caption.quality]\ncutoffs = "selection"\n')
    folder.write(("jsonl",), **caption)
    arguments = ["--db", str(folder.database), "--dataset", str(dataset)]
    for post, line in zip(folder.ids[:20], folder.lines(), strict=False):
        result = CliRunner().invoke(command, [str(folder.selection), "--post", str(post), *arguments])
        assert result.stdout.splitlines()[-1] == line["caption"]
    with pytest.raises(SelectionNeeded):
        CliRunner().invoke(command, ["--post", str(folder.ids[0]), *arguments], catch_exceptions=False)
    # Without --dataset it is the selection's own recipe.
    plain = CliRunner().invoke(command, [str(folder.selection), "--post", str(folder.ids[0]), *arguments[:2]])
    assert "quality" not in plain.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["SEL", "--db", "DB"], 2, "--out IMAGES is missing"),
        (["SEL", "--out", "IMAGES"], 2, "--db DB is missing"),
        (["--db", "DB", "--out", "IMAGES"], 2, "SEL.parquet is missing"),
        (["SEL", "--db", "DB", "--out", "IMAGES", "--format", "txt,xml"], 2, "xml is not among txt, cache, jsonl"),
        (["SEL", "--db", "DB", "--out", "IMAGES", "--format", "txt"], 1, "Run `kwrap extract"),
        (["DB", "--db", "DB", "--out", "IMAGES"], 1, "not a selection"),
        (["NONE", "--db", "DB", "--out", "IMAGES"], 1, "no such file"),
        (["--post", "2", "--db", "DB"], 1, "no post 2"),
    ],
)
def test_faults_end_in_one_message(
    folder: Folder, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    names = {
        "SEL": folder.selection,
        "DB": folder.database,
        "IMAGES": folder.images,
        "NONE": folder.path / "no.parquet",
    }
    assert run_program(["caption", *(str(names.get(one, one)) for one in arguments)]) == code
    assert words in capsys.readouterr().err


def test_full_disk_leaves_no_half_text(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.extract(folder.selection, folder.images)
    monkeypatch.setattr("kohaku_wrap.dataset.captions.formats.os.write", lambda descriptor, content: 1)
    with pytest.raises(OSError, match="No space left"):
        folder.write(("txt",))
    assert folder.texts() == {}
    assert not list(folder.images.rglob(".*"))


@pytest.mark.slow
def test_interrupt_leaves_whole_files_and_the_next_call_finishes(
    tmp_path: Path, writer: ModuleType, extract: Extract
) -> None:
    folder = Folder(tmp_path, writer, extract)
    folder.database.unlink()
    writer.write_layout(folder.database, writer.make_world(1500), indexed=False)
    folder.select({})
    table = pq.read_table(folder.selection)
    files = [f"{post % 1000:04d}/{post}.png" for post in folder.ids]
    for name in files:
        (folder.images / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.images / name).touch()
    sizes = pa.array([9] * len(files), pa.int32())
    columns = {
        "id": table.column("id"),
        "file": files,
        "width": sizes,
        "height": sizes,
        "size_bytes": sizes.cast("int64"),
    }
    pq.write_table(pa.table(columns), folder.images / "extracted.parquet")
    slow = (
        "import sys, time\nfrom kohaku_wrap.metadata import streamed\nstreamed.ROWS_A_BATCH = 500\n"
        "from kohaku_wrap.dataset.captions import formats\nwrite = formats.write_text_files\n"
        "def slowly(*arguments):\n    time.sleep(0.05)\n    return write(*arguments)\n"
        "formats.write_text_files = slowly\n"
        "from kohaku_wrap.cli import run_program\nsys.exit(run_program(sys.argv[1:]))\n"
    )
    arguments = ["caption", str(folder.selection), "--db", str(folder.database), "--out", str(folder.images)]
    arguments += ["--format", "txt,cache,jsonl", "--dataset", "epsilon"]
    child = subprocess.Popen([sys.executable, "-c", slow, *arguments], env=os.environ)
    while not list(folder.images.glob("*/*.txt")):
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 130
    done = folder.texts()
    assert 0 < len(done) < len(files) and all(" ||| " in text for text in done.values())
    assert {path.name for path in folder.images.iterdir() if path.is_file()} == {"extracted.parquet"}
    recipe = load_dataset("epsilon").caption
    assert recipe == CaptionRecipe()
    report = write_captions(
        open_database(folder.database), folder.selection, folder.images, recipe, ALL, "epsilon", threads=2
    )
    assert report.formats["txt"].written == len(files) - len(done)
    assert len(folder.cache()) == len(folder.texts()) == len(files)
