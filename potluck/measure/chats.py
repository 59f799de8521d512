"""Chats run at once against a running head, timed as a client sees them."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from potluck.engine.tokenizer import Tokenizer
from potluck.measure.endpoint import LoadEndpoint, answer_of, find_endpoint
from potluck.measure.http_client import HttpExchange

_SILENCE_S = 600.0
_WORDS = "the keeper of the old lighthouse wrote down how the storm came in from the sea and what it left behind "


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTiming:
    """One answer. Times are seconds of `time.perf_counter`; `chunks_s` are arrivals of text, about one a token."""

    started_s: float
    ended_s: float
    chunks_s: tuple[float, ...]
    prompt_tokens: int
    tokens: int

    @property
    def ttft_s(self) -> float:
        return self.chunks_s[0] - self.started_s

    @property
    def decode_tokens_per_s(self) -> float:
        """Of the tokens after the first."""
        seconds = self.chunks_s[-1] - self.chunks_s[0]
        return (self.tokens - 1) / seconds if seconds > 0 else 0.0

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.chunks_s, self.chunks_s[1:], strict=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTimings:
    """Streams that ran at the same time."""

    chats: tuple[ChatTiming, ...] = field(default=())

    @property
    def wall_s(self) -> float:
        return max(stream.ended_s for stream in self.chats) - min(stream.started_s for stream in self.chats)

    @property
    def tokens(self) -> int:
        return sum(stream.tokens for stream in self.chats)

    @property
    def tokens_per_s(self) -> float:
        """All streams' tokens over the whole time, prompts included."""
        return self.tokens / self.wall_s

    @property
    def decode_tokens_per_s(self) -> float:
        """While all streams decode: from the last one's first token to the first one's last."""
        begin = max(stream.chunks_s[0] for stream in self.chats)
        end = min(stream.chunks_s[-1] for stream in self.chats)
        if end <= begin:
            return 0.0
        # A chunk can hold more than one token.
        per_chunk = self.tokens / sum(len(stream.chunks_s) for stream in self.chats)
        inside = sum(begin < at <= end for stream in self.chats for at in stream.chunks_s)
        return inside * per_chunk / (end - begin)

    @property
    def ttft_s(self) -> float:
        return statistics.median(stream.ttft_s for stream in self.chats)

    def gap_percentile_s(self, percent: float) -> float:
        gaps = sorted(gap for stream in self.chats for gap in stream.gaps_s)
        return gaps[min(len(gaps) - 1, int(len(gaps) * percent / 100))] if gaps else 0.0


class ChatLoad:
    """Sends chats of a given length to the head at `url`; answers do not end before their length."""

    def __init__(self, url: str, model: str, model_path: Path) -> None:
        self._url = url
        self._model = model
        self._tokenizer = Tokenizer(model_path)
        self._bias = {str(token_id): -100 for token_id in self._tokenizer.eos_ids}

    def run(self, prompt_tokens: int, output_tokens: int, concurrency: int) -> ChatTimings:
        """`concurrency` chats at once. Raises RuntimeError with what the head said if one fails, NotRunning if none is
        there."""
        prompts = [self._prompt(prompt_tokens, number) for number in range(concurrency)]
        return ChatTimings(chats=tuple(asyncio.run(self._run(prompts, output_tokens))))

    def _prompt(self, num_tokens: int, number: int) -> str:
        """About that long with the chat template; different from the others from its first word on."""

        def length(text: str) -> int:
            return len(self._tokenizer.encode_chat([{"role": "user", "content": text}]).ids)

        text = f"{number}. Tell a story of "
        low, high = 0, num_tokens
        words = _WORDS.split() * (num_tokens // 10 + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if length(text + " ".join(words[:middle])) <= num_tokens else (low, middle - 1)
        return text + " ".join(words[:low])

    async def _run(self, prompts: Sequence[str], output_tokens: int) -> list[ChatTiming]:
        endpoint = await find_endpoint(self._url, model=self._model, key="")
        fields = {"stream_options": {"include_usage": True}, "logit_bias": self._bias}
        return await asyncio.gather(
            *(self._stream(replace(endpoint, fields=fields), prompt, output_tokens) for prompt in prompts)
        )

    async def _stream(self, endpoint: LoadEndpoint, prompt: str, output_tokens: int) -> ChatTiming:
        found = HttpExchange()
        await endpoint.chat([{"role": "user", "content": prompt}], output_tokens, found, silence_s=_SILENCE_S)
        answer = answer_of(found)
        if answer.error:
            raise RuntimeError(f"{self._url} said {answer.error}")
        return ChatTiming(
            started_s=found.started_s,
            ended_s=found.ended_s,
            chunks_s=tuple(arrival.at_s for arrival in answer.arrivals),
            prompt_tokens=answer.prompt_tokens or 0,
            tokens=answer.tokens,
        )
