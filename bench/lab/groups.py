"""CPU and memory limits of a lab's host: its control groups, v1 or v2, whichever this machine has.

https://docs.kernel.org/admin-guide/cgroup-v2.html, /cgroup-v1/memory.html, /scheduler/sched-bwc.html
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.lab.spec import HostSpec, LabError

CGROUP_ROOT = Path("/sys/fs/cgroup")

# The system's default of 100 ms makes the times of short steps bimodal: a step either fits in a quota or waits for the
# next. A quota has at least 1 ms, so that hosts below a fifth of a core get longer periods.
_PERIOD_US = 5_000
_LEAST_QUOTA_US = 1_000
_EMPTY_WITHIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where groups are made: one folder a controller (v1), or one for all (v2)."""

    version: int
    folders: dict[str, Path]


def hierarchy(root: Path = CGROUP_ROOT) -> Hierarchy:
    """Raises LabError if this machine has none that can be written."""
    if (root / "cgroup.controllers").exists():
        found = Hierarchy(2, {"cpu": root, "memory": root, "cpuset": root})
    else:
        names = [name for name in ("cpu", "memory", "cpuset") if (root / name).is_dir()]
        found = Hierarchy(1, {name: root / name for name in names})
    if not {"cpu", "memory"} <= set(found.folders):
        raise LabError(f"no control groups for cpu and memory below {root}", hint="mount them, v1 or v2")
    for folder in found.folders.values():
        if not os.access(folder, os.W_OK):
            raise LabError(f"control groups at {folder} can't be written", hint="a privileged container is needed")
    return found


def make_groups(found: Hierarchy, lab: str, host: HostSpec) -> list[Path]:
    """The host's groups, with its limits; a process belongs to the host when its id is in `cgroup.procs` of all."""
    groups: list[Path] = []
    if found.version == 2:
        _delegate(found.folders["cpu"], host)
    for controller, folder in found.folders.items():
        if controller == "cpuset" and host.cpuset is None:
            continue
        group = folder / lab / host.name
        if group not in groups:
            group.parent.mkdir(exist_ok=True)
            if found.version == 2:
                _delegate(group.parent, host)
            elif controller == "cpuset":
                _inherit_cpuset(folder, group.parent)
            group.mkdir(exist_ok=True)
            groups.append(group)
        try:
            _limit(found.version, controller, folder, group, host)
        except OSError as error:
            raise LabError(f"host {host.name}: {error}", hint="has this machine that many cores?") from error
    return groups


def remove_groups(lab: str, root: Path = CGROUP_ROOT) -> None:
    """Kill what runs in the lab's groups and remove them. Raises LabError if something can't be killed."""
    tops = [top for top in (root / lab, *root.glob(f"*/{lab}")) if top.is_dir()]
    deadline = time.monotonic() + _EMPTY_WITHIN_S
    for top in tops:
        for group in [*top.glob("*/"), top]:
            while not _remove(group):
                for pid in _processes(group):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                if time.monotonic() > deadline:
                    raise LabError(f"{group} can't be removed", hint=f"what runs in it? see {group}/cgroup.procs")
                time.sleep(0.01)


def labs_with_groups(prefix: str, root: Path = CGROUP_ROOT) -> set[str]:
    return {top.name for pattern in (f"{prefix}*", f"*/{prefix}*") for top in root.glob(pattern) if top.is_dir()}


def cpu_quota_us(cpu: float) -> tuple[int, int]:
    """Quota and period that give `cpu` cores."""
    period = max(_PERIOD_US, round(_LEAST_QUOTA_US / cpu))
    return round(period * cpu), period


def _limit(version: int, controller: str, folder: Path, group: Path, host: HostSpec) -> None:
    def write(name: str, value: object) -> None:
        (group / name).write_text(str(value))

    if controller == "cpu" and host.cpu is not None:
        quota_us, period_us = cpu_quota_us(host.cpu)
        if version == 2:
            write("cpu.max", f"{quota_us} {period_us}")
        else:
            write("cpu.cfs_period_us", period_us)
            write("cpu.cfs_quota_us", quota_us)
    elif controller == "memory" and host.memory_bytes is not None:
        if version == 2:
            write("memory.max", host.memory_bytes)
            _write_if_there(group / "memory.swap.max", 0)
        else:
            write("memory.limit_in_bytes", host.memory_bytes)
            _write_if_there(group / "memory.memsw.limit_in_bytes", host.memory_bytes)
    elif controller == "cpuset" and host.cpuset is not None:
        if version == 1:
            write("cpuset.mems", (folder / "cpuset.mems").read_text().strip())
        write("cpuset.cpus", host.cpuset)


def _write_if_there(file: Path, value: int) -> None:
    if file.exists():
        file.write_text(str(value))


def _delegate(group: Path, host: HostSpec) -> None:
    """v2: let the groups below have limits."""
    wanted = ["cpu", "memory"] + (["cpuset"] if host.cpuset is not None else [])
    for controller in wanted:
        try:
            (group / "cgroup.subtree_control").write_text(f"+{controller}")
        except OSError as error:
            why = "processes are in it" if error.errno == errno.EBUSY else str(error.strerror)
            raise LabError(f"{group} can't give {controller} to groups below: {why}") from error


def _inherit_cpuset(folder: Path, group: Path) -> None:
    """v1: a new set is empty, and nothing below can have more."""
    for name in ("cpuset.mems", "cpuset.cpus"):
        (group / name).write_text((folder / name).read_text().strip())


def _processes(group: Path) -> Iterator[int]:
    with contextlib.suppress(OSError):
        yield from (int(line) for line in (group / "cgroup.procs").read_text().split())


def _remove(group: Path) -> bool:
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
