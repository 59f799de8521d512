"""The input processor turns a client's `Submit` into a request that the engine can run, or refuses it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from potluck.engine.detokenizer import ChoiceOutput, TokenTable
from potluck.engine.request import Choice, Request, TokenSequence
from potluck.engine.settings import EngineLimits
from potluck.engine.tokenizer import Prompt, PromptTooLong
from transport.errors import BadRequest
from transport.messages.requests import MAX_STOP_CHARS, MAX_STOP_STRINGS, MAX_TOP_LOGPROBS, Submit
from transport.messages.ring import SequenceId


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
        return self.build_request(submit, prompt, max_tokens, self._tokenizer.eos_ids, now_s)

    def build_request(
        self, submit: Submit, prompt: Prompt, max_tokens: int, stop_token_ids: frozenset[int], now_s: float
    ) -> Request:
        """A request whose numbers are known to be good."""
        choices = tuple(
            Choice(
                request_id=submit.request,
                index=index,
                sequence=TokenSequence(
                    SequenceId(next(self._sequence_ids)),
                    prompt.ids,
                    msgspec.structs.replace(submit.sampling, choice=index),
                    max_tokens=max_tokens,
                    priority=submit.priority,
                ),
                output=ChoiceOutput(self._tokenizer, (*submit.stop, *prompt.stop)),
                stop_token_ids=stop_token_ids,
            )
            for index in range(submit.num_choices)
        )
        return Request(id=submit.request, choices=choices, submitted_s=now_s)

    def _prompt(self, submit: Submit) -> Prompt:
        match (submit.messages, submit.prompt, submit.prompt_ids):
            case (messages, None, None) if messages is not None:
                prompt, param = self._chat(messages, submit.max_tokens), "messages"
            case (None, text, None) if text is not None:
                prompt, param = Prompt(ids=self._tokenizer.encode_text(text)), "prompt"
            case (None, None, ids) if ids is not None:
                prompt, param = Prompt(ids=ids), "prompt"
            case _:
                num_given = sum(each is not None for each in (submit.messages, submit.prompt, submit.prompt_ids))
                raise BadRequest(f"expected one of messages, prompt and prompt_ids, got {num_given}", param="prompt")
        if not prompt.ids:
            raise BadRequest("the prompt has no tokens", hint="send some text", param=param)
        lowest, highest, size = min(prompt.ids), max(prompt.ids), self._limits.vocab_size
        if lowest < 0 or highest >= size:
            got = lowest if lowest < 0 else highest
            raise BadRequest(f"expected token ids below {size}, got {got}", param=param)
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
    """Refuse what would break the engine or a stage, whatever the HTTP layer checked. Raises BadRequest."""
    rules = itertools.chain(_choice_rules(submit, limits), _sampling_rules(submit, limits))
    for param, value, is_good, expected in rules:
        if not is_good:
            raise BadRequest(f"{param}: expected {expected}, got {value}", param=param)


_Rules = Iterator[tuple[str, object, bool, str]]
"""(field, its value, whether that is good, what is expected)."""


def _choice_rules(submit: Submit, limits: EngineLimits) -> _Rules:
    max_tokens, num_stops, stop_chars = submit.max_tokens, len(submit.stop), [len(stop) for stop in submit.stop]
    yield "max_tokens", max_tokens, max_tokens is None or max_tokens >= 1, "at least 1"
    yield "n", submit.num_choices, 1 <= submit.num_choices <= limits.max_choices, f"1 to {limits.max_choices}"
    yield "stop", num_stops, num_stops <= MAX_STOP_STRINGS, f"at most {MAX_STOP_STRINGS} strings"
    good_chars = all(0 < chars <= MAX_STOP_CHARS for chars in stop_chars)
    yield "stop", stop_chars, good_chars, f"strings of 1 to {MAX_STOP_CHARS} characters"


def _sampling_rules(submit: Submit, limits: EngineLimits) -> _Rules:
    sampling = submit.sampling
    top_logprobs, top_k, bias_by_id = sampling.top_logprobs, sampling.top_k, sampling.logit_bias
    yield "top_logprobs", top_logprobs, 0 <= (top_logprobs or 0) <= MAX_TOP_LOGPROBS, f"0 to {MAX_TOP_LOGPROBS}"
    yield "top_k", top_k, top_k >= 0, "at least 0"
    # Comparisons with NaN are false.
    yield "temperature", sampling.temperature, 0 <= sampling.temperature < math.inf, "a finite number, at least 0"
    yield "top_p", sampling.top_p, 0 < sampling.top_p <= 1, "more than 0 and at most 1"
    yield "min_p", sampling.min_p, 0 <= sampling.min_p <= 1, "0 to 1"
    penalty = sampling.repetition_penalty
    yield "repetition_penalty", penalty, 0 < penalty < math.inf, "a finite number, more than 0"
    for name in ("presence_penalty", "frequency_penalty"):
        yield name, getattr(sampling, name), math.isfinite(getattr(sampling, name)), "a finite number"
    for token_id, bias in bias_by_id.items():
        yield "logit_bias", token_id, 0 <= token_id < limits.vocab_size, f"token ids below {limits.vocab_size}"
        yield "logit_bias", f"{bias} for token {token_id}", math.isfinite(bias), "finite numbers"
