"""What a name means that this host's store does not know: another host's model, one to be pulled, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from devices.roster import RosterFile
from potluck.config import Settings
from potluck.paths import roster_file
from potluck.session import wanted_of
from potluck.store import StoredModel
from potluck.store.progress import Progress
from potluck.wanted_model import WantedModel, wanted_model
from transport.curve import new_key_pair
from transport.errors import DownloadFailed, ModelNotFound
from transport.pool_messages import HostModel

MISSING = ModelNotFound("there is no such model")
CONSOLE = Console(stderr=True)


def pull(progress: Progress) -> StoredModel:
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
    assert wanted_model(text, MISSING, pull) is None


def test_a_name_and_a_source_mean_the_same_model() -> None:
    by_source = wanted_model("hf:org/name@main", MISSING, pull)
    assert by_source is not None and by_source.name == "org/name" and by_source.pull is pull
    assert by_source.is_meant(HostModel("org/name", "", 1))
    assert by_source.is_meant(HostModel("mine", "hf:org/name@main", 1))
    assert not by_source.is_meant(HostModel("mine", "", 1))
    by_name = wanted_model("tiny", MISSING, pull)
    # Nobody knows where from to pull it.
    assert by_name is not None and by_name.name == "tiny" and by_name.pull is None
    assert by_name.is_meant(HostModel("tiny", "hf:org/name", 1))
    assert not by_name.is_meant(HostModel("Tiny", "", 1))


def test_without_other_hosts_it_is_an_error_at_once() -> None:
    with pytest.raises(ModelNotFound) as raised:
        wanted_of(Settings(model="tiny", lan=False), CONSOLE)
    assert raised.value.hint == "potluck pull smollm2"
    with pytest.raises(ModelNotFound) as raised:
        wanted_of(Settings(model="tiny"), CONSOLE)
    assert "potluck up tiny --wait-for 2" in raised.value.hint
    with pytest.raises(ModelNotFound) as raised:
        wanted_of(Settings(model="./tiny"), CONSOLE)
    assert "--wait-for" not in raised.value.hint
    assert not roster_file().exists()


def test_with_a_paired_host_or_one_that_is_waited_for_it_is_looked_for() -> None:
    waited = wanted_of(Settings(model="tiny", wait_for_devices=2), CONSOLE)
    assert isinstance(waited, WantedModel) and waited.pull is None
    pair()
    wanted = wanted_of(Settings(model="hf:org/name"), CONSOLE)
    assert isinstance(wanted, WantedModel) and wanted.pull is not None
    offline = wanted_of(Settings(model="hf:org/name", offline=True), CONSOLE)
    assert isinstance(offline, WantedModel) and offline.pull is None
    assert isinstance(offline.missing, DownloadFailed)
    with pytest.raises(ModelNotFound):
        wanted_of(Settings(model="./tiny"), CONSOLE)
