"""Whether the system killed processes here because memory ran out, and what a SIGKILL may come from."""

from __future__ import annotations

import re
from pathlib import Path

from kohaku_wrap.wording import count_of

ROOT = Path("/")
COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def count_memory_kills(root: Path | None = None) -> int | None:
    """How many processes of this control group, or of the machine, were killed for memory; None where nothing says."""
    for path in list_counters(root or ROOT):
        try:
            found = COUNT.search(path.read_text(encoding="utf-8"))
        except OSError:
            continue
        if found:
            return int(found[1])
    return None


def list_counters(root: Path) -> list[Path]:
    """Files of the kernel that may hold the count: the group's own (cgroup v2, v1), then the machine's."""
    tree, paths = root / "sys/fs/cgroup", []
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        controllers, _, group = line.partition(":")[2].partition(":")
        # Within a container the group's own folder may be the root of what is seen.
        for below in (group.lstrip("/"), ""):
            if not controllers:
                paths.append(tree / below / "memory.events")
            elif "memory" in controllers.split(","):
                paths.append(tree / "memory" / below / "memory.oom_control")
    return [*paths, root / "proc/vmstat"]


def describe_sigkill(since: int | None) -> str:
    """Who may have sent it; `since`: the count before the process was started, None where none is known."""
    now = count_memory_kills()
    if since is not None and now is not None and now > since:
        return f"as memory ran out (the system counted {count_of(now - since, 'such kill')})"
    return "by a person or a program (kill -9), or by the system as memory ran out (see dmesg)"
