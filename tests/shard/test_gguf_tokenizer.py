"""Our tokenizer of a GGUF against llama.cpp's own on the same file; the fixture says how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
ORACLE = json.loads((FIXTURES / "tokenizer_smollm2.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_path)


@pytest.mark.parametrize("case", ORACLE["cases"], ids=lambda case: repr(case["text"])[:30])
def test_ids_are_llama_cpps(tokenizer: Any, case: dict[str, Any]) -> None:
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
