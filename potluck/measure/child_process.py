"""A system under test is a child process that takes commands over pipes. Standard library and thread counts only."""

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
    """Reply to commands {"do": name, ...arguments} until the pipe ends. `replies`: see `reply_pipe`."""
    send_reply(replies, ready)
    for line in sys.stdin:
        command = json.loads(line)
        send_reply(replies, handlers[command.pop("do")](**command))


def send_reply(replies: int, reply: Mapping[str, Any]) -> None:
    with os.fdopen(replies, "w", closefd=False) as out:
        print(json.dumps(reply), file=out)


def reply_pipe() -> int:
    """The descriptor for replies. What libraries print goes to stderr from then on. Call it before importing them."""
    replies = os.dup(1)
    os.dup2(2, 1)
    return replies


ROOT = Path(__file__).resolve().parents[2]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
"""The interpreter that has llama-cpp-python; `make bench-stage` installs it."""


_CLOSES_WITHIN_S = 20.0


class ChildEnded(RuntimeError):
    """A child ended instead of replying."""


class SystemUnderTest:
    """`python -m MODULE ARGUMENTS`, started by `start` (here, or a lab's `popen` on one of its hosts); ready when made.
    Its module ends in `serve_commands`."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        *,
        threads: int,
        python: str | Path = sys.executable,
        start: Callable[..., subprocess.Popen[str]] | None = None,
    ) -> None:
        self.name = name
        self._process = (start or _start_here)(
            [str(python), "-P", "-m", module, *arguments],
            environment={
                **thread_environment(threads, os.environ),
                "PYTHONPATH": str(ROOT),
                "TOKENIZERS_PARALLELISM": "0",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.pid = self._process.pid
        self.ready = self.read_reply()

    def call(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The child's reply. Raises ChildEnded if it ends instead."""
        self.send(do, **arguments)
        return self.read_reply()

    def send(self, do: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)

    def read_reply(self) -> dict[str, Any]:
        """Raises ChildEnded."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise ChildEnded(f"{self.name} exited with code {code} instead of a reply: its stderr is above")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def close(self) -> None:
        if self._process.stdin is None or self._process.stdin.closed:
            return
        self._process.stdin.close()
        try:
            self._process.wait(_CLOSES_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _start_here(command: Sequence[str], *, environment: Mapping[str, str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env={**os.environ, **environment}, **options)


def llama_python(wanted: str) -> Path | None:
    """The interpreter to run llama.cpp with: the one named, that of `make bench-stage`, or none.

    Raises FileNotFoundError for one that was named and is not there.
    """
    if wanted:
        if not Path(wanted).is_file():
            raise FileNotFoundError(f"--llama-python must name an interpreter, got {wanted}: no such file")
        return Path(wanted)
    return PEERS_PYTHON if PEERS_PYTHON.is_file() else None
