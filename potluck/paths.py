"""Where Potluck keeps things on this host. `POTLUCK_HOME` and `POTLUCK_RUNTIME` move them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from platformdirs import user_config_dir, user_data_dir

from transport.errors import ConfigError

# A Unix socket's path has at most 107 bytes; the longest name below a run folder is "/engine-000".
_MAX_SOCKET_PATH_BYTES = 107
_LONGEST_SOCKET_NAME_BYTES = 24


def home_dir() -> Path:
    """Models, probe results and logs."""
    return Path(os.environ.get("POTLUCK_HOME") or user_data_dir("potluck"))


def config_file() -> Path:
    return Path(os.environ.get("POTLUCK_CONFIG") or Path(user_config_dir("potluck")) / "config.toml")


def logs_dir() -> Path:
    """Raises ConfigError if it can't be made."""
    return _made(home_dir() / "logs", mode=0o777, moved_by="POTLUCK_HOME")


def probe_cache_file() -> Path:
    return home_dir() / "probe.json"


def profiles_dir() -> Path:
    """What was measured of devices with a model, and of links."""
    return home_dir() / "profiles"


def runtime_dir() -> Path:
    """A folder that only this user can enter, for sockets and the file that says which head runs.

    Raises ConfigError if it belongs to someone else, is open to others, or is too deep for a socket's path.
    """
    base = os.environ.get("POTLUCK_RUNTIME")
    if base:
        path = Path(base)
    elif os.environ.get("XDG_RUNTIME_DIR"):
        path = Path(os.environ["XDG_RUNTIME_DIR"]) / "potluck"
    else:
        path = Path(tempfile.gettempdir()) / f"potluck-{os.getuid()}"
    status = _made(path, mode=0o700, moved_by="POTLUCK_RUNTIME").stat()
    if status.st_uid != os.getuid():
        raise ConfigError(f"{path} belongs to another user", hint="set POTLUCK_RUNTIME to a folder of your own")
    if status.st_mode & 0o077:
        path.chmod(0o700)
    if len(os.fsencode(path)) + len(f"/run-{os.getpid()}") + _LONGEST_SOCKET_NAME_BYTES > _MAX_SOCKET_PATH_BYTES:
        raise ConfigError(f"{path} is too long for a socket's path", hint="set POTLUCK_RUNTIME to a shorter folder")
    return path


def _made(path: Path, *, mode: int, moved_by: str) -> Path:
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the folder {path} can't be made: {error.strerror}", hint=f"set {moved_by} to a folder that you can write"
        ) from error
    return path
