"""The child's end of a command pipe: a line of JSON in, a line of JSON out. Standard library only, so that another
interpreter can run it too."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

Handlers = Mapping[str, Callable[..., dict[str, Any]]]


def serve(handlers: Handlers, ready: dict[str, Any], replies: int) -> None:
    """Answer commands {"do": name, ...arguments} until the pipe ends. `replies`: see `reply_pipe`."""
    with os.fdopen(replies, "w") as out:
        print(json.dumps(ready), file=out, flush=True)
        for line in sys.stdin:
            command = json.loads(line)
            answer = handlers[command.pop("do")](**command)
            print(json.dumps(answer), file=out, flush=True)


def reply_pipe() -> int:
    """The descriptor for replies. What libraries print goes to stderr from then on. Call it before importing them."""
    replies = os.dup(1)
    os.dup2(2, 1)
    return replies
