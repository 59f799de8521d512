"""A system under test is a child process that obeys commands over pipes. Standard library and thread counts only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from transport.process.child import thread_environment

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


class SystemUnderTest:
    """`python -m MODULE ARGUMENTS`, ready when made. Its module ends in `child_loop.serve`."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        *,
        threads: int,
        python: str | Path = sys.executable,
    ) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [str(python), "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={
                **os.environ,
                **thread_environment(threads, os.environ),
                "PYTHONPATH": str(ROOT),
                "TOKENIZERS_PARALLELISM": "0",
            },
        )
        self.pid = self._process.pid
        self.ready = self._read()

    def call(self, do: str, **arguments: Any) -> dict[str, Any]:
        """What the child answers. Raises RuntimeError if it ends instead."""
        assert self._process.stdin is not None
        print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}: its last words are above")
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
