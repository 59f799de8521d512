"""Stop strings over a stream of text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Lets text through up to the first stop string, wherever the pieces' borders fall.

    The first stop string is the one that is complete first, character by character; of two that end together, the
    longer. Text that could still become one is held back, and nothing more than that.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        """Stop strings are not empty."""
        self._stop_strings = tuple(dict.fromkeys(stop_strings))
        self._first_chars = frozenset(stop[0] for stop in self._stop_strings)
        self._longest = max((len(stop) for stop in self._stop_strings), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may go out now, and whether a stop string was met; after that, push no more."""
        if not self._stop_strings:
            return text, False
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stop_strings if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        cut = self._first_possible_start(text)
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _first_possible_start(self, text: str) -> int:
        """Where the longest suffix begins that a stop string begins with."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first_chars:
                suffix = text[start:]
                if any(stop.startswith(suffix) for stop in self._stop_strings):
                    return start
        return len(text)
