"""A value that a thread is finding out, and that nobody waits for longer than they want to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from transport.errors import DeadlineExceeded

Value = TypeVar("Value")


class Later(Generic[Value]):
    """Begins at once. A call that hangs for ever, as those to a dead network disk do, holds up no one: the thread ends
    with the process."""

    def __init__(self, what: str, find_out: Callable[[], Value]) -> None:
        self._what = what
        self._find_out = find_out
        self._found: list[Value] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=what, daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> Value:
        """Raises what finding it out raised, or DeadlineExceeded."""
        self._thread.join(max(0.0, timeout_s))
        if self._error is not None:
            raise self._error
        if not self._found:
            raise DeadlineExceeded(f"{self._what}: no answer in time", hint="try again; if it stays so, restart it")
        return self._found[0]

    def _run(self) -> None:
        try:
            self._found.append(self._find_out())
        except BaseException as error:  # noqa: BLE001 - it goes on in whoever waits
            self._error = error
