"""What a thread that polls sockets needs: a waker, a detector of suspends, and an executor it can poll."""

from __future__ import annotations

import contextlib
import socket
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


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


_LATE_S = 0.5


class SuspendDetector:
    """One owner thread, which asks whenever it looks at the clock."""

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

    Full at `most_bytes` or `max_jobs` that wait: then nothing more should be asked for.
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
        """For a poller: readable when `settle` has something to do."""
        return self._wake.fileno()

    def submit(self, work: Callable[[], None], on_done: OnDone, num_bytes: int = 0) -> None:
        """`then` is called by a later `settle`, in the order of submission, with what `work` raised."""
        future = self._executor.submit(work)
        self._jobs.append((future, num_bytes, on_done))
        self._queued_bytes += num_bytes
        future.add_done_callback(lambda _: self._wake.set())

    def run_callbacks(self) -> None:
        """Call `then` of all that is done. Raises what it raises."""
        self._wake.clear()
        while self._jobs and self._jobs[0][0].done():
            future, num_bytes, on_done = self._jobs.popleft()
            self._queued_bytes -= num_bytes
            on_done(future.exception())

    def close(self, *, cancel: bool = False) -> None:
        """Finish what is queued, or only what has begun, without calling any `then`."""
        self._executor.shutdown(wait=True, cancel_futures=cancel)
        self._jobs.clear()
        self._wake.close()
