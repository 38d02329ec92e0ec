"""Whether what a branch would measure was trained by the runs that it comes from."""

from __future__ import annotations

import numpy as np

from kohaku_wrap.errors import UsageError
from kohaku_wrap.formats.caption_rows import NoImages, open_captions
from kohaku_wrap.formats.held_out import HeldOut
from kohaku_wrap.training.records.ancestry import find_origin
from kohaku_wrap.training.records.folder import Run


class AlreadyTrained(UsageError):
    """Posts that a branch would hold out are trained by the run that it begins from."""


def refuse_trained(parent: Run, held_out: HeldOut | None) -> list[str]:
    """Raise AlreadyTrained where a branch would measure posts that its parent, or a run before that, may have trained.

    Returns what is to be said: posts trained that are the like of held-out ones, and ancestors that are not at hand.
    """
    notes: list[str] = []
    looked_at = set[str]()
    run: Run | None = parent if held_out else None
    while run is not None and held_out is not None and run.lock.run_id not in looked_at:
        lock = run.lock
        looked_at.add(lock.run_id)
        try:
            ids = open_captions(run.find_images(), lock.dataset_digest).read_all()["id"].to_numpy()
        except NoImages:
            if run is parent:
                raise
            return [*notes, f"[validation]: what run {run.name} trained before is not known: its captions are gone"]
        trained = np.setdiff1d(ids, lock.held_out.left_out) if lock.held_out else ids
        posts = np.intersect1d(held_out.posts, trained)
        if len(posts):
            kept = len(lock.held_out.posts) if lock.held_out else 0
            same = f"Hold out what it does, on its dataset: --set validation.posts={kept}; or" if kept else "Hold out"
            raise AlreadyTrained(
                f"{len(posts):,} of the {len(held_out.posts):,} posts that would be held out are trained by run "
                f"{run.name}, the first is {posts[0]}: their loss would say how well they are remembered",
                f"{same} none: --set validation.posts=0",
            )
        if count := len(np.intersect1d(held_out.relatives, trained)):
            notes.append(f"[validation]: run {run.name} trained {count:,} posts that are the like of held-out ones")
        origin = lock.origin
        earlier = find_origin(run) if origin else None
        if origin and not earlier:
            notes.append(f"[validation]: what run {origin.run} trained before is not known: it is not at hand")
        run = earlier[0] if earlier else None
    return notes
