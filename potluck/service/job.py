"""What the service runs: a command of absolute paths, and the few variables of the environment that it needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from potluck.store.sources import looks_like_path
from transport.errors import ConfigError

# Where things are; never a token or a key: the file is readable for others.
_VARIABLES = ("POTLUCK_HOME", "POTLUCK_CONFIG", "POTLUCK_RUNTIME", "HF_HOME", "CUDA_VISIBLE_DEVICES")
_ARE_PATHS = {"POTLUCK_HOME", "POTLUCK_CONFIG", "POTLUCK_RUNTIME", "HF_HOME"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`keeps_trying`: what it waits for may be away for days, a head of another host for instance."""

    command: tuple[str, ...]
    environment: dict[str, str]
    keeps_trying: bool
    what: str


def job_of(model: str | None, *, join: bool, environment: Mapping[str, str] = os.environ) -> Job:
    """`potluck up MODEL`, or `potluck join`. Raises ConfigError for what a service can't be told safely."""
    if join and model is not None:
        raise ConfigError("a service serves a model or joins a head", hint="give --model or --join, not both")
    if not join and not model:
        raise ConfigError("the service has nothing to do", hint="give --model MODEL to serve it, or --join")
    command = [sys.executable, "-P", "-m", "potluck.cli", *(["join"] if join else ["up", _model(model or "")])]
    kept = {name: _value(name, environment[name]) for name in _VARIABLES if environment.get(name)}
    for text in (*command, *kept.values()):
        check_plain(text)
    return Job(
        command=tuple(command),
        environment=kept,
        keeps_trying=join,
        what="joins the head it is paired with" if join else f"serves {command[-1]}",
    )


def check_plain(text: str) -> str:
    """The same text. Raises ConfigError for characters that would end a line or a string of a service's file."""
    if any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 or 0xD800 <= ord(char) < 0xE000 for char in text):
        raise ConfigError(f"{text!r} holds characters that a service's file can't", hint="rename it")
    return text


def _model(text: str) -> str:
    """As a service names it, which does not start in this folder."""
    if text.startswith("-"):
        raise ConfigError(f"{text!r} would be an option, not a model", hint="give a model: potluck list shows them")
    if text.startswith("file:"):
        return f"file:{Path(text.removeprefix('file:')).expanduser().absolute()}"
    return str(Path(text).expanduser().absolute()) if looks_like_path(text) else text


def _value(name: str, text: str) -> str:
    return str(Path(text).expanduser().absolute()) if name in _ARE_PATHS else text
