"""What measured times depend on besides the device and the model: told as text, to compare and to keep them under.

Control groups: https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max) and /cgroup-v1 (cpu.cfs_quota_us).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

_LIBRARIES = {"torch": ("torch", "transformers"), "mlx": ("mlx", "mlx-lm", "mlx-cpu")}
_PROC = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")


def machine_fingerprint(backend: str) -> str:
    """The machine, the part of its CPUs that this process may use, and the versions of the libraries that compute."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return json.dumps(
        {
            "machine": [platform.node(), platform.machine(), _cpu_name(), cores],
            "quotas": sorted(cpu_quotas(_PROC, _ROOT)),
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            "versions": {name: _version(name) for name in ("potluck", *_LIBRARIES[backend])},
        },
        sort_keys=True,
    )


def cores_allowed() -> float | None:
    """Cores that the control groups around this process allow; None without a limit."""
    return min(cpu_quotas(_PROC, _ROOT), default=None)


def cpu_quotas(proc: Path, root: Path) -> Iterator[float]:
    """Cores that the control groups around this process allow; nothing where there is no limit (or off Linux)."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            quota = _quota(folder) if folder.is_relative_to(base) else None
            if quota is not None:
                yield quota


def _quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            used, period = (folder / "cpu.max").read_text().split()
        else:
            used = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(used) / int(period) if int(used) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or the word "max"
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
