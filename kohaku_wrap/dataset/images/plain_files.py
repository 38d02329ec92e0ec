"""Images that lie in a folder under their post's id, read as members of a tar are."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from kohaku_wrap.dataset.images.tar_layouts import read_id
from kohaku_wrap.dataset.images.tars import Member
from kohaku_wrap.files import open_regular


class PlainFiles:
    """Files of some posts, in the place of an open tar."""

    def __init__(self, files: tuple[Path, ...], wanted: Collection[int]) -> None:
        self.path = files[0].parent
        self.members = [
            Member(str(path), 0, path.stat().st_size if path.exists() else 0)
            for path in files
            if (named := read_id(path.name)) is not None and named[0] in wanted
        ]

    def read(self, member: Member) -> bytes:
        """The file's bytes. Raises OSError."""
        with open_regular(Path(member.name)) as stream:
            return bytes(stream.read())
