"""Real image files of coloured shapes, in every format and mode that a loader must read, and tars of them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from kohaku_wrap.demo.posts import SHARDS, DemoPost, Rolls

GIF_FRAMES = 3


def draw_picture(post: DemoPost, seed: int, frame: int = 0) -> Image.Image:
    """A gradient under some shapes; `frame` moves them."""
    rolls = Rolls(seed, "picture", post.id)
    width, height = post.picture_size
    corners = [np.array([rolls.below(256) for _ in range(3)], dtype=np.int64) for _ in range(2)]
    across = np.arange(width)[None, :, None] * 256 // width
    down = np.arange(height)[:, None, None] * 256 // height
    weight = (across + down) // 2
    pixels = ((corners[0] * (256 - weight) + corners[1] * weight) // 256).astype(np.uint8)
    image = Image.fromarray(pixels)
    pen = ImageDraw.Draw(image)
    for index in range(rolls.between(3, 8)):
        x, y = rolls.below(width) + 5 * frame, rolls.below(height)
        w, h = rolls.between(8, max(width // 2, 9)), rolls.between(8, max(height // 2, 9))
        colour = (rolls.below(256), rolls.below(256), rolls.below(256))
        draw = pen.ellipse if index % 2 else pen.rectangle
        draw((x - w // 2, y - h // 2, x + w // 2, y + h // 2), fill=colour)
    return image


def encode_file(post: DemoPost, seed: int) -> bytes:
    """The file that the tar holds for the post, in its own format."""
    stream = io.BytesIO()
    if post.file_ext == "zip":
        # The site's animations: numbered still frames in an archive.
        with zipfile.ZipFile(stream, "w") as archive:
            for frame in range(GIF_FRAMES):
                inside = io.BytesIO()
                draw_picture(post, seed, frame).save(inside, "JPEG", quality=80)
                archive.writestr(zipfile.ZipInfo(f"{frame:06}.jpg", (1980, 1, 1, 0, 0, 0)), inside.getvalue())
        return stream.getvalue()
    if post.file_ext == "gif":
        frames = [draw_picture(post, seed, frame).quantize(32) for frame in range(GIF_FRAMES)]
        frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:], duration=120)
        return stream.getvalue()
    image = draw_picture(post, seed)
    rolls = Rolls(seed, "mode", post.id)
    if post.file_ext == "png":
        if rolls.chance(20):
            image.putalpha(200)
        elif rolls.chance(20):
            image = image.quantize(64)
        image.save(stream, "PNG")
    elif post.file_ext == "webp":
        image.save(stream, "WEBP", quality=85)
    else:
        (image.convert("L") if rolls.chance(8) else image).save(stream, "JPEG", quality=88)
    return stream.getvalue()


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
