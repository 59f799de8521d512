"""Byte-level BPE tokenizers, as llama.cpp runs them on the same GGUF.

How text is cut before merging is named by `tokenizer.ggml.pre`; the expressions are llama.cpp's (src/llama-vocab.cpp).
A name that is not here is refused: a tokenizer that is nearly right is worse than none.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from shard.gguf_vocabulary import Vocabulary
from transport.errors import BadCheckpoint, UnsupportedModel

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_MODERN = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|{numbers}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class _Cut:
    """Expressions applied one after the other; `whole_words` takes a piece that is a token without merging."""

    expressions: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


_LLAMA3 = _Cut((_MODERN.replace("{numbers}", r"\p{N}{1,3}"),), whole_words=True, add_bos=True)
_QWEN2 = _Cut((_MODERN.replace("{numbers}", r"\p{N}"),))
_CUTS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "gpt-2": _Cut((_GPT2,)),
    "smollm": _Cut((r"\p{N}", _GPT2)),
    "default": _Cut((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}


def adds_bos(vocabulary: Vocabulary) -> bool:
    """Whether encoding starts with the BOS token when the file does not say."""
    return _cut_of(vocabulary.pre).add_bos


def bpe_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """Without special tokens and post-processing. Raises UnsupportedModel for an unknown `pre`."""
    cut = _cut_of(vocabulary.pre)
    ids = {text: token for token, text in enumerate(vocabulary.tokens)}
    if len(ids) != len(vocabulary.tokens):
        raise BadCheckpoint("the GGUF's vocabulary holds a token twice", hint="take another conversion")
    # A merge into something that is no token is never made by llama.cpp; the tokenizers library refuses it.
    merges = [
        pair for pair in map(_pair, vocabulary.merges) if pair[0] in ids and pair[1] in ids and "".join(pair) in ids
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


def _cut_of(pre: str) -> _Cut:
    if pre not in _CUTS:
        raise UnsupportedModel(
            f"the GGUF's pre-tokenizer {pre!r} is not known here",
            hint=f"known are {', '.join(_CUTS)}; use the model's Hugging Face folder instead",
        )
    return _CUTS[pre]


def _pair(merge: str) -> tuple[str, str]:
    # Tokens themselves never hold a plain space in byte-level BPE, but a merge may start with one in old files.
    cut = merge.find(" ", 1)
    if cut < 0:
        raise BadCheckpoint(f"the GGUF has the merge {merge!r}, which is not a pair", hint="download it again")
    return merge[:cut], merge[cut + 1 :]
