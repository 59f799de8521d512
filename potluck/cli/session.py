"""A session goes from settings to a head that serves: model, head, log, and the signals that end it in order."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from rich.console import Console

from devices.pairing.roster import RosterFile
from potluck.cli.models import pull_with_progress
from potluck.cli.progress_bars import head_progress
from potluck.head.head import Head, start_head
from potluck.head.models.search import ModelRequest, request_model
from potluck.store.manifest import StoredModel
from potluck.store.sources import offline_by_environment
from potluck.store.store import Store
from potluck.system.paths import home_dir, logs_dir, roster_file
from potluck.system.settings import Settings
from transport.errors import ConfigError, DownloadFailed, ModelNotFound, PotluckError

# SIGHUP is a closed terminal; on Windows that is SIGBREAK, as is Ctrl-Break. Neither system has the other's.
_ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))


def stored_model(settings: Settings, console: Console) -> StoredModel:
    """The settings' model, pulled first if it is not in the store. Raises ConfigError if none is named."""
    if settings.model is None:
        raise ConfigError("no model is named", hint="say which: potluck up smollm2, or model = in the config file")
    return pull_with_progress(Store(home_dir(), offline=settings.offline), settings.model, console)


def requested_model(settings: Settings, console: Console) -> StoredModel | ModelRequest:
    """The settings' model. What is not in the store may be on another host of the pool, if there can be one; otherwise
    it is pulled now. Raises PotluckError."""
    if settings.model is None or not _may_be_elsewhere(settings):
        try:
            return stored_model(settings, console)
        except ModelNotFound as error:
            if settings.model is None or not settings.lan or request_model(settings.model, error, None) is None:
                raise
            there = f"if another computer has it: potluck up {settings.model} --wait-for 2, and potluck join there"
            raise ModelNotFound(error.message, hint=f"{error.hint}; or, {there}") from error
    store, text = Store(home_dir(), offline=settings.offline), settings.model
    try:
        return store.resolve(text)
    except ModelNotFound as error:
        missing: PotluckError = error
    if settings.offline or offline_by_environment():
        # What the hub's cache has is here.
        try:
            return pull_with_progress(store, text, console)
        except (ModelNotFound, DownloadFailed) as error:
            missing = error
        request = request_model(text, missing, None)
    else:
        request = request_model(text, missing, lambda progress: store.pull(text, progress))
    return request or stored_model(settings, console)


def _may_be_elsewhere(settings: Settings) -> bool:
    """Whether other hosts can come: one is paired, or the user waits for one."""
    if not settings.lan:
        return False
    return settings.wait_for > 1 or _is_paired()


def _is_paired() -> bool:
    # Asked for by itself it would be made.
    return roster_file().exists() and bool(RosterFile(roster_file()).keys())


@contextmanager
def ending_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise one KeyboardInterrupt; what follows it is not interrupted again.

    A SIGHUP that is ignored stays so: that is what `nohup` is for.
    """
    previous = {number: signal.getsignal(number) for number in _ENDING if not _is_ignored(number)}
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
            model = requested_model(settings, console)
            # Until the head has ended: bars also come while it loads anew, and would leave a terminal without a cursor.
            progress = stack.enter_context(head_progress(console))
            head = stack.enter_context(start_head(settings, model, progress))
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


def _is_ignored(number: int) -> bool:
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN


def _interrupt(number: int, frame: FrameType | None) -> None:
    # Once: the orderly end takes a few seconds, and a second Ctrl-C must not cut it in half.
    for ending in _ENDING:
        signal.signal(ending, signal.SIG_IGN)
    raise KeyboardInterrupt
