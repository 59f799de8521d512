"""From committed tokens to what a client reads: text without stop strings, and logprobs that belong to that text."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from potluck.engine.detokenizer import Detokenizer, TokenTable
from potluck.engine.stop import StopFilter
from transport.messages import SampledToken
from transport.requests import TokenLogprob


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
