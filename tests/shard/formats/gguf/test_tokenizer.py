"""Our tokenizer of a GGUF against llama.cpp's own on the same file; the fixture says how it was made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from shard.formats.gguf.ingest import ingest_gguf

FIXTURES = Path(__file__).parents[3] / "fixtures"
ORACLE = json.loads((FIXTURES / "tokenizer_smollm2.json").read_text(encoding="utf-8"))
SENTENCEPIECE_ORACLE = json.loads((FIXTURES / "tokenizer_gemma3.json").read_text(encoding="utf-8"))
# gemma-3-270m-q4_k_m.gguf, 241 MB: too much for every run (see the fixture for how its ids were made).
GEMMA3 = os.environ.get("POTLUCK_TEST_GEMMA3_GGUF")


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_path)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if GEMMA3 is None:
        pytest.skip("POTLUCK_TEST_GEMMA3_GGUF does not say where the file is")
    folder = tmp_path_factory.mktemp("gemma3")
    ingest_gguf(Path(GEMMA3), folder, recorded_as=GEMMA3)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("case", ORACLE["cases"], ids=lambda case: repr(case["text"])[:30])
def test_ids_are_llama_cpps(tokenizer: Any, case: dict[str, Any]) -> None:
    check(tokenizer, case)


def test_sentencepiece_ids_are_llama_cpps(sentencepiece: Any) -> None:
    for case in SENTENCEPIECE_ORACLE["cases"]:
        check(sentencepiece, case)


def check(tokenizer: Any, case: dict[str, Any]) -> None:
    text = case["text"]
    assert tokenizer.encode(text, add_special_tokens=False) == case["special"]
    assert tokenizer.encode(text, add_special_tokens=True) == case["special_ends"]
    assert tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) == case["plain"]
    assert tokenizer.encode(text, add_special_tokens=True, split_special_tokens=True) == case["plain_ends"]


@pytest.mark.parametrize("case", ORACLE["cases"], ids=lambda case: repr(case["text"])[:30])
def test_decoding_gives_the_text_back(tokenizer: Any, case: dict[str, Any]) -> None:
    assert tokenizer.decode(case["plain"]) == case["text"]


@pytest.mark.parametrize("chat", ORACLE["chats"], ids=lambda chat: chat["messages"][0]["content"])
def test_chats_are_rendered_as_llama_cpp_does(tokenizer: Any, chat: dict[str, Any]) -> None:
    prompt = tokenizer.apply_chat_template(chat["messages"], tokenize=False, add_generation_prompt=True)
    assert prompt == chat["prompt"]
    assert tokenizer.encode(prompt, add_special_tokens=False) == chat["ids"]


def test_special_tokens_are_those_of_the_file(tokenizer: Any, smollm2_path: Path) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    ends = json.loads((smollm2_path / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]
