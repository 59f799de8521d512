"""How Python starts a child of its own that nobody but its parent ends, on every system."""

from __future__ import annotations

import sys
from typing import Any

# https://learn.microsoft.com/windows/win32/procthread/process-creation-flags; subprocess has them on Windows only.
_CREATE_NEW_PROCESS_GROUP = 0x00000200
_CREATE_NO_WINDOW = 0x08000000


def apart() -> dict[str, Any]:
    """Options of Popen for a child that a Ctrl-C in the parent's terminal does not reach: the parent ends it in order.

    On Windows it has no window either, also where the parent has none that it could share.
    """
    if sys.platform == "win32":
        return {"creationflags": _CREATE_NEW_PROCESS_GROUP | _CREATE_NO_WINDOW}
    return {"start_new_session": True}


def python_command() -> list[str]:
    """This interpreter, for a module of ours: a folder of the user's that is named like one of ours must not come
    first (-P)."""
    return [_interpreter(), "-P", "-m"]


def python_environment() -> dict[str, str]:
    """What to set for such a child: text in UTF-8, whatever the system's encoding is, and its virtual environment."""
    found = {"PYTHONUTF8": "1"}
    if _interpreter() != sys.executable:
        found["__PYVENV_LAUNCHER__"] = sys.executable
    return found


def _interpreter() -> str:
    """In a virtual environment on Windows `sys.executable` starts another process, the real one, with another id: who
    ends or names the one misses the other. As multiprocessing does, the real one is started at once."""
    base = getattr(sys, "_base_executable", None)
    return str(base) if sys.platform == "win32" and base else sys.executable
