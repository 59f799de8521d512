"""Files of pools: to plan again later, elsewhere, or for devices that nobody has yet."""

from __future__ import annotations

import json
from pathlib import Path

from planner.measured import PoolTimes
from planner.pool_file import SavedPool, pool_from_json, pool_to_json
from planner.profile import ModelProfile
from transport.errors import ConfigError


def load_pool(path: Path) -> SavedPool:
    """Raises ConfigError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"the pool file {path} can't be read: {error}", hint="save one with --save-pool") from error
    return pool_from_json(data, where=str(path))


def save_pool(path: Path, profile: ModelProfile, times: PoolTimes) -> None:
    """Raises ConfigError."""
    try:
        path.write_text(json.dumps(pool_to_json(profile, times), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the pool file {path} can't be written: {error}", hint="choose another --save-pool"
        ) from error
