"""A name that this store does not know: another host's model, one to be pulled, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from devices.pairing.roster import RosterFile
from potluck.cli.session import requested_model
from potluck.head.models.search import ModelRequest, request_model
from potluck.store.manifest import StoredModel
from potluck.store.sources import ProgressCallback
from potluck.system.paths import roster_file
from potluck.system.settings import Settings
from transport.errors import DownloadFailed, ModelNotFound
from transport.messages.pool import HostModel
from transport.security.curve import new_key_pair

MISSING = ModelNotFound("there is no such model")
CONSOLE = Console(stderr=True)


def pull(progress: ProgressCallback) -> StoredModel:
    raise AssertionError("only when nobody has it")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTLUCK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("POTLUCK_RUNTIME", str(tmp_path / "run"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


def pair() -> None:
    roster_file().parent.mkdir(parents=True, exist_ok=True)
    RosterFile(roster_file(), name="alpha").add(new_key_pair().public, "beta", "Linux x86-64")


@pytest.mark.parametrize(
    "text", ["./tiny", "/models/tiny", "~/tiny", "tiny.gguf", "file:tiny", "a/b/c", "..", "x y", ""]
)
def test_paths_and_what_is_no_name_mean_nothing_elsewhere(text: str) -> None:
    assert request_model(text, MISSING, pull) is None


def test_a_name_and_a_source_mean_the_same_model() -> None:
    by_source = request_model("hf:org/name@main", MISSING, pull)
    assert by_source is not None and by_source.name == "org/name" and by_source.pull is pull
    assert by_source.matches(HostModel("org/name", "", 1))
    assert by_source.matches(HostModel("mine", "hf:org/name@main", 1))
    assert not by_source.matches(HostModel("mine", "", 1))
    by_name = request_model("tiny", MISSING, pull)
    # Nobody knows where from to pull it.
    assert by_name is not None and by_name.name == "tiny" and by_name.pull is None
    assert by_name.matches(HostModel("tiny", "hf:org/name", 1))
    assert not by_name.matches(HostModel("Tiny", "", 1))


def test_without_other_hosts_it_is_an_error_at_once() -> None:
    with pytest.raises(ModelNotFound) as raised:
        requested_model(Settings(model="tiny", lan=False), CONSOLE)
    assert raised.value.hint == "potluck pull smollm2"
    with pytest.raises(ModelNotFound) as raised:
        requested_model(Settings(model="tiny"), CONSOLE)
    assert "potluck up tiny --wait-for 2" in raised.value.hint
    with pytest.raises(ModelNotFound) as raised:
        requested_model(Settings(model="./tiny"), CONSOLE)
    assert "--wait-for" not in raised.value.hint
    assert not roster_file().exists()


def test_with_a_paired_host_or_one_that_is_waited_for_it_is_looked_for() -> None:
    waited = requested_model(Settings(model="tiny", wait_for=2), CONSOLE)
    assert isinstance(waited, ModelRequest) and waited.pull is None
    pair()
    wanted = requested_model(Settings(model="hf:org/name"), CONSOLE)
    assert isinstance(wanted, ModelRequest) and wanted.pull is not None
    offline = requested_model(Settings(model="hf:org/name", offline=True), CONSOLE)
    assert isinstance(offline, ModelRequest) and offline.pull is None
    assert isinstance(offline.missing, DownloadFailed)
    with pytest.raises(ModelNotFound):
        requested_model(Settings(model="./tiny"), CONSOLE)
