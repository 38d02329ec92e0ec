"""Tars are listed as tarfile lists them, whatever wrote them; what is hostile or damaged is refused and named."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kohaku_wrap.dataset.images.tars import TarReader, TarUnreadable, find_name_fault, list_tar

BLOCK = tarfile.BLOCKSIZE
LONG_FOLDER = "a" * 90 + "/" + "b" * 90


def write_tar(path: Path, files: dict[str, bytes], tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def read_all(path: Path) -> dict[str, bytes]:
    with TarReader(path, lambda name: True) as reader:
        return {member.name: reader.read(member) for member in reader.members}


def write_index(path: Path, **changes) -> None:
    with tarfile.open(path) as archive:
        files = {member.name: {"offset": member.offset_data, "size": member.size} for member in archive}
    index = {"filesize": path.stat().st_size, "hash": "", "hash_lfs": "", "files": files, **changes}
    path.with_suffix(".json").write_text(json.dumps(index))


@settings(deadline=None, max_examples=30)
@given(
    files=st.dictionaries(
        st.one_of(
            st.integers(1, 9_999_999).map(lambda number: f"{number}.jpg"),
            st.integers(1, 99).map(lambda number: f"folder/{number}.png"),
            st.integers(1, 99).map(lambda number: f"{LONG_FOLDER}/{number}.png"),
            st.text("äß漢字", min_size=1, max_size=40).map(lambda text: text + ".webp"),
        ),
        st.binary(max_size=1500),
        max_size=12,
    ),
    tar_format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_every_format_reads_back(tmp_path_factory, files, tar_format):
    path = tmp_path_factory.mktemp("tar") / "data-0000.tar"
    if tar_format == tarfile.USTAR_FORMAT:
        files = {name: content for name, content in files.items() if len(name.encode()) < 255}
    write_tar(path, files, tar_format)
    assert read_all(path) == files
    assert list_tar(path).damage == ""


def test_some_thousand_members(tmp_path):
    files = {f"{number}.jpg": bytes([number % 251]) * (number % 700) for number in range(2100)}
    path = write_tar(tmp_path / "data-0000.tar", files)
    assert read_all(path) == files


def test_gnu_tar_itself(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "1.jpg").write_bytes(b"one" * 500)
    (folder / "2.jpg").write_bytes(b"")
    subprocess.run(["tar", "-cf", "data-0000.tar", "pictures"], cwd=tmp_path, check=True)
    assert read_all(tmp_path / "data-0000.tar") == {"pictures/1.jpg": b"one" * 500, "pictures/2.jpg": b""}


def test_binary_sizes_and_padded_numbers(tmp_path):
    path = write_tar(tmp_path / "data-0000.tar", {"1.jpg": b"x" * 700, "2.jpg": b"y"})
    content = bytearray(path.read_bytes())
    for offset, digits in ((0, b"\x80" + (700).to_bytes(11, "big")), (3 * BLOCK, b"          1\0")):
        content[offset + 124 : offset + 136] = digits
        content[offset + 148 : offset + 156] = b" " * 8
        checksum = sum(content[offset : offset + BLOCK])
        content[offset + 148 : offset + 156] = b"%06o\0 " % checksum
    path.write_bytes(content)
    assert read_all(path) == {"1.jpg": b"x" * 700, "2.jpg": b"y"}


def test_links_devices_and_climbing_names_are_refused(tmp_path):
    path = tmp_path / "data-0000.tar"
    kinds = {
        tarfile.SYMTYPE: "is a symbolic link",
        tarfile.LNKTYPE: "is a hard link",
        tarfile.CHRTYPE: "is a character device",
        tarfile.BLKTYPE: "is a block device",
        tarfile.FIFOTYPE: "is a named pipe",
    }
    with tarfile.open(path, "w") as archive:
        for number, kind in enumerate(kinds, start=1):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name in ("../6.jpg", "/7.jpg", "a/../../8.jpg", "a\\9.jpg", "good/10.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"data"))
    listing = list_tar(path)
    assert [member.name for member in listing.members] == ["good/10.jpg"]
    assert {refusal.name: refusal.reason for refusal in listing.refused} == {
        **{f"{number}.jpg": reason for number, reason in enumerate(kinds.values(), start=1)},
        "../6.jpg": "climbs out of its folder by '..'",
        "/7.jpg": "has an absolute name",
        "a/../../8.jpg": "climbs out of its folder by '..'",
        "a\\9.jpg": "has a backslash in its name",
    }
    assert find_name_fault("a..b/1.jpg") == ""


@pytest.mark.parametrize("cut", [100, 512, 700, 1024, 1600, 3000])
def test_a_cut_archive_gives_what_is_whole(tmp_path, cut):
    files = {f"{number}.jpg": bytes([number]) * 600 for number in range(4)}
    path = write_tar(tmp_path / "data-0000.tar", files)
    path.write_bytes(path.read_bytes()[:cut])
    whole = {name: content for index, (name, content) in enumerate(files.items()) if (index + 1) * 1536 - 424 <= cut}
    assert read_all(path) == whole
    assert list_tar(path).damage


def test_damage_names_its_place(tmp_path):
    files = {f"{number}.jpg": b"x" * 600 for number in range(4)}
    path = write_tar(tmp_path / "data-0000.tar", files)
    content = bytearray(path.read_bytes())
    content[2 * 1536 + 5] ^= 1
    path.write_bytes(content)
    listing = list_tar(path)
    assert [member.name for member in listing.members] == ["0.jpg", "1.jpg"]
    assert listing.damage == "header at byte 3072: wrong checksum or size"


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_no_broken_byte_breaks_the_reader(tmp_path_factory, data):
    files = {"1.jpg": b"x" * 10, f"{LONG_FOLDER}/2.jpg": b"y" * 600, "3.jpg": b"z"}
    path = write_tar(tmp_path_factory.mktemp("tar") / "data-0000.tar", files, tarfile.PAX_FORMAT)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, 6000))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    for name, found in read_all(path).items():
        assert len(found) <= len(content), name


def test_random_noise_ends(tmp_path):
    path = tmp_path / "data-0000.tar"
    path.write_bytes(os.urandom(1 << 20))
    listing = list_tar(path)
    assert listing.members == [] and listing.damage
    with pytest.raises(TarUnreadable, match=r"data-0001\.tar"):
        list_tar(tmp_path / "data-0001.tar")


def test_the_index_saves_the_headers(tmp_path):
    files = {f"{number}.jpg": bytes([number]) * 600 for number in range(4)}
    path = write_tar(tmp_path / "data-0000.tar", files)
    write_index(path)
    assert list_tar(path).from_index
    assert read_all(path) == files


@pytest.mark.parametrize(
    "changes",
    [
        {"filesize": 1},
        {"files": {"0.jpg": {"offset": 512, "size": -1}}},
        {"files": {"0.jpg": {"offset": 512, "size": 10**9}}},
        {"files": {"0.jpg": {"offset": 0, "size": 10}}},
        {"files": {"0.jpg": {"size": 10}}},
        {"files": ["0.jpg"]},
        {"files": {"0.jpg": {"offset": True, "size": "10"}}},
    ],
)
def test_an_index_that_does_not_fit_is_left_alone(tmp_path, changes):
    files = {f"{number}.jpg": bytes([number]) * 600 for number in range(4)}
    path = write_tar(tmp_path / "data-0000.tar", files)
    write_index(path, **changes)
    assert not list_tar(path).from_index
    assert read_all(path) == files


def test_an_index_that_points_elsewhere_is_found_out(tmp_path):
    files = {f"{number}.jpg": bytes([number]) * 600 for number in range(4)}
    path = write_tar(tmp_path / "data-0000.tar", files)
    swapped = {"0.jpg": {"offset": 1536 + 512, "size": 600}, "1.jpg": {"offset": 512, "size": 600}}
    write_index(path, files=swapped)
    assert read_all(path) == files
    write_index(path, files={"0.jpg": {"offset": 700, "size": 100}})
    assert read_all(path) == files


@pytest.mark.parametrize("left_out", [[0], [1], [3], [0, 1, 2], [0, 1, 2, 3]])
def test_an_index_of_a_part_hides_nothing(tmp_path, left_out):
    files = {f"{number}.jpg": bytes([number]) * 600 for number in range(4)}
    path = write_tar(tmp_path / "data-0000.tar", files)
    listing = list_tar(path)
    whole = {
        member.name: {"offset": member.offset, "size": member.size_bytes, "sha256": member.name}
        for member in listing.members
    }
    kept = {name: place for number, (name, place) in enumerate(whole.items()) if number not in left_out}
    write_index(path, files=kept)
    assert read_all(path) == files
    assert {member.name: member.sha256 for member in list_tar(path).members} == {
        name: name if name in kept else "" for name in files
    }
    with path.open("r+b") as stream:
        stream.seek(int(str(whole["1.jpg"]["offset"])) - 512)
        stream.write(b"x" * 8)
    found = set(read_all(path))
    assert found == {"0.jpg", *(name for name in kept if name != "1.jpg")}


def test_the_index_is_read_only_where_it_is_a_file(tmp_path):
    files = {f"{number}.jpg": bytes([number]) * 600 for number in range(4)}
    path = write_tar(tmp_path / "data-0000.tar", files)
    index = path.with_suffix(".json")
    os.mkfifo(index)
    assert read_all(path) == files
    for target in ("/dev/zero", "/dev/full", "/proc/self/mem", str(tmp_path)):
        index.unlink()
        index.symlink_to(target)
        assert read_all(path) == files
    index.unlink()
    with index.open("wb") as stream:
        stream.truncate(1 << 40)
    assert read_all(path) == files
    os.mkfifo(tmp_path / "data-0001.tar")
    with pytest.raises(TarUnreadable, match="not a regular file"):
        list_tar(tmp_path / "data-0001.tar")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "is a Git LFS pointer"),
        (b"\n <!DOCTYPE html><html><body>404</body></html>", "is a web page"),
        (b"<HTML><title>Sign in</title>", "is a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is an XML text"),
        (b'{"error": "Repository not found"}', "is a JSON text"),
        (gzip.compress(bytes(9000), mtime=0), "compressed with gzip"),
        (lzma.compress(bytes(9000)), "compressed with xz"),
        (bz2.compress(bytes(9000)), "compressed with bzip2"),
        (b"PK\x03\x04" + bytes(900), "is a zip archive"),
    ],
)
def test_what_only_has_the_name_of_a_tar_is_named(tmp_path, content, words):
    path = tmp_path / "data-0000.tar"
    path.write_bytes(content)
    with pytest.raises(TarUnreadable, match=words):
        list_tar(path)


def test_a_member_may_be_called_like_a_disguise(tmp_path):
    files = {'{"1.jpg': b"1", "<html>/2.jpg": b"2"}
    assert read_all(write_tar(tmp_path / "data-0000.tar", files)) == files


def test_listing_opens_nothing_heavy():
    program = (
        "import sys, kohaku_wrap.dataset.images.extract_shard; print('pyarrow' in sys.modules, 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False False\n"
