"""What is found is all that Potluck writes, and only that."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from devices.hardware.device import DeviceRequest
from devices.hardware.measure import BandwidthMeasurement
from devices.hardware.probes import probe_devices
from devices.pairing.identity import load_keys
from devices.pairing.known_pools import KnownPool, save_known_pool
from devices.pairing.roster import RosterFile
from potluck.api.api_key import make_key
from potluck.cli.uninstall.inventory import Inventory, Locations, remove, size_of, take_inventory
from potluck.cli.uninstall.rules import HOME_RULES
from potluck.head.profiling.cache import ProfileCache
from potluck.store.store import Store
from potluck.system import paths
from shard.pieces.metadata import share_model
from tests.support.shard.safetensors_folders import tensors, write_folder
from tests.support.shard.tiny_gguf import write_gguf
from transport.errors import ConfigError
from transport.links.link_probe import LinkMeasurement
from transport.pieces.disk_space import write_limit
from transport.pieces.store import PieceStore

ROOT = Path(__file__).parents[4]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Locations:
    monkeypatch.setenv("POTLUCK_HOME", str(tmp_path / "home"))
    return Locations(
        home=tmp_path / "home",
        runtime=tmp_path / "run",
        config=tmp_path / "config" / "potluck" / "config.toml",
        service=None,
        hub=tmp_path / "hub",
    )


def fill(places: Locations, gguf: Path) -> None:
    """By what writes these things in earnest, where it can be had."""
    write_gguf(gguf)
    Store().pull(str(gguf))
    (places.home / "downloads" / "half").mkdir(parents=True)
    (places.home / "downloads" / "half" / "package.whl.partial").write_bytes(b"x" * 1000)
    pieces = PieceStore(places.home / "pieces")
    pieces.put(b"piece", hashlib.sha256(b"piece").hexdigest())
    write_limit(pieces.root, 10**9)
    share_model(write_folder(gguf.parent / "made", tensors()), "made", paths.shared_dir())
    figures = LinkMeasurement(hop_s=1e-3, hop_p95_s=1e-3, bytes_per_s=1e8)
    ProfileCache(paths.profiles_dir()).save_link("a", "b", "tcp", figures, 0.0)
    measured = BandwidthMeasurement(
        bandwidth_bytes_per_s=1e9, compute_dtype="float32", uses_host_memory=True, limit_bytes=None, gpu=""
    )
    request = DeviceRequest(name="cpu", backend="torch", kind="cpu", threads=1, memory_bytes=None)
    probe_devices([request], paths.probe_cache_file(), prober=lambda requests: [measured])
    (paths.logs_dir() / "head.log").write_text("log")
    load_keys(paths.identity_dir())
    RosterFile(paths.roster_file(), name="me").read()
    save_known_pool(paths.known_pools_file(), KnownPool(pool="p", key="k", name="n", my_name="m"))
    make_key()
    (places.runtime / "run-x").mkdir(parents=True)
    (places.runtime / "head.lock").touch()
    places.config.parent.mkdir(parents=True, exist_ok=True)
    places.config.write_text("port = 1\n")
    blobs = places.hub / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc.potluck.incomplete").write_bytes(b"x" * 10)
    (blobs / "abc").write_bytes(b"x")


def test_all_of_it_is_found_and_removed(places: Locations, tmp_path: Path) -> None:
    fill(places, tmp_path / "tiny.gguf")
    found = take_inventory(places)
    assert found.unknown == ()
    kinds = {kept.kind for kept in found.items}
    assert kinds >= {rule.kind for rule in HOME_RULES} | {"runtime", "config", "hub-parts"}
    assert sum(kept.num_bytes for kept in found.items) >= 1000
    for kept in found.items:
        assert all(kept.folder in path.parents for path in kept.paths)
    assert next(kept.folder for kept in found.items if kept.kind == "downloads") == places.home / "downloads"
    removed = remove(found)
    assert removed.failed == () and removed.num_bytes == sum(kept.num_bytes for kept in found.items)
    assert not places.home.exists() and not places.runtime.exists() and not places.config.parent.exists()
    assert (tmp_path / "tiny.gguf").exists()  # Used where it lies.
    assert [path.name for path in (places.hub / "models--org--name" / "blobs").iterdir()] == ["abc"]


def test_every_place_that_the_code_names_is_known() -> None:
    """What is added to the folder later must be added to the rules too."""
    source = (ROOT / "potluck" / "system" / "paths.py").read_text(encoding="utf-8")
    for path in sorted((ROOT / "potluck").rglob("*.py")):
        source += path.read_text(encoding="utf-8")
    named = set(re.findall(r'(?:home_dir\(\)|self\.root) / "([^"]+)"', source))
    assert len(named) > 8
    first = {rule.folder.split("/")[0] for rule in HOME_RULES}
    files = [rule for rule in HOME_RULES if rule.folder == "."]
    unknown = {name for name in named - first if not any(rule.matches(Path(name), is_folder=False) for rule in files)}
    assert unknown == set()


def test_what_others_put_there_stays(places: Locations, tmp_path: Path) -> None:
    fill(places, tmp_path / "tiny.gguf")
    theirs = [
        places.home / "thesis.doc",
        places.home / "models" / "my-own" / "weights.bin",
        places.home / "logs" / "diary.txt",
        places.home / "pieces" / "ab" / "chess.png",
        places.home / "downloads" / "song" / "song.mp3",
        places.home / "Pictures" / "cat.png",
        places.runtime / "other.sock",
    ]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    found = take_inventory(places)
    assert len(found.unknown) == len(theirs)
    remove(found)
    assert all(path.read_text() == "mine" for path in theirs)
    assert not (places.home / "identity").exists() and not (places.home / "models" / "tiny").exists()


def test_runtime_and_settings_may_lie_in_the_same_folder(places: Locations, tmp_path: Path) -> None:
    """As on Windows, and settings on a Mac."""
    inside = replace(
        places, runtime=places.home / "run", config=places.home / "config.toml", service=places.home / "service.xml"
    )
    fill(inside, tmp_path / "tiny.gguf")
    (places.home / "service.xml").touch()
    found = take_inventory(inside)
    assert found.unknown == ()
    remove(found)
    assert not places.home.exists()


@pytest.mark.parametrize("where", ["models", "models/linked", "pieces/ab", "logs/head.log", "identity"])
def test_links_are_not_followed(places: Locations, tmp_path: Path, where: str) -> None:
    outside = tmp_path / "outside"
    (outside / "inner").mkdir(parents=True)
    (outside / "potluck.json").write_text("{}")
    (outside / "inner" / "potluck.json").write_text("{}")
    link = places.home / where
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    found = take_inventory(places)
    assert found.unknown == (link,) and found.items == ()
    remove(found)
    assert (outside / "inner" / "potluck.json").exists() and link.is_symlink()


def test_a_link_inside_a_model_goes_and_what_it_leads_to_stays(places: Locations, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "weights").write_bytes(b"x" * 5000)
    model = places.home / "models" / "m"
    model.mkdir(parents=True)
    (model / "potluck.json").write_text("{}")
    (model / "weights").symlink_to(tmp_path / "outside")
    assert size_of(model) == 2
    remove(take_inventory(places))
    assert not model.exists() and (tmp_path / "outside" / "weights").exists()


def test_a_link_that_comes_in_between_is_not_followed(places: Locations, tmp_path: Path) -> None:
    model = places.home / "models" / "m"
    model.mkdir(parents=True)
    (model / "potluck.json").write_text("{}")
    found = take_inventory(places)
    model.rename(tmp_path / "aside")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "weights").touch()
    model.symlink_to(tmp_path / "outside")
    remove(found)
    assert (tmp_path / "outside" / "weights").exists()


@pytest.mark.parametrize("variable", ["home", "runtime"])
@pytest.mark.parametrize("place", ["/", "~", "~/..", "link"])
def test_a_folder_that_can_not_be_potlucks_is_refused(
    variable: str, place: str, places: Locations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "users" / "me"
    (own / "models").mkdir(parents=True)
    monkeypatch.setattr(Path, "home", lambda: own)
    (tmp_path / "link").symlink_to(own)
    chosen = {"/": Path("/"), "~": own, "~/..": own / "..", "link": tmp_path / "link"}[place]
    odd = Locations(**{name: getattr(places, name) for name in Locations.__slots__} | {variable: chosen})
    with pytest.raises(ConfigError, match="nothing is removed"):
        take_inventory(odd)


def test_where_nothing_is_nothing_is_found(places: Locations) -> None:
    assert take_inventory(places) == Inventory(items=(), unknown=(), folders=take_inventory(places).folders)
    assert remove(take_inventory(places)).failed == ()
    assert not places.home.exists()


@pytest.mark.skipif(os.getuid() == 0, reason="root may remove everything")
def test_what_can_not_be_removed_is_told_and_the_rest_goes(places: Locations) -> None:
    logs = places.home / "logs"
    logs.mkdir(parents=True)
    (logs / "head.log").touch()
    (places.home / "probe.json").touch()
    logs.chmod(0o500)
    removed = remove(take_inventory(places))
    logs.chmod(0o700)
    assert [path.name for path, _ in removed.failed] == ["head.log"]
    assert not (places.home / "probe.json").exists()
