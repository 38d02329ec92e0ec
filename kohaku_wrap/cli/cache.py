"""`kwrap cache`: latents of all images, encoded once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kohaku_wrap.cli.options import repeat_option, set_option
from kohaku_wrap.cli.output import (
    beyond_output,
    counting_bytes,
    json_option,
    print_answer,
    print_aside,
    print_note,
    progress_bar,
    wants_json,
)
from kohaku_wrap.cli.trust import trust_option
from kohaku_wrap.errors import command_line
from kohaku_wrap.wording import format_duration, show_bytes

if TYPE_CHECKING:
    from kohaku_wrap.training.supervising.caching import Cache


@click.command(
    epilog="""\b
Examples:
  kwrap cache mine.toml --site site.toml --dry-run
  kwrap cache mine.toml --site site.toml
  kwrap cache mine.toml --site site.toml --check"""
)
@click.argument("template")
@click.option("--site", "site_file", type=click.Path(path_type=Path), default=Path("site.toml"), show_default=True,
              help="What is true of this machine.")  # fmt: skip
@set_option
@trust_option
@click.option("--check", is_flag=True, help="Read every shard in full; one that is damaged is made again.")
@click.option("--dry-run", is_flag=True, help="Say what it takes of disk and time; make nothing.")
@json_option
@beyond_output("dry_run")
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
    added. A shard that is damaged is named and made again.
    """
    from kohaku_wrap.config.layers import resolve_template
    from kohaku_wrap.config.site import load_site
    from kohaku_wrap.files import keeps_sha256
    from kohaku_wrap.training.supervising.caching import find_damaged, make_latents, open_cache, require_room

    site = load_site(site_file)
    effective = resolve_template(template, site, overrides, trust=trust)
    model = site.paths.vae or site.paths.base_model
    unread = model.stat().st_size if model.is_file() and not keeps_sha256(model) else 0
    with counting_bytes("hashing the VAE", unread) as count:
        cache = open_cache(effective, site, count)
    damaged = []
    with progress_bar("checking", "shards") as report:
        for shape, fault in find_damaged(cache, check, report, remove=not dry_run):
            damaged.append(shape.name)
            print_aside(f"damaged: {shape.file_in(cache.folder)}: {fault}; it is made again")
    free = require_room(cache)
    payload = describe(cache, damaged, free)
    if not dry_run:
        with progress_bar("encoding", "images") as report:
            payload["images_encoded"] = make_latents(cache, report)
        payload["nan_images"] = cache.list_nan_images()
    print_answer("cache", payload, f"Latents of {effective.name}", show(payload, dry_run))
    if not dry_run and not wants_json():
        for image in payload["nan_images"]:
            print_note(f"warning: image {image}: the VAE gave numbers that are none; zeros are trained for it")
        again = repeat_option("--set", overrides)
        click.echo(f"Next: {command_line('train', template, '--site', site_file, *again)}")


def describe(cache: Cache, damaged: list[str], free: int) -> dict[str, Any]:
    """What is there and what is to be made."""
    unmade = cache.list_unmade()
    images, rate = sum(shape.count for shape in unmade), cache.measure_rate()
    return {
        "folder": cache.folder,
        "fingerprint": cache.rule.fingerprint,
        "keep": cache.rule.keep,
        "precision": cache.rule.precision,
        "variants": cache.rule.variants,
        "images": len(cache.wanted.ids),
        "shards": len(cache.shards),
        "shards_made": len(cache.shards) - len(unmade),
        "images_to_encode": images,
        "damaged": damaged,
        "bytes_total": sum(shape.size_bytes for shape in cache.shards),
        "bytes_to_write": sum(shape.size_bytes for shape in unmade),
        "bytes_free": free,
        "images_per_second": rate,
        "seconds": images / rate / max(cache.site.machine.processes_here, 1) if rate else None,
    }


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
        rows.append(("time", "unknown until the first shard is made"))
        if payload["seconds"] is not None:
            rate = f"{payload['images_per_second']:.3g} images a second and process"
            rows[-1] = ("time", f"{format_duration(payload['seconds'])} at {rate}")
    return rows
