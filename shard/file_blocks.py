"""Reading bytes of a file straight into an array: no page mapped, no second copy."""

from __future__ import annotations

import os
import threading

import numpy as np

from transport.errors import BadCheckpoint

# A call can't be interrupted. Under a CPU quota (a container's, a lab's) what one takes beyond it is paid back with all
# threads of the group standing still: to read 500 MB at once silenced a worker on a quarter of a core for seconds.
_MAX_READ_BYTES = 1 << 23
# Without preadv (Windows) a file's position is shared by the threads that read it.
_SEEKING = threading.Lock()


def read_exactly(fd: int, out: np.ndarray, offset: int, what: str) -> None:
    """Fill the contiguous `out` with the file's bytes from `offset` on; `what` names them in an error."""
    view = out.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        part = view[done : done + _MAX_READ_BYTES]
        try:
            count = _read_at(fd, part, offset + done)
        except OSError as error:
            raise BadCheckpoint(f"can't read {what}: {error.strerror}", hint="check the disk") from error
        if count == 0:
            raise BadCheckpoint(
                f"{what} is cut off: {len(view):,} bytes announced, {done:,} there", hint="pull the model again"
            )
        done += count


def _read_at(fd: int, out: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [out], offset)
    with _SEEKING:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(out))
    out[: len(data)] = data
    return len(data)
