"""Renders one model's chat template: `python -P -m potluck.engine.template_process`, frames on its standard streams.

It has no sockets, no files and little memory, and is killed when it takes too long: by the system, which it asks for
that before each piece of work, and by its parent. It ends with its parent, whose pipe is its standard input.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any

import jinja2
import msgspec

from potluck.engine.template_messages import Answer, Read, Render, read_frame, write_frame
from potluck.engine.template_sandbox import ChatTemplate, TooLarge
from transport.threads import give_way

_MAX_MEMORY_BYTES = 2**29
_GRACE_S = 1.0
_MAX_MESSAGE_CHARS = 500


def serve() -> None:
    """Answer until the parent is gone."""
    decoder = msgspec.msgpack.Decoder(Read | Render)
    encoder = msgspec.msgpack.Encoder()
    # Nothing that a library prints gets between the frames.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    template: ChatTemplate | None = None
    while (frame := read_frame(sys.stdin.buffer)) is not None:
        message = decoder.decode(frame)
        with _deadline(message.within_s + _GRACE_S):
            match message:
                case Read(source=source):
                    template, answer = _read(source)
                case Render(variables=variables):
                    answer = _rendered(template, msgspec.msgpack.decode(variables))
            frame = encoder.encode(answer)
        write_frame(output, frame)


def _read(source: str) -> tuple[ChatTemplate | None, Answer]:
    try:
        template = ChatTemplate(source)
        return template, _checked(template.literals)
    except Exception as error:  # noqa: BLE001  # the template's own, whatever it is
        return None, _failed(error)


def _rendered(template: ChatTemplate | None, variables: dict[str, Any]) -> Answer:
    if template is None:
        return Answer("the template could not be read", "refused")
    try:
        return _checked(template.render(variables))
    except Exception as error:  # noqa: BLE001  # the template's own, whatever it is
        return _failed(error)


def _checked(text: str) -> Answer:
    # Half of a character's escape in a template is no text.
    text.encode()
    return Answer(text)


def _failed(error: Exception) -> Answer:
    if isinstance(error, TooLarge | MemoryError):
        return Answer(str(error) or "more memory than there is for it", "too large")
    said = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
    return Answer(said[:_MAX_MESSAGE_CHARS].encode(errors="replace").decode(), "refused")


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
    give_way()
    _limit_memory()
    serve()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
