"""What a template caches, opened and shown: what `cache` and `plan` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kohaku_wrap.cli.output import counting_bytes
from kohaku_wrap.wording import format_duration

if TYPE_CHECKING:
    from kohaku_wrap.config.effective import Effective
    from kohaku_wrap.config.site import Site
    from kohaku_wrap.training.data.latent_shards import ShardShape
    from kohaku_wrap.training.starting.caching import Cache


def open_caches_with_bar(effective: Effective, site: Site, all_files: bool = True) -> list[Cache]:
    """What a template caches, with a bar while models are hashed. Raises what `open_caches` does."""
    from kohaku_wrap.file_hashes import count_unhashed
    from kohaku_wrap.training.starting.caching import open_caches

    models = {site.paths.vae or site.paths.base_model} if effective.get("cache.latents") else set()
    models |= {site.paths.base_model} if effective.get("cache.text_encoders") else set()
    with counting_bytes("hashing the models", count_unhashed(models)) as count:
        return open_caches(effective, site, count, all_files)


def describe_cache(cache: Cache, damaged: Sequence[ShardShape]) -> dict[str, Any]:
    """What is there and what is to be made."""
    unmade = {shape.name: shape for shape in (*cache.list_unmade(), *damaged)}.values()
    images, rate = sum(shape.count for shape in unmade), cache.measure_rate()
    return {
        "folder": cache.folder,
        "fingerprint": cache.rule.fingerprint,
        "keep": cache.kept,
        "precision": cache.rule.precision,
        "variants": cache.rule.variants,
        "images": len(cache.wanted.ids),
        "shards": len(cache.shards),
        "shards_made": len(cache.shards) - len(unmade),
        "images_to_encode": images,
        "damaged": [shape.name for shape in damaged],
        "bytes_total": sum(shape.size_bytes for shape in cache.shards),
        "bytes_to_write": sum(shape.size_bytes for shape in unmade),
        "images_per_second": rate,
        "seconds": images / rate / max(cache.site.machine.processes_here, 1) if rate else None,
    }


def show_time(payload: dict[str, Any]) -> str:
    """How long the rest takes."""
    if payload["seconds"] is None:
        return "unknown until the first shard is made"
    return f"{format_duration(payload['seconds'])} at {payload['images_per_second']:.3g} images a second and process"
