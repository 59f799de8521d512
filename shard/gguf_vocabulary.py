"""A GGUF's tokenizer metadata, checked and given names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from transport.errors import BadCheckpoint, UnsupportedModel

# llama.cpp's token types.
UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6

# Texts that end a turn wherever they are a vocabulary's control token, by llama.cpp's own list.
_ENDS_OF_TURN = frozenset(
    {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>",
        "<|return|>", "<|call|>", "< EOT >", "_<EOT>", "<EOT>",
    }
)  # fmt: skip
# Tokens that llama.cpp takes for control tokens, whatever a file says that they are.
_LOOKS_LIKE_CONTROL = _ENDS_OF_TURN | {"</s>"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """`model` is "gpt2" (byte-level BPE, with `merges`) or "llama" (SentencePiece, with `scores`)."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    bos: int | None
    eos: int | None
    unknown: int | None
    padding: int | None
    add_bos: bool | None
    add_eos: bool
    add_space_prefix: bool | None
    chat_template: str | None

    def text(self, token: int | None) -> str | None:
        return None if token is None else self.tokens[token]

    def ends_of_generation(self) -> list[int]:
        """The end token first, then the other tokens that end a turn."""
        ends = [] if self.eos is None else [self.eos]
        for token, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind == CONTROL and text in _ENDS_OF_TURN and token not in ends:
                ends.append(token)
        return ends


def vocabulary_from(metadata: Mapping[str, Any]) -> Vocabulary:
    """Raises BadCheckpoint for counts and ids that do not fit together."""
    tokens = _strings(metadata, "tokens")
    if not tokens:
        raise BadCheckpoint("the GGUF has no tokenizer", hint="take another conversion of the model")
    types = _numbers(metadata, "token_type", len(tokens), default=1)
    scores = _numbers(metadata, "scores", len(tokens), default=0.0)
    return Vocabulary(
        model=_field(metadata, "model", str) or "",
        pre=_field(metadata, "pre", str) or "default",
        tokens=tokens,
        types=[CONTROL if text in _LOOKS_LIKE_CONTROL else int(kind) for text, kind in zip(tokens, types, strict=True)],
        scores=[float(score) for score in scores],
        merges=_strings(metadata, "merges"),
        bos=_token_id(metadata, "bos_token_id", len(tokens)),
        eos=_token_id(metadata, "eos_token_id", len(tokens)),
        unknown=_token_id(metadata, "unknown_token_id", len(tokens)),
        padding=_token_id(metadata, "padding_token_id", len(tokens)),
        add_bos=_field(metadata, "add_bos_token", bool),
        add_eos=bool(_field(metadata, "add_eos_token", bool)),
        add_space_prefix=_field(metadata, "add_space_prefix", bool),
        chat_template=_template(metadata.get("tokenizer.chat_template")),
    )


def _field(metadata: Mapping[str, Any], key: str, kind: type) -> Any:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is not None and not isinstance(value, kind):
        raise BadCheckpoint(f"the GGUF has tokenizer.ggml.{key} = {value!r}", hint="download it again")
    return value


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(f"tokenizer.ggml.{key}", [])
    if not isinstance(values, list):
        raise BadCheckpoint(f"the GGUF's tokenizer.ggml.{key} is not a list of strings", hint="download it again")
    try:
        "".join(values).encode()
    except UnicodeEncodeError as error:
        raise UnsupportedModel(
            f"the GGUF's tokenizer.ggml.{key} has entries that are not UTF-8", hint="take another conversion"
        ) from error
    return values


def _numbers(metadata: Mapping[str, Any], key: str, count: int, *, default: float) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if values is None:
        return [default] * count
    if not isinstance(values, np.ndarray) or len(values) != count:
        raise BadCheckpoint(
            f"the GGUF's tokenizer.ggml.{key} does not match its {count} tokens", hint="download it again"
        )
    return list(values.tolist())


def _token_id(metadata: Mapping[str, Any], key: str, count: int) -> int | None:
    value: int | None = _field(metadata, key, int)
    if value is not None and not 0 <= value < count:
        raise BadCheckpoint(f"the GGUF has tokenizer.ggml.{key} = {value} of {count} tokens", hint="download it again")
    return value


def _template(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None
