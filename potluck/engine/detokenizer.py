"""The detokenizer turns committed tokens into text and logprobs, and cuts the text at stop strings."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from transport.messages.requests import TokenLogprob
from transport.messages.ring import SampledToken


class TokenTable(Protocol):
    """What is known about each token id. Ids outside of the tokenizer are empty and not special."""

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that the token adds to a text; they need not be whole characters."""

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a mark for the model (end of turn and the like), not text."""


class Detokenizer:
    """Yields whole characters only: the bytes of a character that several tokens share wait for the last of them.

    Bytes that can't be UTF-8 become U+FFFD, as in any decoder; a character that never completes is left out.
    """

    def __init__(self, tokens: TokenTable) -> None:
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes. Special tokens have none."""
        if self._tokens.is_special(token_id):
            return ""
        return self._decoder.decode(self._tokens.token_bytes(token_id))


class StopFilter:
    """Lets text through up to the first stop string, wherever the borders of tokens fall.

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


class ChoiceOutput:
    """The text side of one sequence. A token's logprob goes out with the last of its text.

    Where a stop string cuts the text, tokens that begin before the cut keep their logprob; those after it have none.
    """

    def __init__(self, tokens: TokenTable, stop_strings: Sequence[str]) -> None:
        self._tokens = tokens
        self._detokenizer = Detokenizer(tokens)
        self._stop = StopFilter(stop_strings)
        self._num_chars_in = 0
        self._num_chars_out = 0
        self._pending: deque[tuple[int, int, TokenLogprob]] = deque()

    def push(self, token: SampledToken) -> tuple[str, tuple[TokenLogprob, ...], bool]:
        """Text and logprobs that may go out now, and whether a stop string was met."""
        text = self._detokenizer.push(token.token_id)
        start = self._num_chars_in
        self._num_chars_in += len(text)
        if token.logprob is not None:
            self._pending.append((start, self._num_chars_in, self._describe(token, token.logprob)))
        ready, is_stopped = self._stop.push(text)
        self._num_chars_out += len(ready)
        return ready, self._take_logprobs(cut=is_stopped), is_stopped

    def finish(self) -> tuple[str, tuple[TokenLogprob, ...]]:
        """What was held back, once no more tokens come."""
        rest = self._stop.flush()
        self._num_chars_out += len(rest)
        return rest, self._take_logprobs(cut=False)

    def _take_logprobs(self, *, cut: bool) -> tuple[TokenLogprob, ...]:
        taken = []
        while self._pending:
            start, end, logprob = self._pending[0]
            if end > self._num_chars_out and not (cut and start < self._num_chars_out):
                break
            taken.append(logprob)
            self._pending.popleft()
        if cut:
            self._pending.clear()
        return tuple(taken)

    def _describe(self, token: SampledToken, logprob: float) -> TokenLogprob:
        top = tuple((*self._text(token_id), top_logprob) for token_id, top_logprob in token.top)
        return TokenLogprob(*self._text(token.token_id), logprob, top)

    def _text(self, token_id: int) -> tuple[str, bytes]:
        token_bytes = self._tokens.token_bytes(token_id)
        return token_bytes.decode("utf-8", "replace"), token_bytes
