"""Which of the systems' own ways to keep a program running this host has."""

from __future__ import annotations

import sys

from potluck.service.launchd import Launchd
from potluck.service.state import Keeper
from potluck.service.systemd import Systemd
from potluck.service.task_scheduler import TaskScheduler


def keeper() -> Keeper:
    """This host's. Elsewhere than on a Mac and Windows it is systemd, whether or not that answers."""
    if sys.platform == "darwin":
        return Launchd()
    return TaskScheduler() if sys.platform == "win32" else Systemd()
