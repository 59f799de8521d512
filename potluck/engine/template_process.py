"""The template process renders one chat template in a sandbox: `python -P -m potluck.engine.template_process`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import IO, Any, Literal

import jinja2
import jinja2.ext
import msgspec
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from msgspec import Raw, Struct

from transport.process.child import lower_priority

_LENGTH_BYTES = 4
MAX_FRAME_BYTES = 128 * 2**20

TemplateFailure = Literal["", "refused", "too large"]


class LoadTemplate(Struct, frozen=True, tag=True):
    """The template to render from now on. Answered once."""

    source: str
    within_s: float


class RenderTemplate(Struct, frozen=True, tag=True):
    """`variables` are a dict by name; `within_s` is of computing."""

    variables: Raw
    within_s: float


class TemplateReply(Struct, frozen=True):
    """`text` is what was rendered, or of what was read its literals; where there is a `failure`, what went wrong."""

    text: str
    failure: TemplateFailure = ""


def write_frame(stream: IO[bytes], frame: bytes) -> None:
    stream.write(len(frame).to_bytes(_LENGTH_BYTES, "big") + frame)
    stream.flush()


def read_frame(stream: IO[bytes]) -> bytes | None:
    """None at the end of the stream, also in the middle of a frame, and for a frame that is too long."""
    length = int.from_bytes(head, "big") if len(head := stream.read(_LENGTH_BYTES)) == _LENGTH_BYTES else None
    if length is None or length > MAX_FRAME_BYTES:
        return None
    frame = stream.read(length)
    return frame if len(frame) == length else None


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


_MAX_MEMORY_BYTES = 2**29
_GRACE_S = 1.0
_MAX_MESSAGE_CHARS = 500


def serve() -> None:
    """Answer until the parent is gone."""
    decoder = msgspec.msgpack.Decoder(LoadTemplate | RenderTemplate)
    encoder = msgspec.msgpack.Encoder()
    # Nothing that a library prints gets between the frames.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    template: ChatTemplate | None = None
    while (frame := read_frame(sys.stdin.buffer)) is not None:
        message = decoder.decode(frame)
        with _deadline(message.within_s + _GRACE_S):
            match message:
                case LoadTemplate(source=source):
                    template, answer = _load(source)
                case RenderTemplate(variables=variables):
                    answer = _rendered(template, msgspec.msgpack.decode(variables))
            frame = encoder.encode(answer)
        write_frame(output, frame)


def _load(source: str) -> tuple[ChatTemplate | None, TemplateReply]:
    try:
        template = ChatTemplate(source)
        return template, _text_reply(template.literals)
    except Exception as error:  # noqa: BLE001  # the template's own, whatever it is
        return None, _failure_reply(error)


def _rendered(template: ChatTemplate | None, variables: dict[str, Any]) -> TemplateReply:
    if template is None:
        return TemplateReply("the template could not be read", "refused")
    try:
        return _text_reply(template.render(variables))
    except Exception as error:  # noqa: BLE001  # the template's own, whatever it is
        return _failure_reply(error)


def _text_reply(text: str) -> TemplateReply:
    # Half of a character's escape in a template is no text.
    text.encode()
    return TemplateReply(text)


def _failure_reply(error: Exception) -> TemplateReply:
    if isinstance(error, TooLarge | MemoryError):
        return TemplateReply(str(error) or "more memory than there is for it", "too large")
    said = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
    return TemplateReply(said[:_MAX_MESSAGE_CHARS].encode(errors="replace").decode(), "refused")


@contextlib.contextmanager
def _deadline(seconds: float) -> Any:
    """The system ends this process after `seconds` of computing, even in the middle of one long step of Python's."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0.0)


def _limit_memory() -> None:
    if sys.platform != "win32":
        import resource

        # Where the system does not do it, the parent looks at what is resident.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lower_priority()
    _limit_memory()
    serve()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
