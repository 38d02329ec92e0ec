"""Listing a 7,000-member tar: kwrap, which checks names and places, against tarfile alone.

Run: python benchmarks/bench_tars.py. Prints each figure beside its bar; exit 1 when one is missed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kohaku_wrap.dataset.images.tars import list_tar

MEMBERS = 7000
MEMBER_BYTES = 20_000
ROUNDS = 9
BAR = 2.0


def write_tar(path: Path, members: int, member_bytes: int) -> None:
    """Write a tar as the published ones: plain members named by id, here filled with noise."""
    content = os.urandom(member_bytes)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for index in range(members):
            member = tarfile.TarInfo(f"{index * 1000}.webp")
            member.size = member_bytes - index % 700
            archive.addfile(member, io.BytesIO(content[: member.size]))


def time_best(*functions: Callable[[], object]) -> list[float]:
    """The best CPU time of each in seconds, taken in turn: what else runs on the machine only ever adds."""
    best = [float("inf")] * len(functions)
    for _ in range(ROUNDS):
        for index, function in enumerate(functions):
            started = time.process_time()
            function()
            best[index] = min(best[index], time.process_time() - started)
    return best


def list_by_tarfile(path: Path) -> int:
    """What the standard library takes."""
    with tarfile.open(path) as archive:
        return len(archive.getmembers())


def main() -> int:
    """Measure and print; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "data-0000.tar")
        write_tar(path, MEMBERS, MEMBER_BYTES)
        assert len(list_tar(path).members) == list_by_tarfile(path) == MEMBERS
        headers, library = time_best(lambda: list_tar(path), lambda: list_by_tarfile(path))
        with tarfile.open(path) as archive:
            files = {member.name: {"offset": member.offset_data, "size": member.size} for member in archive}
        path.with_suffix(".json").write_text(json.dumps({"filesize": path.stat().st_size, "files": files}))
        (index,) = time_best(lambda: list_tar(path))
    ratio = headers / library
    figures = {
        "members": MEMBERS,
        "kwrap_headers_seconds": headers,
        "kwrap_index_seconds": index,
        "tarfile_seconds": library,
        "ratio_to_tarfile": ratio,
        "bar": BAR,
        "passed": ratio <= BAR,
    }
    if arguments.json:
        print(json.dumps(figures, indent=2))
    else:
        print(f"listing a tar of {MEMBERS:,} members, best of {ROUNDS}")
        print(f"  tarfile.getmembers    {1e3 * library:8.1f} ms")
        print(f"  kwrap, by index       {1e3 * index:8.1f} ms  {index / library:5.1f} x")
        verdict = "ok" if ratio <= BAR else "MISSED"
        print(f"  kwrap, by headers     {1e3 * headers:8.1f} ms  {ratio:5.1f} x  (bar: <= {BAR} x)  {verdict}")
    return 0 if ratio <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
