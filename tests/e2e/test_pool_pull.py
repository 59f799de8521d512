"""`potluck pull` where a head runs: what another host of its pool has comes from there, and not from the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.e2e.lan_hosts import new_home
from tests.support.e2e.paired_hosts import Pair
from tests.support.shard.safetensors_folders import tensors, write_folder
from tests.support.store.hub_checks import SOURCE, WEIGHTS, assert_right, size_of
from tests.support.store.hub_server import TOKEN, FakeHub, serve_hub


@pytest.fixture
def pair(smollm2_path: Path) -> Iterator[Pair]:
    """A head with a model of its own, and another host."""
    made = Pair(new_home(), new_home())
    (made.alpha.data / "models").mkdir()
    (made.alpha.data / "models" / smollm2_path.name).symlink_to(smollm2_path)
    yield made
    made.clean()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "repository", tensors())


@pytest.fixture
def hub(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve_hub(repository) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield hub


def test_weights_that_the_pool_has_come_from_it(
    pair: Pair, hub: FakeHub, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alpha, beta = pair.alpha, pair.beta
    monkeypatch.setenv("HF_HOME", str(tmp_path / "beta-cache"))
    assert beta.run("pull", SOURCE).returncode == 0
    head, other = pair.up("--wait-for", "2"), pair.join()
    head.facts()
    hub.requests.clear()

    monkeypatch.setenv("HF_HOME", str(tmp_path / "alpha-cache"))
    rows = json.loads(alpha.run("list", "--json").stdout)
    assert [(row["name"], row.get("host")) for row in rows] == [("smollm2", None), ("org/name", "beta")]
    assert "on beta" in alpha.run("list").stdout
    pulled = alpha.run("pull", SOURCE, "--json")
    assert pulled.returncode == 0, pulled.stderr
    facts = json.loads(pulled.stdout.splitlines()[-1])
    assert facts["from_pool"] == {"beta": size_of(repository / WEIGHTS)}
    assert_right(Path(facts["path"]), repository)
    assert hub.file_bytes <= size_of(repository / "config.json") + (1 << 16)
    for running in (other, head):
        running.stop()
    for home in (alpha, beta):
        assert home.leftovers() == []
