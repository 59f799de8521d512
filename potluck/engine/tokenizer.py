"""The tokenizer of a model folder turns chats and texts into ids, and ids into their bytes."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from potluck.engine.chat_template import TemplateRenderer
from transport.errors import BadCheckpoint, BadRequest

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"


def _byte_level_table() -> dict[str, int]:
    """Character → byte of GPT-2's byte-level BPE: printable bytes stand for themselves, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    table = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}


_BYTE_LEVEL = _byte_level_table()


def _byte_level_bytes(piece: str) -> bytes:
    values = [_BYTE_LEVEL.get(char) for char in piece]
    # The decoder takes a token literally if it has one foreign character.
    return piece.encode() if None in values else bytes(value for value in values if value is not None)


def _sentencepiece_bytes(piece: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE_MARK, " ").encode()


def piece_decoder(decoder_json: str | bytes) -> Callable[[str], bytes] | None:
    """How a token's piece becomes bytes, from the "decoder" part of a tokenizer.json; None where that depends on its
    neighbours (WordPiece and the like)."""
    kinds = {part["type"]: part for part in _decoder_parts(json.loads(decoder_json))}
    if "ByteLevel" in kinds:
        return _byte_level_bytes
    if "Metaspace" in kinds and kinds["Metaspace"].get("replacement", _SPACE_MARK) == _SPACE_MARK:
        return _sentencepiece_bytes
    if "ByteFallback" in kinds and "Replace" in kinds:
        return _sentencepiece_bytes
    return None


