"""A thread that polls sockets, and what it needs: a waker, a detector of suspends, and an executor it can poll."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import zmq

from transport.timeouts import THREAD_JOIN_S

log = logging.getLogger("potluck.polling")


class Waker:
    """Register `fileno()` with a poller for reading; `set` from any thread makes it readable until `clear`."""

    def __init__(self) -> None:
        self._in, self._out = socket.socketpair()
        self._in.setblocking(False)
        self._out.setblocking(False)

    def fileno(self) -> int:
        return self._out.fileno()

    def set(self) -> None:
        # A full buffer means that wakes are waiting already; a closed one that nobody waits any more.
        with contextlib.suppress(BlockingIOError, OSError):
            self._in.send(b"\0")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._out.recv(4096):
                pass

    def close(self) -> None:
        self._in.close()
        self._out.close()


class PollThread:
    """One thread that owns ZeroMQ sockets: whatever they do happens in the functions that it calls.

    `on_ready(ready)` is called with the sockets that have something to read, with or without any: after `wake` and
    when `wait_s()` has passed, too. `on_end` is called last, to send what is queued and close the sockets. An error
    that `on_ready` raises ends the thread; `on_failure` is told, since nobody else would notice.
    """

    def __init__(
        self,
        name: str,
        sockets: Sequence[zmq.Socket[bytes]],
        on_ready: Callable[[Container[Any]], object],
        *,
        wait_s: Callable[[], float],
        on_end: Callable[[], object],
        on_failure: Callable[[], object] = lambda: None,
    ) -> None:
        """It begins with `start`, once whatever it calls is there."""
        self._on_ready = on_ready
        self._wait_s = wait_s
        self._on_end = on_end
        self._on_failure = on_failure
        self._waker = Waker()
        self._items: list[tuple[Any, int]] = [(sock, zmq.POLLIN) for sock in sockets]
        self._items.append((self._waker.fileno(), zmq.POLLIN))
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Thread-safe: call `on_ready` soon."""
        self._waker.set()

    def stop(self) -> None:
        """Thread-safe, and for `on_ready` itself: not again. Does not wait."""
        self._is_stopping.set()
        self._waker.set()

    def close(self) -> None:
        """Stop, and wait for `on_end`, at most THREAD_JOIN_S."""
        self.stop()
        self._thread.join(THREAD_JOIN_S)

    def _run(self) -> None:
        try:
            while not self._is_stopping.is_set():
                # Rounded up: what is due in less than a millisecond is not looked for over and over.
                ready = {source for source, _ in zmq.zmq_poll(self._items, max(0, int(self._wait_s() * 1000 + 0.999)))}
                self._waker.clear()
                self._on_ready(ready)
        except Exception:  # The root of the thread.
            log.exception("%s has ended", self._thread.name)
            self._on_failure()
        finally:
            self._on_end()
            self._waker.close()


_LATE_S = 0.5


class SuspendDetector:
    """Tells time that passed from time that this process slept through: a closed lid, a stopped process. After such a
    pause everybody seems to have been silent for long, although their messages may be waiting to be read.

    One owner thread, which asks whenever it looks at the clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_s = clock()

    def suspended_s(self, expected_s: float) -> float:
        """Seconds since it was last asked beyond the `expected_s` that the owner meant to wait; 0 if it was in time."""
        now_s = self._clock()
        late_s = now_s - self._last_s - expected_s
        self._last_s = now_s
        return late_s if late_s > _LATE_S else 0.0


OnDone = Callable[[BaseException | None], None]


class PolledExecutor:
    """With one thread, work is done in order. All methods are for the thread that made it.

    Full at `max_bytes` or `max_jobs` that wait: then nothing more should be asked for.
    """

    def __init__(self, *, threads: int, max_bytes: int, max_jobs: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="pieces-disk")
        self._max_bytes = max_bytes
        self._max_jobs = max_jobs
        self._wake = Waker()
        self._jobs: deque[tuple[Future[None], int, OnDone]] = deque()
        self._queued_bytes = 0

    @property
    def is_full(self) -> bool:
        return self._queued_bytes > self._max_bytes or len(self._jobs) > self._max_jobs

    @property
    def is_idle(self) -> bool:
        return not self._jobs

    def fileno(self) -> int:
        """For a poller: readable when `run_callbacks` has something to do."""
        return self._wake.fileno()

    def submit(self, work: Callable[[], None], on_done: OnDone, num_bytes: int = 0) -> None:
        """A later `run_callbacks` calls `on_done`, in the order of submission, with what `work` raised."""
        future = self._executor.submit(work)
        self._jobs.append((future, num_bytes, on_done))
        self._queued_bytes += num_bytes
        future.add_done_callback(lambda _: self._wake.set())

    def run_callbacks(self) -> None:
        """Call `on_done` of all that is done. Raises what it raises."""
        self._wake.clear()
        while self._jobs and self._jobs[0][0].done():
            future, num_bytes, on_done = self._jobs.popleft()
            self._queued_bytes -= num_bytes
            on_done(future.exception())

    def close(self, *, cancel: bool = False) -> None:
        """Finish what is queued, or only what has begun, without calling any `on_done`."""
        self._executor.shutdown(wait=True, cancel_futures=cancel)
        self._jobs.clear()
        self._wake.close()
