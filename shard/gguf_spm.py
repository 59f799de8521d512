"""SentencePiece tokenizers (Llama 2, Gemma) as BPE with byte fallback, as llama.cpp runs them on the same GGUF.

llama.cpp joins the neighbours whose joined token has the best score, again and again. That is BPE with every way to
split a token into two tokens as a merge, ranked by the joined token's score.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers

from shard.gguf_vocabulary import BYTE, CONTROL, UNKNOWN, Vocabulary
from transport.errors import BadCheckpoint

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
