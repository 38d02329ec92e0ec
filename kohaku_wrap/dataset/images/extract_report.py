"""What became of a selection's images: counts, lists with reasons, and extract-report.json."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kohaku_wrap.dataset.images.extract_shard import ShardResult
from kohaku_wrap.dataset.images.extracted import REPORT_FILE
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import atomic_write

COUNTED = ("selected", "written", "kept", "reduced", "rewritten", "not_looked_at", "other_size")
"""Numbers of the report, in its order."""


class ImagesMissing(KwrapError):
    """More images are missing or corrupt than was allowed."""


@dataclass
class ExtractReport(ShardResult):
    """What became of a selection's images; every selected post is written, kept, missing or corrupt."""

    images: Path = field(kw_only=True)
    """The folder that holds them."""

    selected: int = field(kw_only=True)
    """Posts of the selection."""

    not_looked_at: int = 0
    """Of the kept, pictures of a kwrap that did not know the rule of `appearance`; they stay as they are."""

    def sort(self) -> None:
        """Put all lists in the order of ids and names; those of tars without the repeats of several tasks."""
        self.missing.sort()
        self.corrupt.sort()
        self.refused = sorted(set(self.refused))
        self.damaged = sorted(set(self.damaged))

    def check(self, max_missing: int) -> None:
        """Raise ImagesMissing when more than `max_missing` images are missing or corrupt, or all of them."""
        lacking = len(self.missing) + len(self.corrupt)
        found = self.selected - lacking
        if lacking <= max_missing and found:
            return
        first = min([*self.missing[:1], *self.corrupt[:1]])
        what = f"{lacking:,} images missing or corrupt among" if found else "no image of"
        allow = f", or allow it with --max-missing {lacking}" if found else ""
        raise ImagesMissing(
            f"{what} {self.selected:,} selected posts: {len(self.missing):,} missing, {len(self.corrupt):,} corrupt;"
            f" the first is {first[0]}: {first[1]}",
            f"{self.images / REPORT_FILE} lists them all. Fetch them and run the same command again{allow}.",
        )


def write_report(report: ExtractReport, selection: Path, tars: Path, max_pixels: int) -> None:
    """Write all lists of the report, one entry a line, as extract-report.json."""
    counts: dict[str, Any] = {
        "selection": str(selection),
        "tars": str(tars),
        "max_pixels": max_pixels,
    }
    counts |= {name: getattr(report, name) for name in COUNTED}
    lists: dict[str, Iterable[dict[str, Any]]] = {
        "missing": ({"id": post_id, "reason": reason} for post_id, reason in report.missing),
        "corrupt": ({"id": post_id, "reason": reason} for post_id, reason in report.corrupt),
        "refused": ({"tar": tar, "member": name, "reason": reason} for tar, name, reason in report.refused),
        "damaged": ({"tar": tar, "reason": reason} for tar, reason in report.damaged),
    }
    with atomic_write(report.images / REPORT_FILE) as stream:
        stream.write(json.dumps(counts, indent=2)[:-2])
        for name, entries in lists.items():
            stream.write(f',\n  "{name}": [')
            for index, entry in enumerate(entries):
                # Names of members may hold bytes that are no text; JSON escapes carry them.
                stream.write(("," if index else "") + "\n    " + json.dumps(entry))
            stream.write("\n  ]")
        stream.write("\n}\n")
