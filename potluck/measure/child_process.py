"""A system under test is a child process that obeys commands over pipes. Standard library and thread counts only."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from transport.process.child_process import ChildProcess

Handlers = Mapping[str, Callable[..., dict[str, Any]]]


def serve_commands(handlers: Handlers, ready: dict[str, Any], replies: int) -> None:
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


ROOT = Path(__file__).resolve().parents[2]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
"""The interpreter that has llama-cpp-python; `make bench-stage` installs it."""


_EXIT_S = 20.0


class SystemUnderTest:
    """`python -m MODULE ARGUMENTS`, ready when made. Its module ends in `child_loop.serve`."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        *,
        threads: int,
        python: Path | None = None,
    ) -> None:
        self.name = name
        self._child = ChildProcess(
            module,
            arguments,
            errors=None,
            threads=threads,
            environment={**os.environ, "PYTHONPATH": str(ROOT)},
            interpreter=None if python is None else str(python),
        )
        self.pid = self._child.pid
        self.ready = self._read()

    def call(self, do: str, **arguments: Any) -> dict[str, Any]:
        """What the child answers. Raises RuntimeError if it ends instead."""
        self._child.send(json.dumps({"do": do, **arguments}).encode() + b"\n")
        return self._read()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._child.stdin.close()
        self._child.wait(_EXIT_S)
        self._child.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        line = self._child.stdout.readline()
        if not line:
            self._child.wait(_EXIT_S)
            raise RuntimeError(f"{self.name} ended with {self._child.exit_code()}: its last words are above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def llama_python(wanted: str) -> Path | None:
    """The interpreter to run llama.cpp with: the one asked for, that of `make bench-stage`, or none.

    Raises FileNotFoundError for one that was asked for and is not there.
    """
    if wanted:
        if not Path(wanted).is_file():
            raise FileNotFoundError(f"no interpreter {wanted}")
        return Path(wanted)
    return PEERS_PYTHON if PEERS_PYTHON.is_file() else None
