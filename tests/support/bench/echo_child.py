"""This system under test measures nothing, and prints where it should not."""

from __future__ import annotations

import os
import sys
from typing import Any

from potluck.measure.child_process import reply_pipe, serve_commands


def double(number: int) -> dict[str, Any]:
    print("a library says something")
    return {"number": 2 * number}


def die() -> dict[str, Any]:
    os._exit(3)


if __name__ == "__main__":
    replies = reply_pipe()
    print("at once")
    serve_commands(
        {"double": double, "die": die}, {"argument": sys.argv[1], "threads": os.environ["OMP_NUM_THREADS"]}, replies
    )
