"""Free memory of this host within its control groups, and of its NVIDIA GPUs by way of nvidia-smi.

Control groups: https://docs.kernel.org/admin-guide/cgroup-v2.html and /cgroup-v1/memory.html. A group's file cache
that was not used lately counts as free, as it does in the system's own "available".
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from transport.timeouts import NVIDIA_SMI_S

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


_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    uuid: str
    free_bytes: int


def list_gpus() -> list[Gpu]:
    """The GPUs that nvidia-smi lists; none where it is missing, fails or hangs."""
    command = ["nvidia-smi", "--query-gpu=uuid,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=NVIDIA_SMI_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(done.stdout)


def parse_gpus(text: str) -> list[Gpu]:
    """Lines of "GPU-uuid, MiB free"; lines of another form (a GPU in error) are skipped."""
    found = []
    for line in text.splitlines():
        uuid, _, free = (part.strip() for part in line.partition(","))
        if free.isdigit():
            found.append(Gpu(uuid=uuid, free_bytes=int(free) * _MIB))
    return found


def num_visible_gpus() -> int:
    """How many GPUs a CUDA process of this user would be shown. Which of them torch can use, only a probe says."""
    num_listed = len(list_gpus())
    if num_listed == 0 and any(Path("/dev").glob("nvidia[0-9]*")):
        num_listed = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return num_listed
    return min(num_listed, len([part for part in visible.split(",") if part.strip() not in ("", "-1")]))
