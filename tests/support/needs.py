"""What some tests need of the machine: a skip has one reason, under which it is counted at the end."""

from __future__ import annotations

import os

import pytest

NEEDS_ROOT, NO_MOUNTS, NEEDS_MLX = "needs root", "no right to mount a file system here", "needs mlx"


def is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


needs_root = pytest.mark.skipif(not is_root(), reason=NEEDS_ROOT)
