"""Notes which files of POTLUCK_WALK_TREE run a function, and when, into POTLUCK_WALK_OUT: one file a process."""

import json
import os
import sys
import threading
import time
from types import FrameType

_TREE, _OUT = os.environ["POTLUCK_WALK_TREE"] + os.sep, os.environ["POTLUCK_WALK_OUT"]
_ROOMS = tuple(_TREE + room + os.sep for room in ("potluck", "shard", "transport", "planner", "devices"))
_IS_FUNCTION = 0x1  # CO_OPTIMIZED: neither a module nor a class body.
_seen: dict[str, set[int]] = {}


def _profile(frame: FrameType, event: str, _: object) -> None:
    if event != "call":
        return
    code = frame.f_code
    if code.co_filename.startswith(_ROOMS) and code.co_flags & _IS_FUNCTION:
        _seen.setdefault(code.co_filename, set()).add(time.monotonic_ns() // 10_000_000)


def _write_often() -> None:
    path = os.path.join(_OUT, f"{os.getpid()}.json")  # noqa: PTH118 (pathlib is not imported yet)
    while True:
        time.sleep(0.1)
        found = {name[len(_TREE) :]: sorted(times) for name, times in dict(_seen).items()}
        with open(path + ".new", "w") as file:  # noqa: PTH123
            json.dump(found, file)
        os.replace(path + ".new", path)  # noqa: PTH105


threading.Thread(target=_write_often, daemon=True).start()
threading.setprofile(_profile)
sys.setprofile(_profile)
