"""The local head is found by a lock that ends with its process and a file that says where it answers."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import msgspec
from filelock import FileLock, Timeout
from msgspec import Struct

from devices.pairing.known_pools import load_known_pools
from potluck.system.paths import known_pools_file, runtime_dir
from transport.errors import AlreadyRunning, ConfigError, NotRunning
from transport.process.files import write_atomic
from transport.timeouts import HEAD_LOCK_S


class LocalHead(Struct, frozen=True, kw_only=True):
    """What another process of this user needs to reach the head.

    `control` is for this host, `lan` ("ADDRESS:PORT") and `pieces` (an endpoint) for others; `host` and `address` are
    this host's in the pool. `secret` is what this user's commands show the head.
    """

    pid: int
    url: str
    model: str
    control: str
    host: str
    address: str | None = None
    lan: str | None = None
    pieces: str | None = None
    secret: str = ""


def _file() -> Path:
    return runtime_dir() / "head.json"


def _lock() -> FileLock:
    return FileLock(runtime_dir() / "head.lock", timeout=0)


class HeadFile:
    """Held by the head from start to end; `with HeadFile() as file: file.publish(...)`."""

    def __init__(self) -> None:
        self._lock = _lock()

    def __enter__(self) -> HeadFile:
        try:
            self._lock.acquire(timeout=HEAD_LOCK_S, poll_interval=0.02)
        except Timeout as error:
            raise _already_running() from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _file().unlink(missing_ok=True)
        self._lock.release()

    def publish(self, facts: LocalHead) -> None:
        write_atomic(_file(), msgspec.json.encode(facts))


def running_head() -> LocalHead:
    """The head of this host. Raises NotRunning; a file left by a crash is not a head, since its lock is free."""
    lock = _lock()
    for timeout_s in (0.0, HEAD_LOCK_S):
        try:
            lock.acquire(timeout=timeout_s, poll_interval=0.02)
            break
        except Timeout:
            facts = _read()
            if facts is not None:
                return facts
    else:
        raise NotRunning("a head is starting on this host", hint="try again in a moment")
    lock.release()
    raise NotRunning("no head runs on this host", hint=_other_pools_hint())


def _other_pools_hint() -> str:
    start = "start one with: potluck up MODEL"
    try:
        pools = load_known_pools(known_pools_file())
    except ConfigError:
        return start
    return f"this host has joined the pool of {pools[0].name}: look there; or {start}" if pools else start


def _read() -> LocalHead | None:
    try:
        return msgspec.json.decode(_file().read_bytes(), type=LocalHead)
    except (OSError, msgspec.DecodeError):
        return None


def _already_running() -> AlreadyRunning:
    facts = _read()
    if facts is None:
        return AlreadyRunning("another head is starting on this host", hint="see: potluck status")
    return AlreadyRunning(
        f"a head already serves {facts.model} at {facts.url} (process {facts.pid})",
        hint="use it, stop it with Ctrl-C in its terminal, or see: potluck status",
    )
