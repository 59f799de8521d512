"""Chat templates as models bring them: Jinja in its sandbox, with the names that such templates use, and bounds.

A template is someone else's program. Jinja's immutable sandbox keeps it from objects that it was not given; nothing
keeps it from running for ever or asking for memory, and some of that happens as soon as it is read, when constants
are folded. So both reading and rendering take place in `potluck.engine.template_process`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE_CHARS = 2**20
MAX_RENDERED_CHARS = 16 * 2**20
_MAX_POWER_BITS = 4096


class TooLarge(Exception):
    """What a template makes is larger than any prompt."""


class ChatTemplate:
    """`literals` is the text that the template itself writes, its strings joined by NUL."""

    def __init__(self, source: str) -> None:
        """Raises jinja2.TemplateError, TooLarge, and whatever folding its constants raises."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TooLarge(f"a template of {len(source)} characters; at most {MAX_TEMPLATE_CHARS}")
        environment = _Environment()
        tree = environment.parse(source)
        texts = {node.data for node in tree.find_all(nodes.TemplateData)}
        texts |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        self.literals = "\0".join(texts)
        self._template = environment.from_string(source)

    def render(self, variables: Mapping[str, Any]) -> str:
        """Raises jinja2.TemplateError, TooLarge, and what Python raises for what the template does."""
        pieces, num_chars = [], 0
        for piece in self._template.generate(variables):
            num_chars += len(piece)
            if num_chars > MAX_RENDERED_CHARS:
                raise TooLarge(f"more than {MAX_RENDERED_CHARS // 2**20} Mi characters")
            pieces.append(piece)
        return "".join(pieces)


class _Environment(ImmutableSandboxedEnvironment):
    # Jinja then also leaves these to us, instead of folding them when it reads the template.
    intercepted_binops = frozenset({"**", "*", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlocks])
        self.filters["tojson"] = _to_json
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_MakeDict(), namespace=_Namespace
        )
        del self.globals["lipsum"]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        match operator, left, right:
            case "**", int(), int() if left.bit_length() * right > _MAX_POWER_BITS:
                raise TooLarge(f"a power of more than {_MAX_POWER_BITS} bits")
            case ("*", (str() | list() | tuple()) as text, int() as count) | (
                "*",
                int() as count,
                (str() | list() | tuple()) as text,
            ) if len(text) * count > MAX_RENDERED_CHARS:
                raise TooLarge(f"{len(text)} characters or items, {count} times")
        return super().call_binop(context, operator, left, right)


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}` marks, for training, what the assistant says: here it is like any other text."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own form

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _MakeDict:
    """`dict(...)`, without being the type."""

    def __call__(self, *arguments: Any, **fields: Any) -> dict[Any, Any]:
        return dict(*arguments, **fields)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(jinja2.utils.Namespace):
    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no place for {name!r}")
        super().__setitem__(name, value)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
