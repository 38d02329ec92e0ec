"""Every published way to name tars: the same posts come out of each, and `kwrap inspect` names it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import shutil
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from kohaku_wrap.cli import program
from kohaku_wrap.dataset.images.extract import extract_images
from kohaku_wrap.dataset.images.tar_layouts import NoTars, SeveralSites, find_tars
from kohaku_wrap.dataset.images.tars import list_tar

IDS = (7, 1_007, 2_345, 12_345, 999_999, 7_501_000, 7_501_999, 7_502_001)


def draw(post_id: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), (post_id % 256, post_id // 256 % 256, 9)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, ids: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for post_id in ids:
            content = draw(post_id)
            member = tarfile.TarInfo(f"{post_id}.png")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def name_of(layout: str, post_id: int) -> str:
    names = {
        "data-0NNN.tar": f"original/data-0{post_id % 1000:03}.tar",
        "images/0NNN.tar": f"images/0{post_id % 1000:03}.tar",
        "images/D/0NNN.tar": f"images/{post_id // 1000 % 10}/0{post_id % 1000:03}.tar",
        "{start_id}.tar": f"shards/{post_id // 1000 * 1000}.tar",
        "updates/*-D.tar": f"updates/20240101/20240101-{post_id % 10}.tar",
    }
    return names[layout]


def name_by_site(site: str, post_id: int) -> str:
    """As gallery-dl names files by default; some sites have words before the md5."""
    words = "__some_tags_drawn_by_someone__" if post_id % 2 else ""
    return f"{site}_{post_id}_{words}{hashlib.md5(draw(post_id)).hexdigest()}.png"


def write_layout(folder: Path, layout: str) -> None:
    if layout in ("ID.ext", "SITE_ID_MD5.ext"):
        for post_id in IDS:
            name = f"{post_id}.png" if layout == "ID.ext" else name_by_site("danbooru", post_id)
            path = folder / f"{post_id % 100:02}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(draw(post_id))
        return
    tars: dict[str, list[int]] = {}
    for post_id in IDS:
        tars.setdefault(name_of(layout, post_id), []).append(post_id)
    for name, ids in tars.items():
        write_tar(folder / name, ids)


@pytest.fixture
def selection(tmp_path: Path) -> Path:
    path = tmp_path / "s.parquet"
    pq.write_table(pa.table({"id": pa.array(IDS, pa.int64())}), path)
    return path


@pytest.mark.parametrize(
    "layout",
    ["data-0NNN.tar", "images/0NNN.tar", "images/D/0NNN.tar", "{start_id}.tar", "updates/*-D.tar", "ID.ext",
     "SITE_ID_MD5.ext"],
)  # fmt: skip
def test_every_layout_gives_every_post_and_is_named(layout: str, selection: Path, tmp_path: Path) -> None:
    tars = tmp_path / "set"
    write_layout(tars, layout)
    report = extract_images(selection, tars, tmp_path / "images")
    assert (report.written, report.missing, report.corrupt) == (len(IDS), [], [])
    for post_id in IDS:
        assert (tmp_path / "images" / f"{post_id % 1000:04}" / f"{post_id}.png").read_bytes() == draw(post_id)
    shown = CliRunner().invoke(program, ["inspect", str(tars), "--json"], standalone_mode=False)
    document = json.loads(shown.stdout)
    assert list(document["layouts"]) == [layout]
    assert document["tars"] + document["files_without_tar"] == sum(1 for path in tars.rglob("*.*") if path.is_file())


def test_inspect_says_which_options_it_does_not_read(tmp_path: Path) -> None:
    write_layout(tmp_path / "tars", "ID.ext")
    picture = tmp_path / "drawn.png"
    picture.write_bytes(draw(7))
    for place, use in ((tmp_path / "tars", "with tars"), (picture, "with a picture")):
        refused = CliRunner().invoke(program, ["inspect", str(place), "--dataset", "e621"], standalone_mode=False)
        assert refused.exception and f"--dataset does nothing {use}" in str(refused.exception)


def test_posts_that_gallery_dl_fetched_are_selected_by_its_json_and_extracted(tmp_path: Path) -> None:
    folder, images = tmp_path / "gallery-dl", tmp_path / "images"
    write_layout(folder, "SITE_ID_MD5.ext")
    for path in list(folder.rglob("*.png")):
        post_id = int(path.name.split("_")[1])
        post = {"id": post_id, "category": "danbooru", "md5": path.stem[-32:], "file_ext": "png", "rating": "g",
                "created_at": "2023-05-01T10:00:00.000-04:00", "score": 1, "fav_count": 1, "tag_string": "1girl",
                "tag_string_general": "1girl", "image_width": 40, "image_height": 30}  # fmt: skip
        path.with_name(f"{path.name}.json").write_text(json.dumps(post))
    (tmp_path / "all.toml").write_text('[[selection.strata]]\nsample = "all"\n')

    def kwrap(*words: object) -> str:
        done = CliRunner().invoke(program, [*map(str, words)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    described = json.loads(kwrap("inspect", folder, "--json"))
    assert described["kind"] == "metadata database"
    assert described["images"] == {"SITE_ID_MD5.ext": "8, each with one post, as gallery-dl names it"}
    assert "SITE_ID_MD5.ext  8, each with one post" in " ".join(kwrap("inspect", folder).split(maxsplit=0))
    said = kwrap("select", tmp_path / "all.toml", "--db", folder, "--out", tmp_path / "s.parquet")
    typed = shlex.split(said.partition("Next: kwrap ")[2])
    assert typed[:4] == ["extract", str(tmp_path / "s.parquet"), "--tars", str(folder)]
    assert json.loads(kwrap(*typed[:-1], images, "--json"))["written"] == len(IDS)


def test_of_two_files_of_a_post_a_whole_one_is_taken(selection: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    whole, cut = name_by_site("e621", 7), f"e621_7_{'f' * 32}.png"
    (folder / whole).write_bytes(draw(7))
    (folder / cut).write_bytes(draw(7)[:60])
    report = extract_images(selection, folder, tmp_path / "images")
    assert report.written == 1 and not report.corrupt
    assert (tmp_path / "images" / "0007" / "7.png").read_bytes() == draw(7)


def test_ids_of_two_sites_are_not_taken_for_those_of_one(selection: Path, tmp_path: Path) -> None:
    for site in ("danbooru", "gelbooru"):
        (tmp_path / "set" / site).mkdir(parents=True)
        (tmp_path / "set" / site / name_by_site(site, 7)).write_bytes(draw(7))
    with pytest.raises(SeveralSites, match="posts of danbooru and of gelbooru") as refused:
        extract_images(selection, tmp_path / "set", tmp_path / "images")
    assert str(tmp_path / "set" / "danbooru") in refused.value.next_step
    assert extract_images(selection, tmp_path / "set" / "gelbooru", tmp_path / "images").written == 1


@pytest.mark.parametrize("name", ["IMG_20240101_120000.png", "cat_7_beach.png", f"danbooru_x7_{'0' * 32}.png"])
def test_a_number_in_a_name_is_not_taken_for_a_post(name: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_bytes(draw(7))
    with pytest.raises(NoTars):
        find_tars(tmp_path / "set")


def test_layouts_beside_each_other_fill_each_others_gaps(selection: Path, tmp_path: Path) -> None:
    tars = tmp_path / "set"
    write_tar(tars / "images" / "0345.tar", [2_345])
    write_tar(tars / "7501000.tar", [7_501_000, 7_501_999])
    write_tar(tars / "original" / "data-0007.tar", [7])
    report = extract_images(selection, tars, tmp_path / "images")
    assert report.written == 4
    assert dict(report.missing)[12_345] == "not in 0345.tar"
    assert dict(report.missing)[7_502_001] == "there is no data-0001.tar for ids ending in 001"
    assert find_tars(tars).counts == {"data-0NNN.tar": 1, "images/0NNN.tar": 1, "{start_id}.tar": 1}


def test_an_index_of_places_alone_is_used_where_it_fits(selection: Path, tmp_path: Path) -> None:
    tar = tmp_path / "set" / "7501000.tar"
    write_tar(tar, [7_501_000, 7_501_999])
    walked = {each.name: [each.offset, each.offset + each.size_bytes] for each in list_tar(tar).members}
    index = tar.with_suffix(".json")
    index.write_text(json.dumps(walked))
    listing = list_tar(tar)
    assert listing.from_index and {each.name: each.offset for each in listing.members} == {
        name: start for name, (start, _) in walked.items()
    }
    for wrong in (
        {name: [start + 1, end + 1] for name, (start, end) in walked.items()},
        {name: [start] for name, (start, _) in walked.items()},
        {name: [end, start] for name, (start, end) in walked.items()},
        {name: str(start) for name, (start, _) in walked.items()},
        {},
    ):
        index.write_text(json.dumps(wrong))
        report = extract_images(selection, tar.parent, tmp_path / "images")
        assert report.written == 2 and not report.corrupt
        shutil.rmtree(tmp_path / "images")


def test_a_folder_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "photos.tar").write_bytes(b"")
    (tmp_path / "set" / "7.txt").write_text("a caption")
    with pytest.raises(NoTars, match="named as any published set"):
        find_tars(tmp_path / "set")


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))


@pytest.mark.parametrize(
    ("put", "said"),
    [
        (os.mkfifo, "not a regular file"),
        (bind_socket, "not a regular file"),
        (os.mkdir, "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
    ],
    ids=["pipe", "socket", "folder", "device", "link to nothing"],
)
@pytest.mark.parametrize("name", ["data-0007.tar", "7501000.tar", "7.png"])
def test_what_is_no_regular_file_is_not_called_absent(
    name: str, put: Callable[[Path], None], said: str, selection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tars = tmp_path / "set"
    tars.mkdir()
    put(tars / name)
    report = extract_images(selection, tars, tmp_path / "images")
    reasons = {**dict(report.missing), **dict(report.corrupt)}
    assert f"{name} cannot be read: {said}" in reasons[7_501_000 if name.startswith("75") else 7]
    assert report.written == 0 and len(reasons) == len(IDS)
    shown = CliRunner().invoke(program, ["inspect", str(tars), "--json"], standalone_mode=False)
    assert json.loads(shown.stdout)["not_regular_files"] == [name]
