"""The image tars of the embedded world, named and filled as danbooru2023's, half of them with an index."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kohaku_wrap.demo.posts import SHARDS


def write_shards(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write `<id>.<ext>` files to `folder`/original/data-0NNN.tar by id; the tars' paths, ascending."""
    by_shard: dict[int, list[str]] = {}
    for name in sorted(files, key=id_in_name):
        by_shard.setdefault(id_in_name(name) % SHARDS, []).append(name)
    (folder / "original").mkdir(parents=True)
    tars = []
    for index, shard in enumerate(sorted(by_shard)):
        path = folder / "original" / f"data-{shard:04}.tar"
        write_tar(path, {name: files[name] for name in by_shard[shard]})
        tars.append(path)
        if index % 2 == 0:
            path.with_suffix(".json").write_text(json.dumps(describe_tar(path)), encoding="utf-8")
    return tars


def id_in_name(name: str) -> int:
    """The post id of a member name."""
    return int(name.split(".")[0])


def write_tar(path: Path, files: Mapping[str, bytes]) -> None:
    """Write one tar with the members in the order of `files`, the same bytes whenever it is made."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def describe_tar(path: Path) -> dict[str, Any]:
    """The index that hfutils writes beside a tar: size, git and LFS hashes, and where each member lies."""
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        files = {
            member.name: {
                "offset": member.offset_data,
                "size": member.size,
                "sha256": hashlib.sha256(content[member.offset_data : member.offset_data + member.size]).hexdigest(),
            }
            for member in archive
        }
    git_blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False)
    return {
        "filesize": len(content),
        "hash": git_blob.hexdigest(),
        "hash_lfs": hashlib.sha256(content).hexdigest(),
        "files": files,
    }
