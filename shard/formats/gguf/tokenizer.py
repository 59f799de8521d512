"""A GGUF's tokenizer becomes the files that transformers loads: BPE and SentencePiece, as llama.cpp runs them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

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
_ALWAYS_CONTROL = _ENDS_OF_TURN | {"</s>"}


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

    def end_token_ids(self) -> list[int]:
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
        types=[CONTROL if text in _ALWAYS_CONTROL else int(kind) for text, kind in zip(tokens, types, strict=True)],
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


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_MODERN = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|{numbers}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """Expressions applied one after the other; `whole_words` takes a piece that is a token without merging."""

    expressions: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


_LLAMA3 = _PreTokenizer((_MODERN.replace("{numbers}", r"\p{N}{1,3}"),), whole_words=True, add_bos=True)
_QWEN2 = _PreTokenizer((_MODERN.replace("{numbers}", r"\p{N}"),))
_PRE_TOKENIZERS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "gpt-2": _PreTokenizer((_GPT2,)),
    "smollm": _PreTokenizer((r"\p{N}", _GPT2)),
    "default": _PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}


def adds_bos(vocabulary: Vocabulary) -> bool:
    """Whether encoding starts with the BOS token when the file does not say."""
    return _pre_tokenizer_of(vocabulary.pre).add_bos


def bpe_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """Without special tokens and post-processing. Raises UnsupportedModel for an unknown `pre`."""
    cut = _pre_tokenizer_of(vocabulary.pre)
    ids = {text: token for token, text in enumerate(vocabulary.tokens)}
    if len(ids) != len(vocabulary.tokens):
        raise BadCheckpoint("the GGUF's vocabulary holds a token twice", hint="take another conversion")
    # A merge into something that is no token is never made by llama.cpp; the tokenizers library refuses it.
    merges = [
        pair
        for pair in map(_split_merge, vocabulary.merges)
        if pair[0] in ids and pair[1] in ids and "".join(pair) in ids
    ]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=cut.whole_words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in cut.expressions),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer_of(pre: str) -> _PreTokenizer:
    if pre not in _PRE_TOKENIZERS:
        raise UnsupportedModel(
            f"the GGUF's pre-tokenizer {pre!r} is not known here",
            hint=f"known are {', '.join(_PRE_TOKENIZERS)}; use the model's Hugging Face folder instead",
        )
    return _PRE_TOKENIZERS[pre]


def _split_merge(merge: str) -> tuple[str, str]:
    # Tokens themselves never hold a plain space in byte-level BPE, but a merge may start with one in old files.
    cut = merge.find(" ", 1)
    if cut < 0:
        raise BadCheckpoint(f"the GGUF has the merge {merge!r}, which is not a pair", hint="download it again")
    return merge[:cut], merge[cut + 1 :]


_SPACE = "▁"


def spm_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """Without special tokens and post-processing."""
    if vocabulary.unknown is None and BYTE not in vocabulary.types:
        raise BadCheckpoint("the GGUF's vocabulary has neither bytes nor an unknown token", hint="download it again")
    ids: dict[str, int] = {}
    for token, text in enumerate(vocabulary.tokens):
        ids.setdefault(text, token)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges(vocabulary, ids),
            unk_token=vocabulary.text(vocabulary.unknown),
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    prefix = vocabulary.add_space_prefix is not False
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges(vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    ranked = []
    for token, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind in (BYTE, CONTROL, UNKNOWN) or len(text) < 2:
            continue
        score = -vocabulary.scores[token]
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                ranked.append((score, ids[left], ids[right], left, right))
    ranked.sort()
    return [(left, right) for _, _, _, left, right in ranked]


def write_tokenizer(metadata: Mapping[str, Any], context_tokens: int, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, generation_config.json. Raises UnsupportedModel, BadCheckpoint."""
    vocabulary = vocabulary_from(metadata)
    tokenizer, add_bos = _build(vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_tokens,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": add_bos,
        "add_eos_token": vocabulary.add_eos,
        "bos_token": vocabulary.text(vocabulary.bos),
        "eos_token": vocabulary.text(vocabulary.eos),
        "unk_token": vocabulary.text(vocabulary.unknown),
        "pad_token": vocabulary.text(vocabulary.eos if vocabulary.padding is None else vocabulary.padding),
        "chat_template": vocabulary.chat_template,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    # The engine stops at all of these: chat models end a turn with another token than a text.
    ends = {"bos_token_id": vocabulary.bos, "eos_token_id": vocabulary.end_token_ids()}
    _write_json(folder / "generation_config.json", ends)


def _build(vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    if vocabulary.model == "gpt2":
        tokenizer, add_bos = bpe_tokenizer(vocabulary), adds_bos(vocabulary)
    elif vocabulary.model == "llama":
        tokenizer, add_bos = spm_tokenizer(vocabulary), True
    else:
        raise UnsupportedModel(
            f"the GGUF's tokenizer is of the kind {vocabulary.model!r}",
            hint="gpt2 (BPE) and llama (SentencePiece) are supported; use the model's Hugging Face folder",
        )
    if vocabulary.add_bos is not None:
        add_bos = vocabulary.add_bos
    _add_special_tokens(tokenizer, vocabulary)
    _add_bos_and_eos(tokenizer, vocabulary, add_bos)
    return tokenizer, add_bos


def _add_special_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    added = [
        AddedToken(text, special=kind != USER_DEFINED, normalized=False)
        for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and text
    ]
    tokenizer.add_tokens(added)


def _add_bos_and_eos(tokenizer: Tokenizer, vocabulary: Vocabulary, add_bos: bool) -> None:
    """BOS and EOS around a text, where the model wants them."""
    bos = vocabulary.text(vocabulary.bos) if add_bos else None
    eos = vocabulary.text(vocabulary.eos) if vocabulary.add_eos else None
    wanted = {text: token for text, token in ((bos, vocabulary.bos), (eos, vocabulary.eos)) if text is not None}
    if wanted:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*([bos] if bos else []), "$A", *([eos] if eos else [])],
            special_tokens=[(text, token) for text, token in wanted.items() if token is not None],
        )


def _write_json(path: Path, data: dict[str, Any]) -> None:
    kept = {key: value for key, value in data.items() if value is not None}
    path.write_text(json.dumps(kept, ensure_ascii=False, indent=1), encoding="utf-8")
