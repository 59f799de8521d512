"""The tokenizer of a GGUF as the files that transformers loads in a fraction of a second."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from shard.gguf_bpe import adds_bos, bpe_tokenizer
from shard.gguf_spm import spm_tokenizer
from shard.gguf_vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary, vocabulary_from
from transport.errors import UnsupportedModel


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
    ends = {"bos_token_id": vocabulary.bos, "eos_token_id": vocabulary.ends_of_generation()}
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
    _add_ends(tokenizer, vocabulary, add_bos)
    return tokenizer, add_bos


def _add_special_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    added = [
        AddedToken(text, special=kind != USER_DEFINED, normalized=False)
        for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and text
    ]
    tokenizer.add_tokens(added)


def _add_ends(tokenizer: Tokenizer, vocabulary: Vocabulary, add_bos: bool) -> None:
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
