"""States: whole or not there, verified to the byte, rotated without losing the last good one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from kohaku_wrap.files import remove_folder
from kohaku_wrap.training.records.manifest import (
    FORMAT,
    DamagedState,
    Fingerprint,
    digest_of_state,
    document_digest,
    read_manifest,
)
from kohaku_wrap.training.records.states import (
    DiskFull,
    check_space,
    check_state_sizes,
    digest_or_none,
    is_disk_full,
    is_state_there,
    list_states,
    remove_old_states,
    state_folder,
    verify_state,
    write_state,
)

MADE_WITH = Fingerprint("builtin", "kwrap", 1, 4, 1, 4, 2, 9, 18, "d1g357", "", 0, 8, 8)


def fill(folder: Path) -> None:
    (folder / "network.bin").write_bytes(b"n" * 3000)
    (folder / "inner").mkdir()
    (folder / "inner" / "optimizer.bin").write_bytes(b"o" * 5000)


def write(states: Path, step: int, scheduled: bool = True) -> Path:
    return write_state(states, step, fill, MADE_WITH, attempt=3, scheduled=scheduled, extra={"losses": [1, 2]})


def test_a_state_is_sealed(tmp_path: Path) -> None:
    state = write(tmp_path, 13600)
    assert state == tmp_path / "optimizer-step-00013600" == state_folder(tmp_path, 13600)
    manifest = verify_state(state)
    assert manifest == read_manifest(state) == check_state_sizes(state)
    assert (manifest.optimizer_step, manifest.attempt, manifest.fingerprint) == (13600, 3, MADE_WITH)
    assert set(manifest.files) == {"network.bin", "inner/optimizer.bin"} and manifest.size_bytes == 8000
    assert manifest.extra == {"losses": [1, 2]}
    assert [path.name for path in tmp_path.iterdir()] == ["optimizer-step-00013600"]


def test_a_state_that_says_nothing_of_itself_was_scheduled(tmp_path: Path) -> None:
    def fill_over(folder: Path) -> None:
        fill(folder)
        (folder / "manifest.json").write_text("of a copied state")

    manifest = verify_state(write_state(tmp_path, 2, fill_over, MADE_WITH))
    assert (manifest.attempt, manifest.scheduled, manifest.extra) == (0, True, {})
    assert set(manifest.files) == {"network.bin", "inner/optimizer.bin"}, "its own manifest seals the others"


def test_all_of_a_state_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def note(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write(tmp_path, 2)
    part = tmp_path / ".optimizer-step-00000002.partial"
    inner = {
        part / "network.bin",
        part / "inner/optimizer.bin",
        part / f".manifest.json.{os.getpid()}.part",
        part / "inner",
        part,
    }
    assert set(synced) == {str(path) for path in (*inner, tmp_path)}
    assert synced[-1] == str(tmp_path), "the name itself is durable too"


def test_what_cannot_be_removed_stays_under_a_hidden_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def fail(folder: Path) -> None:
        fill(folder)
        raise ValueError("in the middle")

    state = write(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        remove_folder(state)
        assert [path.name for path in tmp_path.iterdir()] == [".optimizer-step-00000002.removed"]
        assert list_states(tmp_path) == []
        with pytest.raises(ValueError, match="in the middle"):
            write_state(tmp_path, 4, fail, MADE_WITH)
    write(tmp_path, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["optimizer-step-00000006"]


@pytest.mark.parametrize("name", ["network.bin", "inner/optimizer.bin", "manifest.json"])
def test_any_flipped_byte_is_named(tmp_path: Path, name: str) -> None:
    state = write(tmp_path, 2)
    data = bytearray((state / name).read_bytes())
    for at in range(0, len(data), 97):
        flipped = bytes(data[:at]) + bytes([data[at] ^ 1]) + bytes(data[at + 1 :])
        (state / name).write_bytes(flipped)
        with pytest.raises(DamagedState, match=name):
            verify_state(state)


@pytest.mark.parametrize("name", ["network.bin", "manifest.json"])
def test_a_missing_or_cut_file_is_named(tmp_path: Path, name: str) -> None:
    state = write(tmp_path, 2)
    os.truncate(state / name, 20)
    with pytest.raises(DamagedState, match=name):
        check_state_sizes(state)
    (state / name).unlink()
    with pytest.raises(DamagedState, match=f"{name} is missing"):
        check_state_sizes(state)
    (state / name).mkdir()
    with pytest.raises(DamagedState, match=name):
        check_state_sizes(state)


def test_a_file_that_grew_or_cannot_be_read_is_damaged(tmp_path: Path) -> None:
    state = write(tmp_path, 2)
    with (state / "network.bin").open("ab") as stream:
        stream.write(b"n")
    with pytest.raises(DamagedState, match=r"network\.bin is damaged \(3,001 bytes instead of 3,000\)"):
        check_state_sizes(state)
    assert digest_or_none(state / "none", None) is None


def test_a_failure_while_filling_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        write_state(tmp_path, 2, fail, MADE_WITH)
    assert not list(tmp_path.iterdir())


def test_a_whole_state_is_kept_and_a_damaged_one_replaced(tmp_path: Path) -> None:
    before = (write(tmp_path, 2) / "manifest.json").read_text()
    assert (write(tmp_path, 2) / "manifest.json").read_text() == before
    (state_folder(tmp_path, 2) / "network.bin").write_bytes(b"x" * 3000)
    verify_state(write(tmp_path, 2))
    write_state(tmp_path, 2, fill, replace(MADE_WITH, seed=2))
    assert verify_state(state_folder(tmp_path, 2)).fingerprint.seed == 2


def test_room_is_checked_before_writing(tmp_path: Path) -> None:
    def never(folder: Path) -> None:
        pytest.fail("nothing should be written")

    with pytest.raises(DiskFull, match=r"no state can be written: .* free, a state needs [\d.,]+ .B\n") as full:
        write_state(tmp_path, 2, never, MADE_WITH, expected_bytes=1 << 60)
    assert "nothing is half-written" in full.value.next_step


def test_a_disk_that_fills_up_is_told_as_such(tmp_path: Path) -> None:
    def fill_up(folder: Path) -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        except OSError as error:
            raise RuntimeError("basic_ios::clear: iostream error") from error

    with pytest.raises(DiskFull, match=r"no state can be written \(optimizer step 2\): [^,]* free\n"):
        write_state(tmp_path, 2, fill_up, MADE_WITH)
    assert not list(tmp_path.iterdir())
    assert is_disk_full(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"))
    assert not is_disk_full(ValueError("no"))


def steps(states: Path) -> list[int]:
    return [step for step, _ in list_states(states)]


def test_retention_keeps_the_newest_and_milestones(tmp_path: Path) -> None:
    for step in range(1, 15):
        write(tmp_path, step)
        remove_old_states(tmp_path, keep=3, every=5)
    assert steps(tmp_path) == [5, 10, 12, 13, 14]
    assert remove_old_states(tmp_path, keep=1) == [5, 10, 12, 13]
    assert remove_old_states(tmp_path, keep=0) == [] and steps(tmp_path) == [14]


def test_a_state_of_a_stop_goes_when_a_scheduled_one_follows(tmp_path: Path) -> None:
    for step, scheduled in ((4, True), (8, True), (9, False)):
        write(tmp_path, step, scheduled)
        remove_old_states(tmp_path, keep=2)
    assert steps(tmp_path) == [4, 8, 9]
    write(tmp_path, 12)
    remove_old_states(tmp_path, keep=2)
    assert steps(tmp_path) == [8, 12]


def test_no_milestones_unless_asked_for(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        write(tmp_path, step)
    assert remove_old_states(tmp_path, keep=2, every=4) == [2] and steps(tmp_path) == [4, 6, 8]
    assert remove_old_states(tmp_path, keep=2) == [4]
    assert remove_old_states(tmp_path, keep=-5) == [6] and steps(tmp_path) == [8]


def test_states_of_stops_go_in_the_order_of_steps(tmp_path: Path) -> None:
    """Only those after the newest scheduled one stay; what went is told in ascending order."""
    for step, scheduled in ((256, True), (257, False), (300, True), (1000, True), (1001, False), (1300, False)):
        write(tmp_path, step, scheduled)
    assert remove_old_states(tmp_path, keep=1) == [256, 257, 300]
    assert steps(tmp_path) == [1000, 1001, 1300]


def test_a_run_that_was_only_stopped_keeps_all_its_states(tmp_path: Path) -> None:
    for step in (3, 5):
        write(tmp_path, step, False)
    assert remove_old_states(tmp_path, keep=1) == [] and steps(tmp_path) == [3, 5]
    assert remove_old_states(tmp_path / "none", keep=1) == []


def test_a_state_without_a_readable_manifest_is_left_alone(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        write(tmp_path, step)
    (state_folder(tmp_path, 4) / "manifest.json").write_text("{")
    assert remove_old_states(tmp_path, keep=1) == [2, 6]
    assert steps(tmp_path) == [4, 8]


def test_the_newest_of_the_old_stays_where_all_kept_are_damaged(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        write(tmp_path, step)
    for step in (6, 8):
        os.truncate(state_folder(tmp_path, step) / "network.bin", 5)
    assert remove_old_states(tmp_path, keep=2) == [2] and steps(tmp_path) == [4, 6, 8]
    # Where one of them is whole, none of the old is needed.
    write(tmp_path, 8)
    assert remove_old_states(tmp_path, keep=2) == [4]


def test_whether_a_state_is_there(tmp_path: Path) -> None:
    state = write(tmp_path, 2)
    assert is_state_there(state) is True
    os.truncate(state / "network.bin", 5)
    assert is_state_there(state) is False and is_state_there(tmp_path / "none") is False


def test_the_last_good_state_is_never_removed(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        write(tmp_path, step)
    for step in (4, 6):
        os.truncate(state_folder(tmp_path, step) / "network.bin", 5)
    assert remove_old_states(tmp_path, keep=2) == []
    assert verify_state(state_folder(tmp_path, 2)).optimizer_step == 2


def rewrite_manifest(state: Path, **changes: object) -> None:
    """Another manifest with a digest that fits it; an entry that becomes None is left out."""
    path = state / "manifest.json"
    body = json.loads(path.read_text()) | changes
    body = {name: value for name, value in body.items() if name != "digest" and value is not None}
    path.write_text(json.dumps({**body, "digest": document_digest(body)}))


def test_a_manifest_that_this_kwrap_does_not_read(tmp_path: Path) -> None:
    state = write(tmp_path, 2)
    good = (state / "manifest.json").read_text()
    rewrite_manifest(state)
    assert read_manifest(state).optimizer_step == 2
    for changes, words in (
        ({"format": FORMAT + 1}, f"has format {FORMAT + 1}; this kwrap reads 1 to {FORMAT}"),
        ({"format": 0}, "has format 0"),
        ({"fingerprint": {}}, "is not as this kwrap writes it"),
        ({"fingerprint": {**json.loads(good)["fingerprint"], "more": 1}}, "is not as this kwrap writes it"),
        ({"files": [1]}, "is not as this kwrap writes it"),
        ({"extra": None}, "is not as this kwrap writes it"),
    ):
        (state / "manifest.json").write_text(good)
        rewrite_manifest(state, **changes)
        with pytest.raises(DamagedState, match=words) as damaged:
            read_manifest(state)
        assert damaged.value.state == state and "kwrap resume" in damaged.value.next_step
    for text in ("[]", "{", '{"a": 1}', "7", "\udcff", "[" * 100_000):
        (state / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(DamagedState, match=r"manifest\.json is damaged"):
            read_manifest(state)
    for digest in ("0" * 64, "f" * 64):
        (state / "manifest.json").write_text(json.dumps(json.loads(good) | {"digest": digest}))
        with pytest.raises(DamagedState, match="does not match its digest"):
            read_manifest(state)


def test_a_manifest_of_kwrap_0_1_is_read(tmp_path: Path) -> None:
    state = write(tmp_path, 2)
    fingerprint = json.loads((state / "manifest.json").read_text())["fingerprint"]
    old = {name: value for name, value in fingerprint.items() if name not in ("run_id", "options_digest")}
    rewrite_manifest(state, format=1, fingerprint=old)
    found = read_manifest(state).fingerprint
    assert (found.run_id, found.options_digest, found.seed) == ("", "", MADE_WITH.seed)


def test_seals_do_not_change(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, 2))
    for value, name in (
        (manifest, "attempt"),
        (manifest.fingerprint, "seed"),
        (manifest.files["network.bin"], "sha256"),
    ):
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, 1)


def test_only_states_are_listed(tmp_path: Path) -> None:
    assert list_states(tmp_path / "none") == []
    for step in (10, 2):
        write(tmp_path, step)
    (tmp_path / "optimizer-step-00000003").write_text("a file")
    (tmp_path / "optimizer-step-00000004.old").mkdir()
    (tmp_path / ".optimizer-step-00000005.partial").mkdir()
    assert steps(tmp_path) == [2, 10]


def test_a_state_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    moved = write(tmp_path, 1300)
    for other in (1299, 1301):
        moved = moved.rename(state_folder(tmp_path, other))
        with pytest.raises(DamagedState, match="the state of optimizer step 1,300 under another name"):
            check_state_sizes(moved)
    assert check_state_sizes(moved.rename(tmp_path / "a copy")).optimizer_step == 1300


def test_what_crashes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".optimizer-step-00000001.partial", ".optimizer-step-00000001.removed", ".optimizer-step-1.kept"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    write(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".optimizer-step-1.kept", "optimizer-step-00000002"]
    for folder in (".optimizer-step-00000002.removed", ".optimizer-step-00000002.partial"):
        (tmp_path / folder).mkdir()
    remove_folder(state_folder(tmp_path, 2))
    assert not state_folder(tmp_path, 2).exists() and not (tmp_path / ".optimizer-step-00000002.removed").exists()


def test_room_for_the_largest_state_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8,000 bytes lie there; 5 % and a MiB more must be free."""
    (write(tmp_path, 2) / "manifest.json").write_text("{")
    write(tmp_path, 4)
    free = SimpleNamespace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    check_space(tmp_path / "empty")
    assert write_state(tmp_path / "empty", 1, fill, MADE_WITH).is_dir(), "how large it will be is not known"
    for size_bytes, expected in ((8000, 0), (8000, 7000), (9000, 9000)):
        free.free = int(size_bytes * 1.05) + (1 << 20)
        check_space(tmp_path, expected)
        free.free -= 1
        with pytest.raises(DiskFull):
            check_space(tmp_path, expected)


