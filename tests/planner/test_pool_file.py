"""What is saved is what is read; anything else is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from planner.measurements import estimated_pool
from planner.pool_file import pool_from_json, pool_to_json
from tests.support.planner.pool import device, model
from transport.errors import ConfigError


def saved() -> Any:
    pool = estimated_pool(model(2), [device("a"), device("b", host="there")], "here")
    return json.loads(json.dumps(pool_to_json(model(2), pool)))


def test_there_and_back() -> None:
    found = pool_from_json(saved(), where="file")
    assert found.profile == model(2)
    assert found.times == estimated_pool(model(2), [device("a"), device("b", host="there")], "here")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("format", "other", "not a pool file"),
        ("version", 3, "version 3"),
        ("surprise", 1, "unknown key surprise"),
        ("times.devices.0.surprise", 1, "unknown key times.devices.0.surprise"),
        ("times.devices.0.step_s", "fast", "Expected `float`"),
        ("times.devices.0.step_s", -1, "times must be finite"),
        ("times.devices.0.busy", 0.5, "times must be finite"),
        ("times.devices.0.kinds", [0, 7], "kinds of layers"),
        ("times.devices.0.head.seconds", [[1.0]], "times must be finite"),
        ("times.devices.0.layers.0.decode.rows", [2, 1], "times must be finite"),
        ("times.devices.0.device.free_bytes", -1, "memory must be ≥ 0 bytes"),
        ("times.devices.0.device.compute_dtype", "int3", "Invalid enum value"),
        ("times.links.0.bytes_per_s", 0, "a rate > 0"),
        ("profile.layer_params", [1], "not of 2 layers"),
        ("profile.sizes.0.layers", [1, 2, 3], "not of 2 layers"),
        ("profile.sizes.0.head", -1, "negative size"),
        ("profile.sizes", [], "what the model takes on a"),
        ("profile.weights", "5-bit", "Invalid enum value"),
        ("profile.legal_cuts", [5], "legal cuts"),
    ],
)
def test_corrupt_files(path: str, value: object, says: str) -> None:
    data = saved()
    *way, last = path.split(".")
    here = data
    for key in way:
        here = here[int(key)] if key.isdecimal() else here[key]
    here[last] = value
    with pytest.raises(ConfigError, match=says):
        pool_from_json(data, where="file")


@pytest.mark.parametrize("data", [None, [], "x", {}, 3])
def test_not_a_pool_at_all(data: object) -> None:
    with pytest.raises(ConfigError, match="not a pool file"):
        pool_from_json(data, where="file")
