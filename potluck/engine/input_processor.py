"""The input processor turns a client's `Submit` into a request that the engine can run, or refuses it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from potluck.engine.detokenizer import ChoiceOutput, TokenTable
from potluck.engine.request import Choice, Request, TokenSequence
from potluck.engine.settings import EngineLimits
from potluck.engine.tokenizer import Prompt, PromptTooLong
from transport.errors import BadRequest
from transport.messages.requests import Priority, Submit
from transport.messages.ring import Sampling, SequenceId


class ChatTokenizer(TokenTable, Protocol):
    """What the engine needs of `potluck.engine.tokenizer.Tokenizer`."""

    eos_ids: frozenset[int]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, most_tokens: int | None = None) -> Prompt: ...

    def encode_text(self, text: str) -> tuple[int, ...]: ...


class InputProcessor:
    """Tokenizes and checks. Thread-safe, as far as the tokenizer is."""

    def __init__(self, tokenizer: ChatTokenizer, limits: EngineLimits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._sequence_ids = itertools.count(1)

    def process(self, submit: Submit, now_s: float) -> Request:
        """Raises BadRequest, naming the field."""
        _check(submit, self._limits)
        prompt = self._prompt(submit)
        max_tokens = self._max_tokens(len(prompt.ids), submit.max_tokens)
        return self.build_request(
            submit.request,
            prompt.ids,
            submit.sampling,
            max_tokens=max_tokens,
            stop=(*submit.stop, *prompt.stop),
            stop_token_ids=self._tokenizer.eos_ids,
            num_choices=submit.num_choices,
            priority=submit.priority,
            now_s=now_s,
        )

    def build_request(
        self,
        request: str,
        prompt_ids: tuple[int, ...],
        sampling: Sampling,
        *,
        max_tokens: int,
        stop: tuple[str, ...] = (),
        stop_token_ids: frozenset[int] = frozenset(),
        num_choices: int = 1,
        priority: Priority = "interactive",
        now_s: float,
    ) -> Request:
        """A request whose numbers are known to be good."""
        choices = tuple(
            Choice(
                index=index,
                sequence=TokenSequence(
                    SequenceId(next(self._sequence_ids)),
                    prompt_ids,
                    msgspec.structs.replace(sampling, choice=index),
                    max_tokens=max_tokens,
                    priority=priority,
                ),
                output=ChoiceOutput(self._tokenizer, stop),
                stop_token_ids=stop_token_ids,
            )
            for index in range(num_choices)
        )
        return Request(id=request, choices=choices, submitted_s=now_s)

    def _prompt(self, submit: Submit) -> Prompt:
        match (submit.messages, submit.prompt, submit.prompt_ids):
            case (messages, None, None) if messages is not None:
                prompt, param = self._chat(messages, submit.max_tokens), "messages"
            case (None, text, None) if text is not None:
                prompt, param = Prompt(ids=self._tokenizer.encode_text(text)), "prompt"
            case (None, None, ids) if ids is not None:
                prompt, param = Prompt(ids=ids), "prompt"
            case _:
                raise BadRequest("give exactly one of messages, prompt and prompt ids", param="prompt")
        if not prompt.ids:
            raise BadRequest("the prompt has no tokens", hint="send some text", param=param)
        if min(prompt.ids) < 0 or max(prompt.ids) >= self._limits.vocab_size:
            raise BadRequest(f"a token id outside of the vocabulary of {self._limits.vocab_size}", param=param)
        return prompt

    def _chat(self, messages: Sequence[Mapping[str, Any]], requested: int | None) -> Prompt:
        try:
            return self._tokenizer.encode_chat(messages, most_tokens=self._limits.sequence_tokens)
        except PromptTooLong as error:
            raise self._context_exceeded(str(error), requested, param="messages") from None

    def _max_tokens(self, num_prompt_tokens: int, requested: int | None) -> int:
        """Tokens that may be generated; all that the context leaves, if the client does not say."""
        available = self._limits.sequence_tokens - num_prompt_tokens
        wanted = 1 if requested is None else requested
        if available >= wanted:
            return available if requested is None else requested
        raise self._context_exceeded(
            str(num_prompt_tokens), requested, param="messages" if available < 1 else "max_tokens"
        )

    def _context_exceeded(self, num_prompt_tokens: str, requested: int | None, *, param: str) -> BadRequest:
        most = self._limits.sequence_tokens
        what = "the context is" if most == self._limits.context_tokens else "the pool's KV memory holds"
        return BadRequest(
            f"{what} {most} tokens; the prompt has {num_prompt_tokens}"
            + (" and leaves no room for an answer" if requested is None else f" and max_tokens is {requested}"),
            hint="shorten the messages or lower max_tokens, or start with a larger --context",
            param=param,
        )


def _check(submit: Submit, limits: EngineLimits) -> None:
    """What would break the engine or a stage is refused here, whatever the HTTP layer checked."""
    sampling = submit.sampling
    if submit.max_tokens is not None and submit.max_tokens < 1:
        raise BadRequest(f"max_tokens is {submit.max_tokens}; at least 1 is needed", param="max_tokens")
    if not 1 <= submit.num_choices <= limits.max_choices:
        raise BadRequest(f"n is {submit.num_choices}; 1 to {limits.max_choices} are possible", param="n")
    if len(submit.stop) > limits.max_stop_strings:
        raise BadRequest(f"{len(submit.stop)} stop strings; at most {limits.max_stop_strings}", param="stop")
    if any(not 0 < len(stop) <= limits.max_stop_chars for stop in submit.stop):
        raise BadRequest(f"a stop string must have 1 to {limits.max_stop_chars} characters", param="stop")
    if not 0 <= (sampling.top_logprobs or 0) <= limits.max_top_logprobs:
        raise BadRequest(f"top_logprobs must lie in 0 to {limits.max_top_logprobs}", param="top_logprobs")
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        if not math.isfinite(getattr(sampling, name)):
            raise BadRequest(f"{name} is not a finite number", param=name)
    for name, is_good in (
        ("temperature", sampling.temperature >= 0),
        ("top_p", 0 < sampling.top_p <= 1),
        ("min_p", 0 <= sampling.min_p <= 1),
        ("top_k", sampling.top_k >= 0),
        ("repetition_penalty", sampling.repetition_penalty > 0),
    ):
        if not is_good:
            raise BadRequest(f"{name} is out of range: {getattr(sampling, name)}", param=name)
    for token_id, bias in sampling.logit_bias.items():
        if not 0 <= token_id < limits.vocab_size:
            raise BadRequest(
                f"token id {token_id} is outside of the vocabulary of {limits.vocab_size}", param="logit_bias"
            )
        if not math.isfinite(bias):
            raise BadRequest(f"the bias of token {token_id} is not a finite number", param="logit_bias")