def test_full_disks_are_known_by_number_text_or_cause() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT):
        assert is_disk_full(OSError(number, "no")) is True
    assert is_disk_full(OSError(errno.EACCES, "no")) is False and is_disk_full(None) is False
    assert is_disk_full(RuntimeError("write: No space left on device")) and is_disk_full(DiskFull("a", "b"))
    outer = ValueError("outer")
    outer.__context__ = OSError(errno.ENOSPC, "no")
    assert is_disk_full(outer) is True
    outer.__cause__ = ValueError("other")
    assert is_disk_full(outer) is False
    assert is_disk_full(KeyboardInterrupt("No space left on device")) is False


def test_the_digest_of_a_manifest_is_pinned() -> None:
    """Of the sorted names without a space, so that states of other versions stay readable."""
    known = hashlib.sha256(b'{"a":1,"b":"\\u00e9"}').hexdigest()
    assert document_digest({"a": 1, "b": "é"}) == document_digest({"b": "é", "a": 1}) == known


def test_the_digest_of_a_state_is_that_of_its_manifest(tmp_path: Path) -> None:
    state = write(tmp_path, 1)
    document = json.loads((state / "manifest.json").read_text())
    assert digest_of_state(state) == document["digest"]
    (state / "manifest.json").write_text(json.dumps({**document, "optimizer_step": 2}))
    with pytest.raises(DamagedState):
        digest_of_state(state)


def test_the_manifest_can_be_read_by_people(tmp_path: Path) -> None:
    state = write_state(tmp_path, 2, fill, MADE_WITH, extra={"of": "été"})
    text = (state / "manifest.json").read_text()
    assert text.startswith('{\n  "format": 2,\n') and text.endswith("}\n") and '"of": "été"' in text
    document = json.loads(text)
    assert document["format"] == 2 and document["fingerprint"]["position"] == 8
    assert document["files"]["network.bin"]["size_bytes"] == 3000
