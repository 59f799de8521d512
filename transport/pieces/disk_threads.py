"""Hashes, writes and syncs in threads of their own, so that the network does not wait for the disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from transport.wake import Wake

Then = Callable[[BaseException | None], None]


class DiskThreads:
    """With one thread, work is done in order. All methods are for the thread that made it.

    Full at `most_bytes` or `most_jobs` that wait: then nothing more should be asked for.
    """

    def __init__(self, *, threads: int, most_bytes: int, most_jobs: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="pieces-disk")
        self._most_bytes = most_bytes
        self._most_jobs = most_jobs
        self._wake = Wake()
        self._jobs: deque[tuple[Future[None], int, Then]] = deque()
        self._queued_bytes = 0

    @property
    def is_full(self) -> bool:
        return self._queued_bytes > self._most_bytes or len(self._jobs) > self._most_jobs

    @property
    def is_idle(self) -> bool:
        return not self._jobs

    def fileno(self) -> int:
        """For a poller: readable when `settle` has something to do."""
        return self._wake.fileno()

    def submit(self, work: Callable[[], None], then: Then, num_bytes: int = 0) -> None:
        """`then` is called by a later `settle`, in the order of submission, with what `work` raised."""
        future = self._executor.submit(work)
        self._jobs.append((future, num_bytes, then))
        self._queued_bytes += num_bytes
        future.add_done_callback(lambda _: self._wake.set())

    def settle(self) -> None:
        """Call `then` of all that is done. Raises what it raises."""
        self._wake.clear()
        while self._jobs and self._jobs[0][0].done():
            future, num_bytes, then = self._jobs.popleft()
            self._queued_bytes -= num_bytes
            then(future.exception())

    def close(self, *, cancel: bool = False) -> None:
        """Finish what is queued, or only what has begun, without calling any `then`."""
        self._executor.shutdown(wait=True, cancel_futures=cancel)
        self._jobs.clear()
        self._wake.close()
