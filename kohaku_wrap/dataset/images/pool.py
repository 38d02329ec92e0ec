"""Images worked on in several processes: results as they come, and an interrupt or a failure that ends them all."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection as connections
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.processes import count_cores, safe_children

Task = TypeVar("Task")
Result = TypeVar("Result")

IMAGES_A_PROCESS = 400
"""Below this, another process takes longer to start than it saves."""

POLL_SECONDS = 0.25
TASKS_A_PROCESS = 3
"""That are handed out at a time."""


class WorkerDied(KwrapError):
    """A process that works on images was killed, most often for memory."""


def count_processes(jobs: int | None, images: int) -> int:
    """How many processes so many images are worth, at most `jobs`: by default one a core."""
    return min(jobs or count_cores(), -(-images // IMAGES_A_PROCESS))


def run_in_pool(
    work: Callable[[Task], Result],
    tasks: Iterable[Task],
    processes: int,
    ready: Callable[..., None],
    settings: tuple[Any, ...] = (),
    on_look: Callable[[], None] = lambda: None,
    stop: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """`work` of all tasks in any order, in processes that were readied by `ready(*settings)`.

    `on_look` is called a few times a second, `stop` before running tasks are waited for. Raises WorkerDied when a
    process is killed.
    """
    queue = iter(tasks)
    running: set[Future[Result]] = set()
    with safe_children(), ProcessPoolExecutor(processes, get_context("spawn"), ready, settings) as pool:
        try:
            while True:
                for task in islice(queue, TASKS_A_PROCESS * processes - len(running)):
                    running.add(pool.submit(work, task))
                if not running:
                    return
                ended, running = wait(running, POLL_SECONDS, FIRST_COMPLETED)
                on_look()
                for future in ended:
                    yield future.result()
        except BrokenProcessPool as error:
            raise WorkerDied(
                "a process that works on images was killed, most often for memory",
                "Run the same command again with fewer --jobs; what was done is kept.",
            ) from error
        finally:
            stop()
            for future in running:
                future.cancel()


def tie_to_parent() -> None:
    """Ready a process of a pool: no interrupts of its own, and an end with its parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
    """End this process when the one behind `sentinel` is gone: nobody would take its results."""
    connections.wait([sentinel])
    os._exit(1)
