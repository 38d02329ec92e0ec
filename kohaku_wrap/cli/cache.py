"""`kwrap cache`: latents of all images, and outputs of text encoders, encoded once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kohaku_wrap.cli.caches_shown import describe_cache, open_caches_with_bar, show_time
from kohaku_wrap.cli.options import machine_option, retype, set_option, trust_option
from kohaku_wrap.cli.output import print_answer, print_aside, print_next, progress_bar, verb
from kohaku_wrap.errors import command_line
from kohaku_wrap.wording import show_bytes

if TYPE_CHECKING:
    pass


@verb(
    """
  kwrap cache mine.toml --site site.toml --dry-run
  kwrap cache mine.toml --site site.toml
  kwrap cache mine.toml --site site.toml --check
""",
    unless=("dry_run",),
)
@click.argument("template")
@machine_option
@set_option
@trust_option
@click.option("--check", is_flag=True, help="Read every shard in full; one that is damaged is made again.")
@click.option("--dry-run", is_flag=True, help="Say what it takes of disk and time; make nothing.")
def command(
    template: str,
    site_file: Path,
    overrides: tuple[str, ...],
    trust: tuple[str, ...],
    check: bool,
    dry_run: bool,
) -> None:
    """Encode the images of a template once, as cached latents.

    For a template with [cache] latents = true: shards of 1,000 images of one size, with checksums, beside the images or
    in the site's paths.latents. It can be stopped and started again, also several times at once; new images are
    added. A shard that is damaged is named and made again. With text_encoders = true the outputs of the text encoders
    are cached likewise, for captions that are the same each time.
    """
    from kohaku_wrap.config.layers import resolve_template
    from kohaku_wrap.config.site import load_site
    from kohaku_wrap.training.starting.caching import find_damaged, make_shards, require_images, require_room

    site = load_site(site_file)
    effective = resolve_template(template, site, overrides, trust=trust)
    caches = open_caches_with_bar(effective, site)
    payload = {}
    for cache in caches:
        damaged = []
        with progress_bar("checking", "shards") as report:
            for shape, fault in find_damaged(cache, check, report, remove=not dry_run):
                damaged.append(shape)
                print_aside(f"damaged: {shape.file_in(cache.folder)}: {fault}{'' if dry_run else '; it is made again'}")
        payload[cache.name] = describe_cache(cache, damaged)
    require_images(caches)
    free = require_room(caches)
    for cache in caches:
        about = payload[cache.name]
        about["bytes_free"] = free
        if not dry_run:
            with progress_bar("encoding", "images") as report:
                about["images_encoded"] = make_shards(cache, report)
            about["nan_images"] = cache.list_nan_images()
    is_left = dry_run and any(about["images_to_encode"] for about in payload.values())
    # Of the latents at the top, of the text encoders in a table of their own.
    document = payload.pop("latents", {}) | payload
    rows = [row for about in (document, *payload.values()) if "folder" in about for row in show(about, dry_run)]
    print_answer(document, f"Latents of {effective.name}", rows)
    for cache in caches:
        for image in cache.list_nan_images():
            print_aside(f"warning: image {image}: some of its {cache.rule.what} are not numbers")
    again = retype(of=("overrides", "trust"))
    print_next(command_line("cache" if is_left else "train", template, "--site", site_file, *again))


def show(payload: dict[str, Any], dry_run: bool) -> list[tuple[str, Any]]:
    """The rows of the table."""

    kept = f"{payload['keep']}, {payload['precision']}" + (", mirrored too" if payload["variants"] > 1 else "")
    rows = [
        ("folder", payload["folder"]),
        ("kept", kept),
        ("images", payload["images"]),
        ("shards", f"{payload['shards']:,}, of which {payload['shards_made']:,} were there"),
        ("to encode", payload["images_to_encode"]) if dry_run else ("encoded now", payload["images_encoded"]),
        ("disk", f"{show_bytes(payload['bytes_total'])}, of which {show_bytes(payload['bytes_to_write'])} "
                 f"{'to write' if dry_run else 'written now'}; {show_bytes(payload['bytes_free'])} were free"),
    ]  # fmt: skip
    if dry_run:
        rows.append(("time", show_time(payload)))
    return rows
