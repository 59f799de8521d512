"""NVIDIA GPUs by way of nvidia-smi, so that the main process need not import torch (seconds, and a CUDA context)."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

_DEADLINE_S = 10.0
_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    uuid: str
    free_bytes: int


def gpus() -> list[Gpu]:
    """The GPUs that nvidia-smi lists; none where it is missing, fails or hangs."""
    command = ["nvidia-smi", "--query-gpu=uuid,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=_DEADLINE_S, check=True
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
    num_listed = len(gpus())
    if num_listed == 0 and any(Path("/dev").glob("nvidia[0-9]*")):
        num_listed = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return num_listed
    return min(num_listed, len([part for part in visible.split(",") if part.strip() not in ("", "-1")]))
