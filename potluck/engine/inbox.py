"""From the thread that receives an engine's events to the event loops that wait for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from transport.requests import EngineEvent


class Inbox:
    """Events of one request, on their way to its reader in `loop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._events: list[EngineEvent] = []
        self._reader: asyncio.Future[None] | None = None

    def put(self, events: list[EngineEvent]) -> None:
        """In the loop's thread."""
        self._events += events
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def take(self) -> list[EngineEvent]:
        """What has come; waits for it."""
        if not self._events:
            self._reader = self.loop.create_future()
            await self._reader
        events, self._events = self._events, []
        return events


def hand_over(arrived: dict[Inbox, list[EngineEvent]]) -> None:
    """Into the inboxes, with one call for each event loop."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[Inbox, list[EngineEvent]]]] = {}
    for inbox, events in arrived.items():
        loops.setdefault(inbox.loop, []).append((inbox, events))
    for loop, batch in loops.items():
        call(loop, _put, batch)


def _put(batch: list[tuple[Inbox, list[EngineEvent]]]) -> None:
    for inbox, events in batch:
        inbox.put(events)


def call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    """In the loop's thread. A loop that has been closed has nobody left who waits."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)
