"""Paths say where Potluck keeps things on this host; `POTLUCK_HOME` and `POTLUCK_RUNTIME` move them."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

from platformdirs import user_config_dir, user_data_dir

from transport.errors import ConfigError

# Longest path of a Unix socket: sun_path less its last zero byte. The longest name below a run folder is "/engine-000".
_MAX_SOCKET_PATH_BYTES = 107 if sys.platform == "linux" else 103
_LONGEST_SOCKET_NAME_BYTES = 24


def home_dir() -> Path:
    """Models, probe results and logs."""
    return Path(os.environ.get("POTLUCK_HOME") or own_data_dir())


def own_data_dir() -> Path:
    """Where models, logs and all else lie unless POTLUCK_HOME moves them. Only Windows has a folder for the author, and
    paths there are short of room."""
    return Path(user_data_dir("potluck", appauthor=False))


def config_file() -> Path:
    return Path(os.environ.get("POTLUCK_CONFIG") or Path(user_config_dir("potluck", appauthor=False)) / "config.toml")


def logs_dir() -> Path:
    """Raises ConfigError if it can't be made."""
    return _make_folder(home_dir() / "logs", mode=0o777, moved_by="POTLUCK_HOME")


def safe_file_name(text: str) -> str:
    """`text` as part of a file's name that every system takes: on Windows "cuda:0" would be a stream of "cuda"."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)


def probe_cache_file() -> Path:
    return home_dir() / "probe.json"


def identity_dir() -> Path:
    """This host's keys."""
    return home_dir() / "identity"


def roster_file() -> Path:
    """The hosts that are paired with this one as their head."""
    return home_dir() / "roster.json"


def known_pools_file() -> Path:
    """The pools that this host has joined."""
    return home_dir() / "pools.json"


def pieces_dir() -> Path:
    """Pieces of models of other hosts, by their hashes."""
    return home_dir() / "pieces"


def shared_dir() -> Path:
    """The folders that models in pieces are opened from, by their digests."""
    return home_dir() / "shared"


def profiles_dir() -> Path:
    """What was measured of devices with a model, and of links."""
    return home_dir() / "profiles"


def runtime_dir() -> Path:
    """A folder that only this user can enter, for sockets and the file that says which head runs.

    Raises ConfigError if it belongs to someone else, or is too deep for a socket's path. On Windows it lies in the
    user's own data, which is closed to other users, and nothing is checked: files have no such modes there, and sockets
    are ports.
    """
    path = _make_folder(runtime_path(), mode=0o700, moved_by="POTLUCK_RUNTIME")
    if sys.platform == "win32":
        return path
    # The link too, if it is one: among the temporary files anybody can put one that leads elsewhere.
    if {path.lstat().st_uid, path.stat().st_uid} != {os.getuid()}:
        raise ConfigError(f"{path} belongs to another user", hint="set POTLUCK_RUNTIME to a folder of your own")
    if path.stat().st_mode & 0o077:
        path.chmod(0o700)
    if len(os.fsencode(path)) + len(f"/run-{os.getpid()}") + _LONGEST_SOCKET_NAME_BYTES > _MAX_SOCKET_PATH_BYTES:
        raise ConfigError(f"{path} is too long for a socket's path", hint="set POTLUCK_RUNTIME to a shorter folder")
    return path


def runtime_path() -> Path:
    """Where `runtime_dir` is, or would be."""
    base = os.environ.get("POTLUCK_RUNTIME")
    if base:
        return Path(base)
    if sys.platform == "win32":
        return own_data_dir() / "run"
    if os.environ.get("XDG_RUNTIME_DIR"):
        return Path(os.environ["XDG_RUNTIME_DIR"]) / "potluck"
    return Path(tempfile.gettempdir()) / f"potluck-{os.getuid()}"


def _make_folder(path: Path, *, mode: int, moved_by: str) -> Path:
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the folder {path} can't be made: {error.strerror}", hint=f"set {moved_by} to a folder that you can write"
        ) from error
    return path
