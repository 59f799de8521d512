"""From settings to a head that serves: the store's model, the head, signals that end it in order."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from rich.console import Console

from potluck.commands.models import pull_with_progress
from potluck.config import Settings
from potluck.head import Head
from potluck.paths import home_dir, logs_dir
from potluck.store import Store, StoredModel
from potluck.terminal import head_progress
from transport.errors import ConfigError

# SIGHUP is a closed terminal; on Windows that is SIGBREAK, as is Ctrl-Break. Neither system has the other's.
_ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))


def model_of(settings: Settings, console: Console) -> StoredModel:
    """The settings' model, pulled first if it is not in the store. Raises ConfigError if none is named."""
    if settings.model is None:
        raise ConfigError("no model is named", hint="say which: potluck up smollm2, or model = in the config file")
    return pull_with_progress(Store(home_dir(), offline=settings.offline), settings.model, console)


@contextmanager
def ending_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise one KeyboardInterrupt; what follows it is not interrupted again.

    A SIGHUP that is ignored stays so: that is what `nohup` is for.
    """
    previous = {number: signal.getsignal(number) for number in _ENDING if not _is_kept_off(number)}
    for number in previous:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def running_head_of(settings: Settings, console: Console) -> Iterator[Head]:
    """A head that is up. A signal ends it in order; before it was up it also means exit code 130."""
    is_up = False
    _log_to_file()
    try:
        with ending_signals(), ExitStack() as stack:
            model = model_of(settings, console)
            with head_progress(console) as progress:
                head = stack.enter_context(Head(settings, model, progress))
            is_up = True
            yield head
    except KeyboardInterrupt:
        console.print("\nStopped.")
        if not is_up:
            raise


def _log_to_file() -> None:
    """A terminal shows what a user can act on; tracebacks of a failed request are for the log."""
    logging.basicConfig(
        filename=logs_dir() / "head.log",
        filemode="w",
        encoding="utf-8",
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        force=True,
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _is_kept_off(number: int) -> bool:
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN


def _interrupt(number: int, frame: FrameType | None) -> None:
    # Once: the orderly end takes a few seconds, and a second Ctrl-C must not cut it in half.
    for ending in _ENDING:
        signal.signal(ending, signal.SIG_IGN)
    raise KeyboardInterrupt
