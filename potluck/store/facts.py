"""What a user wants to know of a model besides its sizes: whether it can chat, and what can run it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potluck.store.manifest import StoredModel
from shard.mlx_backend.families import FAMILIES
from shard.model_facts import read_config
from shard.torch_backend.architectures import SUPPORTED
from shard.torch_backend.lean.support import lean_reason
from transport.errors import BadCheckpoint

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """`backends` are those that run the architecture, whether or not they are installed here. `library_reason`: why
    torch runs the model by the library's classes, None where it takes the lean path."""

    has_tokenizer: bool
    has_chat_template: bool
    backends: tuple[str, ...]
    library_reason: str | None


def facts_of(model: StoredModel) -> ModelFacts:
    architecture = model.spec.architecture
    backends = (("torch", SUPPORTED), ("mlx", FAMILIES))
    return ModelFacts(
        has_tokenizer=any((model.path / name).is_file() for name in _TOKENIZER_FILES),
        has_chat_template=_has_chat_template(model.path),
        backends=tuple(backend for backend, known in backends if architecture in known),
        library_reason=lean_reason(config_of(model), stacked_experts=model.spec.stacked_experts),
    )


def config_of(model: StoredModel) -> dict[str, Any]:
    """config.json; where the model's files are gone, what its record says of it."""
    try:
        return read_config(model.path)
    except BadCheckpoint:
        return {"model_type": model.spec.architecture}


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))
