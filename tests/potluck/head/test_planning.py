"""What --quantize means for a pool: the form that is asked for, or the first that fits, and the user hears which."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from devices.hardware.device import Device
from potluck.head.planning import choose_weights, profile_of
from potluck.store.manifest import StoredModel
from potluck.store.store import Store
from potluck.system.settings import Settings
from tests.support.planner.pool import device, quantizable
from tests.support.shard.tiny import NUM_LAYERS, save_tiny
from transport.errors import ConfigError
from transport.messages.ring import WeightsForm


def chosen(devices: list[Device], **settings: object) -> tuple[WeightsForm, list[str]]:
    said: list[str] = []
    wanted = Settings(**{"quantize": "auto", "concurrency": 1, **settings})  # type: ignore[arg-type]
    return choose_weights(replace(quantizable(), head_dim=64), devices, "here", wanted, said.append), said


@pytest.mark.parametrize(
    ("usable_mib", "form", "says"),
    [
        (1000, "stored", ["Weights of made-up: stored"]),
        (600, "8-bit", ["Weights of made-up: 8-bit: as stored it does not fit"]),
        (330, "4-bit", ["Weights of made-up: 4-bit: in 8 bits it does not fit"]),
        (200, "stored", []),  # Nothing fits: the error is about the model as it is.
    ],
)
def test_auto_takes_the_first_form_that_fits(usable_mib: int, form: WeightsForm, says: list[str]) -> None:
    assert chosen([device("a", usable_mib=usable_mib)]) == (form, says)
    apart = [device(name, usable_mib=usable_mib // 2 + 25, host=name) for name in ("a", "b")]
    assert chosen(apart) == (form, says)


def test_auto_looks_at_the_layers_that_were_said_by_hand() -> None:
    devices = [device("small", usable_mib=330), device("large", usable_mib=2000)]
    assert chosen(devices)[0] == "stored"
    assert chosen(devices, layers="small=7,large=1")[0] == "4-bit"
    with pytest.raises(ConfigError):
        chosen(devices, layers="nobody=8")


@pytest.mark.parametrize(("option", "form"), [("stored", "stored"), ("dense", "dense"), ("8", "8-bit"), ("4", "4-bit")])
def test_what_is_asked_for_is_taken(option: str, form: WeightsForm) -> None:
    assert chosen([device("a", usable_mib=1)], quantize=option) == (form, [])


def test_what_fits_depends_on_the_form_of_kv() -> None:
    # 900 MiB of weights; 32 MiB of KV in 16 bits, 17 in 8.
    devices = [device("a", usable_mib=925)]
    assert chosen(devices)[0] == "8-bit"
    assert chosen(devices, kv_cache="8-bit")[0] == "stored"


@pytest.fixture
def model(tmp_path: Path) -> StoredModel:
    return Store(tmp_path / "home").pull(str(save_tiny("llama", 0, tmp_path / "model")))


def test_a_profile_is_of_the_record_and_the_config(model: StoredModel) -> None:
    profile = profile_of(model, "4-bit", "8-bit")
    assert (profile.weights, profile.kv, profile.head_dim) == ("4-bit", "8-bit", model.spec.head_dim)
    sizes = {
        form: replace(profile, weights=form).weights_bytes(0, NUM_LAYERS, "torch", "bfloat16")
        for form in ("stored", "4-bit")
    }
    assert sizes["stored"] == model.spec.stage_weights_bytes(0, NUM_LAYERS, "bfloat16")
    assert (
        sizes["4-bit"] == model.spec.stage_weights_bytes(0, NUM_LAYERS, "bfloat16", weights="4-bit") < sizes["stored"]
    )


def test_what_the_library_path_runs_is_planned_dense_on_torch_only(model: StoredModel) -> None:
    path = model.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"a_feature_nobody_knows": 1}))
    profile = profile_of(model, "4-bit")
    dense = model.spec.stage_weights_bytes(0, NUM_LAYERS, "bfloat16", weights="dense")
    assert profile.weights_bytes(0, NUM_LAYERS, "torch", "bfloat16") == dense
    assert profile.weights_bytes(0, NUM_LAYERS, "mlx", "bfloat16") < dense
