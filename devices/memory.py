"""Free memory of this host as one process may use it: what the system has, within the limits of its control groups.

Control groups: https://docs.kernel.org/admin-guide/cgroup-v2.html and /cgroup-v1/memory.html. A group's file cache
that was not used lately counts as free, as it does in the system's own "available".
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

_PROC = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")


def host_free_bytes() -> int:
    """Bytes of RAM that a new process could take without pushing others out."""
    available = int(psutil.virtual_memory().available)
    limited = cgroup_free_bytes(_PROC, _ROOT)
    return available if limited is None else min(available, limited)


def cgroup_free_bytes(proc: Path, root: Path) -> int | None:
    """The least that any control group around this process has left; None without a limit (or off Linux)."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return None
    left = [free for line in lines for free in _group_free(line, root)]
    return min(left, default=None)


def _group_free(line: str, root: Path) -> Iterator[int]:
    """`line` of /proc/self/cgroup: id:controllers:path; v2 has id 0 and no controllers."""
    _, controllers, path = line.split(":", 2)
    if not controllers:
        names = ("memory.max", "memory.current", "inactive_file")
    elif "memory" in controllers.split(","):
        root, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    else:
        return
    group = root / path.lstrip("/")
    # Inside a container the path is often the host's, and the container's own group is mounted at the root.
    for folder in (group, *group.parents):
        if folder.is_relative_to(root) and (free := _folder_free(folder, *names)) is not None:
            yield free


def _folder_free(folder: Path, limit: str, used: str, reclaimable: str) -> int | None:
    try:
        limit_bytes = int((folder / limit).read_text())
        used_bytes = int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such file, or the word "max": no limit here
        return None
    return max(0, limit_bytes - used_bytes + int(stat.get(reclaimable, 0)))
