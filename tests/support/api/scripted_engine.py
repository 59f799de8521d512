"""A scripted engine answers by rule, in the event loop of the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Literal

from transport.errors import PotluckError
from transport.messages.requests import (
    Accepted,
    ChoiceFinished,
    Delta,
    EngineEvent,
    Finished,
    RequestFailed,
    Submit,
    TokenLogprob,
)


class ScriptedEngine:
    """Answers with the last message's words, backwards, then the seed; `max_tokens` and stop strings count.

    A prompt of "forever" never ends; "fail:<n>" fails after n words.
    """

    def __init__(self) -> None:
        self.state: Literal["starting", "ready", "down"] = "ready"
        self.reason = ""
        self.submitted: list[Submit] = []
        self.left: list[str] = []
        self.num_running = 0
        self.refusal: PotluckError | None = None
        self.delay_s = 0.0

    async def submit(self, submit: Submit) -> AsyncIterator[EngineEvent]:
        self.submitted.append(submit)
        if self.refusal is not None:
            yield _failed(submit.request, self.refusal)
            return
        assert submit.messages is not None
        prompt = str(submit.messages[-1]["content"])
        self.num_running += 1
        is_over = False
        try:
            yield Accepted(submit.request, 7)
            async for event in self._answer(submit, prompt):
                is_over = isinstance(event, Finished | RequestFailed)
                yield event
        finally:
            self.num_running -= 1
            if not is_over:
                self.left.append(submit.request)

    async def _answer(self, submit: Submit, prompt: str) -> AsyncIterator[EngineEvent]:
        if prompt.startswith("fail:"):
            for _ in range(int(prompt.removeprefix("fail:"))):
                yield Delta(submit.request, 0, "word ")
            yield RequestFailed(request=submit.request, code="ring_down", message="mlx:0 died", hint="start it again")
            return
        words = [*reversed(prompt.split()), f"seed={submit.sampling.seed}"]
        is_endless = prompt == "forever"
        total = 0
        for choice in range(submit.num_choices):
            count, reason = 0, "stop"
            while count < len(words) or is_endless:
                await asyncio.sleep(self.delay_s)
                word = "x" if is_endless else words[count]
                if word in submit.stop:
                    break
                if count == submit.max_tokens:
                    reason = "length"
                    break
                yield Delta(submit.request, choice, f"{word} ", self._logprobs(submit, word))
                count += 1
            total += count
            yield ChoiceFinished(submit.request, choice, "length" if reason == "length" else "stop", count)
        yield Finished(
            request=submit.request,
            prompt_tokens=7,
            completion_tokens=total,
            ttft_s=0.1,
            decode_s=0.2,
            cached_tokens=5,
        )

    @staticmethod
    def _logprobs(submit: Submit, word: str) -> tuple[TokenLogprob, ...]:
        wanted = submit.sampling.top_logprobs
        if wanted is None:
            return ()
        return (TokenLogprob(word, word.encode(), -0.25, ((word, word.encode(), -0.25), ("y", b"y", -2.0))[:wanted]),)


def _failed(request: str, error: PotluckError) -> RequestFailed:
    return RequestFailed(
        request=request,
        code=error.code,
        message=error.message,
        hint=error.hint,
        param=getattr(error, "param", None),
    )
