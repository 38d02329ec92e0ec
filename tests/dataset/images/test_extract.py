"""Images come out whole, every selected post is accounted for, and nothing hostile gets through."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from kohaku_wrap.cli.extract import command
from kohaku_wrap.dataset.images import pool
from kohaku_wrap.dataset.images.checking import ImageRefused, check_image
from kohaku_wrap.dataset.images.extract import extract_images
from kohaku_wrap.dataset.images.extract_report import ImagesMissing
from kohaku_wrap.dataset.images.extracted import FolderBusy, JournalFolder
from kohaku_wrap.dataset.images.tar_layouts import NoTars, find_tars
from kohaku_wrap.dataset.selection_file import BadSelection
from kohaku_wrap.training.data.images import UnreadableImage


def draw(size: tuple[int, int] = (40, 30), kind: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(stream, kind, **options)
    return stream.getvalue()


def lie_in_png(content: bytes, width: int, height: int) -> bytes:
    changed = content[:16] + struct.pack(">II", width, height) + content[24:29]
    return changed + struct.pack(">I", zlib.crc32(changed[12:29])) + content[33:]


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_selection(path: Path, ids: list[int], sizes: tuple[int, int] = (40, 30)) -> Path:
    columns = {"id": pa.array(ids, pa.int64())}
    columns["image_width"] = pa.array([sizes[0]] * len(ids), pa.int32())
    columns["image_height"] = pa.array([sizes[1]] * len(ids), pa.int32())
    pq.write_table(pa.table(columns), path)
    return path


def list_images(images: Path) -> dict[str, bytes]:
    return {str(path.relative_to(images)): path.read_bytes() for path in sorted(images.glob("[0-9]*/*"))}


def read_rows(images: Path) -> list[dict]:
    return pq.read_table(images / "extracted.parquet").to_pylist()


@pytest.fixture
def place(tmp_path):
    class Place:
        tars = tmp_path / "tars"
        images = tmp_path / "images"
        selection = tmp_path / "selection.parquet"

        def extract(self, ids: list[int], **options):
            write_selection(self.selection, ids)
            return extract_images(self.selection, self.tars, self.images, **options)

    return Place()


def test_both_layouts_and_updates(place):
    pictures = {number: draw() for number in (1001, 6_001_001, 7_300_002, 8_000_013, 9_000_013)}
    webp = draw(kind="WEBP")
    write_tar(place.tars / "original" / "data-0001.tar", {"1001.jpg": pictures[1001], "2001.png": b"not wanted"})
    write_tar(place.tars / "recent" / "data-1001.tar", {"6001001.jpg": pictures[6_001_001]})
    write_tar(place.tars / "images" / "data-0002.tar", {"some/folder/4002.webp": webp})
    write_tar(place.tars / "updates" / "2024" / "20240501-2.tar", {"7300002.jpg": pictures[7_300_002]})
    write_tar(place.tars / "updates" / "2024" / "20240501-3.tar", {"8000013.jpg": pictures[8_000_013]})
    write_tar(place.tars / "updates" / "2025" / "20250101-3.tar", {"9000013.jpg": pictures[9_000_013]})
    (place.tars / "README.tar.txt").write_text("no tar")
    report = place.extract([*pictures, 4002])
    assert (report.written, report.kept, report.missing, report.corrupt) == (6, 0, [], [])
    expected = {f"{number % 1000:04}/{number}.jpg": content for number, content in pictures.items()}
    assert list_images(place.images) == {**expected, "0002/4002.webp": webp}
    rows = read_rows(place.images)
    assert [row["id"] for row in rows] == sorted([*pictures, 4002])
    assert rows[0] == {
        "id": 1001, "file": "0001/1001.jpg", "width": 40, "height": 30,
        "size_bytes": len(pictures[1001]), "max_pixels": 0, "rewritten": 0,
    }  # fmt: skip
    report.check(0)


def test_of_several_the_one_that_decodes_is_taken(place):
    good, newer = draw(), draw()
    write_tar(place.tars / "original" / "data-0001.tar", {"1001.jpg": b"broken", "2001.jpg": draw()})
    write_tar(place.tars / "recent" / "data-1001.tar", {"1001.jpg": good})
    with tarfile.open(place.tars / "original" / "data-0001.tar", "a") as archive:
        member = tarfile.TarInfo("2001.jpg")
        member.size = len(newer)
        archive.addfile(member, io.BytesIO(newer))
    report = place.extract([1001, 2001])
    assert report.written == 2
    assert list_images(place.images) == {"0001/1001.jpg": good, "0001/2001.jpg": newer}


def test_kept_images_are_not_read_again(place):
    tar = write_tar(place.tars / "data-0001.tar", {f"{number}001.jpg": draw() for number in range(1, 6)})
    place.extract([1001, 2001, 3001])
    (place.images / "0001" / "2001.jpg").unlink()
    (place.images / "0001" / "3001.jpg").write_bytes(b"short")
    report = place.extract([1001, 2001, 3001, 4001])
    assert (report.written, report.kept) == (3, 1)
    tar.write_bytes(b"")
    report = place.extract([1001, 2001, 3001, 4001])
    assert (report.written, report.kept) == (0, 4)
    report = place.extract([1001])
    assert (report.written, report.kept) == (0, 1)
    assert len(read_rows(place.images)) == 4, "images of another selection stay known while they are there"
    (place.images / "0001" / "4001.jpg").unlink()
    place.extract([1001])
    assert [row["id"] for row in read_rows(place.images)] == [1001, 2001, 3001]


def test_missing_and_corrupt_are_listed_with_reasons(place):
    whole = draw((80, 60))
    files = {
        "1001.jpg": draw(),
        "2001.jpg": whole[: len(whole) // 2],
        "3001.png": b"no image at all",
        "4001.gif": draw(kind="GIF"),
        "5001.jpg": draw(kind="GIF"),
        "6001.jpg": b"",
    }
    write_tar(place.tars / "data-0001.tar", files)
    report = place.extract([1001, 2001, 3001, 4001, 5001, 6001, 7001, 8002])
    assert [post_id for post_id, _ in report.corrupt] == [2001, 3001, 4001, 5001, 6001]
    reasons = dict(report.corrupt)
    assert "does not decode" in reasons[2001] and reasons[6001].endswith("6001.jpg is empty")
    assert reasons[3001] == "data-0001.tar: 3001.png is no image of a format that is read"
    assert "4001.gif is no still image" in reasons[4001]
    assert "is a GIF under the name of a jpg" in reasons[5001]
    assert report.missing == [
        (7001, "not in data-0001.tar"),
        (8002, "there is no data-0002.tar for ids ending in 002"),
    ]
    assert list(list_images(place.images)) == ["0001/1001.jpg"]
    written = json.loads((place.images / "extract-report.json").read_text())
    assert [entry["id"] for entry in written["missing"]] == [7001, 8002]
    assert [entry["id"] for entry in written["corrupt"]] == [2001, 3001, 4001, 5001, 6001]
    with pytest.raises(ImagesMissing, match=r"7 images .* among 8 selected.*2 missing, 5 corrupt.*2001"):
        report.check(6)
    report.check(7)


def test_a_download_that_failed_is_told_as_what_it_is(place):
    place.tars.mkdir()
    (place.tars / "data-0001.tar").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    write_tar(place.tars / "data-0002.tar", {"1002.jpg": b"<!DOCTYPE html><html>404</html>", "2002.jpg": draw()})
    report = place.extract([1001, 1002, 2002])
    reason = "not in data-0001.tar; data-0001.tar is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    assert report.missing == [(1001, reason)]
    told = "data-0002.tar: 1002.jpg is a web page, most often an error of the server"
    assert report.corrupt == [(1002, told)] and report.written == 1


def test_hostile_members_are_refused_and_listed(place, tmp_path):
    outside = tmp_path / "outside.jpg"
    tar = place.tars / "data-0001.tar"
    bomb = lie_in_png(draw(kind="PNG"), 60_000, 60_000)
    tall = lie_in_png(draw(kind="PNG"), 40, 3000)
    flat = lie_in_png(draw(kind="PNG"), 40, 10)
    jpeg = bytearray(draw())
    start = jpeg.index(b"\xff\xc0")
    jpeg[start + 5 : start + 9] = struct.pack(">HH", 300, 200)
    write_tar(tar, {"1001.png": bomb, "2001.png": tall, "3001.png": flat, "4001.jpg": bytes(jpeg), "9001.jpg": draw()})
    with tarfile.open(tar, "a") as archive:
        for name in (f"{outside}", "../../5001.jpg", "/6001.jpg"):
            member = tarfile.TarInfo(name)
            content = draw()
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, kind in (("7001.jpg", tarfile.SYMTYPE), ("8001.jpg", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(outside)
            archive.addfile(member)
    report = place.extract([number * 1000 + 1 for number in range(1, 10)])
    assert report.written == 1
    assert [post_id for post_id, _ in report.corrupt] == [number * 1000 + 1 for number in range(1, 9)]
    reasons = dict(report.corrupt)
    assert "60000" in reasons[1001] or "3600000000" in reasons[1001]
    assert "fewer pixels" in reasons[2001] and "more pixels" in reasons[3001]
    assert "fewer rows" in reasons[4001]
    assert "symbolic link" in reasons[7001]
    assert {name for _, name, _ in report.refused} >= {"../../5001.jpg", "/6001.jpg", "7001.jpg", "8001.jpg"}
    assert not outside.exists()
    assert list(list_images(place.images)) == ["0001/9001.jpg"]


def test_a_cut_tar_is_listed_and_its_whole_images_taken(place):
    files = {f"{number}001.png": draw(kind="PNG") for number in range(1, 5)}
    tar = write_tar(place.tars / "data-0001.tar", files)
    with tarfile.open(tar) as archive:
        cut = archive.getmember("3001.png").offset_data + 10
    tar.write_bytes(tar.read_bytes()[:cut])
    report = place.extract([1001, 2001, 3001, 4001])
    assert report.written == 2
    assert [post_id for post_id, _ in report.corrupt] == [3001]
    assert [post_id for post_id, _ in report.missing] == [4001]
    assert report.missing[0][1] == "not in data-0001.tar; data-0001.tar is cut short"
    assert report.damaged[0][0] == str(tar) and "cut short" in report.damaged[0][1]


def test_an_index_with_a_wrong_hash_shows_a_changed_member(place):
    tar = write_tar(place.tars / "data-0001.tar", {"1001.jpg": draw(), "2001.jpg": draw()})
    with tarfile.open(tar) as archive:
        files = {
            member.name: {"offset": member.offset_data, "size": member.size, "sha256": "0" * 64}
            for member in archive
            if member.name == "1001.jpg"
        }
    tar.with_suffix(".json").write_text(json.dumps({"filesize": tar.stat().st_size, "files": files}))
    report = place.extract([1001])
    assert "sha256" in dict(report.corrupt)[1001]


def test_large_images_are_reduced_on_request(place):
    files = {
        "1001.jpg": draw((400, 300)),
        "2001.png": draw((300, 400), "PNG"),
        "3001.webp": draw((500, 100), "WEBP"),
        "4001.jpg": draw((50, 50)),
    }
    write_tar(place.tars / "data-0001.tar", files)
    ids = [1001, 2001, 3001, 4001]
    report = place.extract(ids, max_pixels=10_000)
    assert (report.written, report.reduced) == (4, 3)
    for row in read_rows(place.images):
        with Image.open(place.images / row["file"]) as image:
            assert image.size == (row["width"], row["height"])
            assert image.width * image.height <= 10_000
            assert abs(image.width / image.height / {1001: 4 / 3, 2001: 3 / 4, 3001: 5, 4001: 1}[row["id"]] - 1) < 0.03
    assert list_images(place.images)["0001/4001.jpg"] == files["4001.jpg"]
    assert place.extract(ids, max_pixels=10_000).kept == 4
    assert place.extract(ids, max_pixels=5_000).written == 3
    assert place.extract(ids).written == 3
    assert list_images(place.images) == {f"0001/{name}": content for name, content in files.items()}


def test_images_of_an_earlier_kwrap_stay_and_are_counted(place):
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {"1001.jpg": draw(), "2001.jpg": draw(exif=exif), "3001.jpg": draw(exif=exif)}
    write_tar(place.tars / "data-0001.tar", files)
    first = place.extract([1001, 2001])
    assert (first.written, first.rewritten, first.not_looked_at) == (2, 1, 0)
    path = place.images / "extracted.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["rewritten"]), path)
    (place.images / "0001" / "2001.jpg").write_bytes(files["2001.jpg"])
    (place.images / "0001" / "3001.jpg").write_bytes(files["3001.jpg"])
    (place.images / ".extracting").mkdir()
    lines = [f"{post},0001/{post}.jpg,40,30,{len(files[f'{post}.jpg'])},0\n" for post in (2001, 3001)]
    (place.images / ".extracting" / "000001-7.csv").write_text("".join(lines))
    again = place.extract([1001, 2001, 3001])
    assert (again.kept, again.written, again.not_looked_at) == (3, 0, 3)
    assert list_images(place.images)["0001/2001.jpg"] == files["2001.jpg"]
    assert [row["rewritten"] for row in read_rows(place.images)] == [None] * 3


def test_selection_and_tars_must_be_there(place, tmp_path):
    with pytest.raises(BadSelection, match="no such file"):
        extract_images(tmp_path / "none.parquet", place.tars, place.images)
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(BadSelection, match="not a selection"):
        extract_images(tmp_path / "text.parquet", place.tars, place.images)
    with pytest.raises(BadSelection, match="no posts"):
        place.extract([])
    with pytest.raises(NoTars, match="no such folder"):
        place.extract([1001])
    place.tars.mkdir()
    with pytest.raises(NoTars, match="named as any published set"):
        place.extract([1001])
    assert not place.images.exists()


def test_two_extracts_do_not_share_a_folder(place):
    write_tar(place.tars / "data-0001.tar", {"1001.jpg": draw()})
    other = JournalFolder.open(place.images)
    with pytest.raises(FolderBusy, match="another extract"):
        place.extract([1001])
    other.close(finished=False)
    assert place.extract([1001]).written == 1


def test_the_lock_of_a_call_that_ended_meanwhile_is_none(place, monkeypatch):
    lock = fcntl.flock

    def end_the_other_first(file, how):
        shutil.rmtree(place.images / ".extracting")
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", end_the_other_first)
    with pytest.raises(FolderBusy, match="another extract"):
        JournalFolder.open(place.images)


def test_a_damaged_image_is_made_anew_as_training_advises(place):
    write_tar(place.tars / "data-0001.tar", {"1001.jpg": draw()})
    place.extract([1001])
    image = place.images / "0001" / "1001.jpg"
    whole = image.read_bytes()
    # As after a power cut. Its size is right, so that extract alone would keep it.
    image.write_bytes(bytes(len(whole)))
    assert UnreadableImage.advice.startswith("Remove it and run `kwrap extract` again")
    image.unlink()
    assert place.extract([1001]).written == 1
    assert image.read_bytes() == whole


def test_tars_are_sorted_by_what_they_can_hold(tmp_path):
    for name in ("images/data-0007.tar", "original/data-0007.tar", "recent/data-1007.tar", "x/data-0008.tar"):
        write_tar(tmp_path / name, {})
    for name in ("updates/a/20240101-7.tar", "updates/b/20250101-7.tar", "other.tar"):
        write_tar(tmp_path / name, {})
    found = find_tars(tmp_path)
    assert [path.parent.name for path in found.of_shard[7]] == ["original", "recent", "images"]
    assert [path.name for path in found.updates[7]] == ["20250101-7.tar", "20240101-7.tar"]
    assert set(found.of_shard) == {7, 8}


def make_many(place, shards: int, posts: int) -> list[int]:
    content = draw((64, 64))
    for shard in range(shards):
        files = {f"{index * 1000 + shard}.jpg": content for index in range(1, posts + 1)}
        write_tar(place.tars / f"data-{shard:04}.tar", files)
    return [index * 1000 + shard for shard in range(shards) for index in range(1, posts + 1)]


def test_several_processes_give_the_same(place, monkeypatch, tmp_path):
    ids = make_many(place, 6, 10)
    alone = place.extract(ids, jobs=1)
    first = list_images(place.images)
    monkeypatch.setattr(pool, "IMAGES_A_PROCESS", 1)
    place.images = tmp_path / "together"
    together = place.extract([*ids, 7], jobs=2)
    assert (alone.written, together.written) == (60, 60)
    assert together.missing == [(7, "there is no data-0007.tar for ids ending in 007")]
    assert list_images(place.images) == first
    assert not (place.images / ".extracting").exists()


@pytest.mark.parametrize(("how", "jobs"), [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGKILL, 2)])
def test_stopped_anywhere_it_goes_on(place, how, jobs):
    ids = make_many(place, 4, 400)
    write_selection(place.selection, ids)
    arguments = [str(place.selection), "--tars", str(place.tars), "--out", str(place.images), "--jobs", str(jobs)]
    child = subprocess.Popen(
        [sys.executable, "-m", "kohaku_wrap", "extract", *arguments], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while len(list(place.images.glob("0*/[1-9]*.jpg"))) < 30:
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.01)
    child.send_signal(how)
    _, errors = child.communicate(timeout=60)
    if how == signal.SIGINT:
        assert child.returncode == 130, errors
        assert "Traceback" not in errors
    time.sleep(0.3)
    there = list_images(place.images)
    assert 30 <= len([name for name in there if not Path(name).name.startswith(".")]) < len(ids)
    assert not (place.images / "extracted.parquet").exists()
    (place.images / "0000" / ".1000.jpg.part").write_bytes(b"left by a kill")
    report = extract_images(place.selection, place.tars, place.images, jobs=1)
    assert report.kept >= 29
    assert report.kept + report.written == len(ids)
    assert len(read_rows(place.images)) == len(ids)
    assert set(list_images(place.images)) == {f"{number % 1000:04}/{number}.jpg" for number in ids}


def test_command_counts_and_fails_when_images_lack(place):
    write_tar(place.tars / "data-0001.tar", {"1001.jpg": draw(), "2001.jpg": b"broken"})
    write_selection(place.selection, [1001, 2001, 3001])
    arguments = [str(place.selection), "--tars", str(place.tars), "--out", str(place.images)]
    result = CliRunner().invoke(command, [*arguments, "--json"])
    assert isinstance(result.exception, ImagesMissing)
    document = json.loads(result.stdout)
    counts = {name: document[name] for name in ("written", "kept", "missing", "corrupt")}
    assert counts == {"written": 1, "kept": 0, "missing": 1, "corrupt": 1}
    allowed = CliRunner().invoke(command, [*arguments, "--max-missing", "2"])
    assert allowed.exit_code == 0, allowed.output


def test_no_image_at_all_is_an_error_whatever_is_allowed(place):
    write_tar(place.tars / "data-0001.tar", {"5001.jpg": draw()})
    write_selection(place.selection, [1001, 2001])
    arguments = [str(place.selection), "--tars", str(place.tars), "--out", str(place.images), "--max-missing", "99"]
    done = subprocess.run([sys.executable, "-m", "kohaku_wrap", "extract", *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no image of 2 selected posts" in done.stderr


def test_a_disk_that_takes_no_more_leaves_no_half_image(place):
    files = {f"{number}001.png": draw((300, 300), "PNG") for number in range(1, 4)}
    write_tar(place.tars / "data-0001.tar", files)
    write_selection(place.selection, [1001, 2001, 3001])
    program = (
        "import resource, signal, sys; from kohaku_wrap.cli import run_program;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        "sys.exit(run_program(sys.argv[1:]))"
    )
    arguments = ["extract", str(place.selection), "--tars", str(place.tars), "--out", str(place.images)]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"error: {place.images}" in done.stderr and "Traceback" not in done.stderr
    assert list_images(place.images) == {}


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_every_png_mode_passes(mode):
    stream = io.BytesIO()
    Image.effect_noise((37, 21), 60).convert("RGB").convert(mode).save(stream, "PNG")
    checked = check_image(stream.getvalue(), "png")
    assert (checked.width, checked.height, checked.content) == (37, 21, stream.getvalue())


def test_an_interlaced_png_passes():
    passes = ((1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4))
    rows = b"".join(b"\0" + os.urandom(columns) for columns, count in passes for _ in range(count))
    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 1)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    assert check_image(content, "png").width == 8
    with pytest.raises(ImageRefused):
        check_image(lie_in_png(content, 8, 16), "png")


def test_a_grey_jpeg_of_the_right_size_passes():
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(stream, "JPEG")
    assert check_image(stream.getvalue(), "jpg", known_size=(64, 64)).width == 64
    assert check_image(stream.getvalue(), "jpg").width == 64


def test_the_format_decides_where_the_name_is_wrong():
    assert check_image(draw(kind="PNG"), "jpg").extension == "png"
    assert check_image(draw(), "jpeg").extension == "jpeg"
    assert check_image(draw(kind="AVIF"), "avif").extension == "avif"


LITTLE_MEMORY = """
import io, resource
from PIL import Image
from kohaku_wrap.dataset.images.checking import check_image
content = io.BytesIO()
Image.new("RGB", (6000, 6000)).save(content, "PNG", compress_level=1)
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), resource.RLIM_INFINITY))
try:
    check_image(content.getvalue(), "png")
except MemoryError:
    print("no memory")
"""


def test_a_lack_of_memory_is_no_fault_of_the_image():
    shown = subprocess.run([sys.executable, "-c", LITTLE_MEMORY], capture_output=True, text=True, check=False)
    assert shown.stdout == "no memory\n", shown.stderr