def _decoder_parts(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [part for child in decoder["decoders"] for part in _decoder_parts(child)]
    return [decoder]


_FALLBACK_ROLES = {"system": "", "user": "User: ", "assistant": "Assistant: "}
_FALLBACK_STOP = "\nUser:"
# A text is counted in parts when it has so many characters a token that it may have, and taken for too long when the
# parts have so many times the tokens: cut in two, a text may have some more of them.
_COUNTED_FROM = 16
_TOO_LONG_FACTOR = 2
_PART_CHARS = 2**15


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Token ids, and stop strings that the way they were made brings with it."""

    ids: tuple[int, ...]
    stop: tuple[str, ...] = ()


class PromptTooLong(Exception):
    """A prompt that clearly has more tokens than it may have; `num_tokens` were counted before it was given up."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"more than {num_tokens}")
        self.num_tokens = num_tokens


class Tokenizer:
    """Thread-safe. Implements `potluck.engine.detokenizer.TokenTable`.

    A model without a chat template gets the chat as a script ("User: …\\nAssistant:") and stops where it would write
    the user's next line.
    """

    def __init__(self, folder: Path) -> None:
        """Reads tokenizer.json, tokenizer_config.json and the end-of-text ids of the configs. Raises BadCheckpoint."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise BadCheckpoint(
                f"{folder} has no tokenizer.json", hint="pull the model again, or convert its tokenizer to that format"
            )
        try:
            # Never AutoTokenizer: it picks a class by what the files say, may run their code, and takes twice as long.
            self._tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            # The engine refuses long prompts with numbers; the library's own warning would only be noise.
            self._tokenizer.model_max_length = sys.maxsize
            decoder = self._tokenizer.backend_tokenizer.decoder
            decoder_json = b"null" if decoder is None else decoder.__getstate__()
            self._decode_piece: Callable[[str], bytes] | None = piece_decoder(decoder_json)
        except Exception as error:
            # The tokenizers library raises a bare Exception for a bad file.
            raise BadCheckpoint(f"{path} can't be read: {error}", hint="pull the model again") from error
        added = self._tokenizer.added_tokens_decoder
        self._added = {int(token_id): str(token.content).encode() for token_id, token in added.items()}
        self._special = frozenset(int(token_id) for token_id, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}
        self._size = len(self._tokenizer)
        self.eos_ids = self._find_eos_ids(folder)
        self._renderer = TemplateRenderer(template) if (template := self._find_template(path)) else None
        special = self._tokenizer.special_tokens_map
        self._template_variables = {"add_generation_prompt": True, "tools": None, "documents": None, **special}
        self._control: re.Pattern[str] | None = None
        # The library changes its own state while it encodes.
        self._encoding = threading.Lock()

    @property
    def has_chat_template(self) -> bool:
        return self._renderer is not None

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, most_tokens: int | None = None) -> Prompt:
        """Raises BadRequest where the model's template refuses the messages, and PromptTooLong where they have many
        times `most_tokens`: eight million characters would take half a minute, and all other chats would wait.

        Marks like `<|im_end|>` inside a message are encoded as text: a user can't forge a turn.
        """
        if not messages:
            raise BadRequest("messages is empty", hint="send at least one message", param="messages")
        if self._renderer is None:
            script = _plain_transcript(messages)
            self._count(script, most_tokens)
            return Prompt(ids=self.encode_text(script), stop=(_FALLBACK_STOP,))
        marked = mark_control_tokens([dict(message) for message in messages], self._control_tokens(self._renderer))
        rendered = self._renderer.render(marked, self._template_variables)
        self._count(rendered, most_tokens)
        try:
            with self._encoding:
                ids = encode_marked_chat(self._tokenizer, rendered)
        except ValueError as error:
            raise BadRequest(
                f"expected text without the model's control tokens: {error}",
                hint="leave the model's control tokens out of the messages",
                param="messages",
            ) from error
        return Prompt(ids=tuple(ids))

    def encode_text(self, text: str) -> tuple[int, ...]:
        """The text as the model's training began one: with its begin-of-text token, if it has one."""
        with self._encoding:
            return tuple(self._tokenizer.encode(text))

    def token_bytes(self, token_id: int) -> bytes:
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._read_bytes(token_id)
        return found

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def _count(self, text: str, most_tokens: int | None) -> None:
        """Raises PromptTooLong. Others may encode between two parts."""
        if most_tokens is None or len(text) <= _COUNTED_FROM * most_tokens:
            return
        num_tokens = 0
        for start in range(0, len(text), _PART_CHARS):
            with self._encoding:
                part = self._tokenizer.backend_tokenizer.encode(
                    text[start : start + _PART_CHARS], add_special_tokens=False
                )
            num_tokens += len(part)
            if num_tokens > _TOO_LONG_FACTOR * most_tokens:
                raise PromptTooLong(num_tokens)

    def _read_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        # A model's vocabulary may be padded beyond the tokenizer's.
        piece = self._tokenizer.convert_ids_to_tokens(token_id) if 0 <= token_id < self._size else None
        if piece is None:
            return b""
        if self._decode_piece is not None:
            return self._decode_piece(piece)
        # What it adds after another token; the same token twice, so that a rule for the first one doesn't count.
        once, twice = (str(self._tokenizer.decode([token_id] * count)) for count in (1, 2))
        return twice[len(once) :].encode()

    def _find_template(self, path: Path) -> str | None:
        """The model's template for chats; None if it has none. Raises BadCheckpoint for several without a default."""
        if not self._tokenizer.chat_template:
            return None
        try:
            return str(self._tokenizer.get_chat_template())
        except ValueError as error:
            raise BadCheckpoint(f"{path.parent} has no default chat template: {error}", hint="pull another") from error

    def _control_tokens(self, renderer: TemplateRenderer) -> re.Pattern[str]:
        """Matches what only the template may write: special tokens, and others that it writes as they are, but for
        whitespace, which is ordinary text. The same rule as transformers'."""
        if self._control is None:
            written = renderer.literals
            names = {
                token.content
                for token in self._tokenizer.added_tokens_decoder.values()
                if token.special or (token.content in written and not token.content.isspace())
            }
            # Longer ones first: one may begin with another.
            ordered = sorted(filter(None, names), key=lambda name: (-len(name), name))
            self._control = re.compile("|".join(map(re.escape, ordered)) or "(?!)")
        return self._control

    def _find_eos_ids(self, folder: Path) -> frozenset[int]:
        found: set[int] = set()
        if self._tokenizer.eos_token_id is not None:
            found.add(self._tokenizer.eos_token_id)
        for name in ("generation_config.json", "config.json"):
            config = _read_json(folder / name)
            for part in (config, config.get("text_config") or {}):
                ids = part.get("eos_token_id")
                found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
        return frozenset(found)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadCheckpoint(f"{path} is not JSON: {error}", hint="pull the model again") from error
    return content if isinstance(content, dict) else {}


def _plain_transcript(messages: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for message in messages:
        role = message.get("role")
        if role not in _FALLBACK_ROLES:
            raise BadRequest(
                f"role {role!r}: this model has no chat template",
                hint="use the roles system, user and assistant",
                param="messages",
            )
        lines.append(f"{_FALLBACK_ROLES[role]}{message.get('content') or ''}")
    return "\n".join([*lines, "Assistant:"])
