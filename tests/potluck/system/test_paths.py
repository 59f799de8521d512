"""Where things lie, by system; and whose folders are taken."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from potluck.system import paths
from transport.errors import ConfigError


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POTLUCK_HOME", "POTLUCK_RUNTIME", "XDG_RUNTIME_DIR", "POTLUCK_CONFIG"):
        monkeypatch.delenv(name, raising=False)


def test_on_windows_all_lies_in_the_users_local_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without getuid, modes, or a socket's path that could be too long."""
    asked: list[object] = []

    def local_data(name: str, appauthor: object) -> str:
        asked.append(appauthor)
        return str(tmp_path / ("deep" * 30) / name)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(os, "getuid")
    monkeypatch.setattr(Path, "chmod", lambda *_: pytest.fail("modes mean nothing on Windows"))
    monkeypatch.setattr(paths, "user_data_dir", local_data)
    home = tmp_path / ("deep" * 30) / "potluck"
    assert paths.home_dir() == home
    assert paths.runtime_dir() == home / "run"
    assert (home / "run").is_dir()
    assert set(asked) == {False}  # AppData\Local\potluck, not AppData\Local\potluck\potluck.


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_elsewhere_sockets_lie_where_the_session_or_the_system_says(
    system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(prefix="pl-") as name:  # pytest's own is too long for a socket.
        short = Path(name)
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(tempfile, "gettempdir", lambda: name)
        assert paths.runtime_dir() == short / f"potluck-{os.getuid()}"
        assert (short / f"potluck-{os.getuid()}").stat().st_mode & 0o777 == 0o700
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(short / "run"))
        assert paths.runtime_dir() == short / "run" / "potluck"
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(short / ("deep" * 20)))
        with pytest.raises(ConfigError, match="too long"):
            paths.runtime_dir()


def test_a_folder_that_others_could_enter_is_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.setenv("POTLUCK_RUNTIME", str(tmp_path))
    assert paths.runtime_dir().stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a file that is another user's")
@pytest.mark.parametrize("kind", ["folder", "link"])
def test_another_users_folder_or_link_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    place = tmp_path / "place"
    if kind == "folder":
        place.mkdir()
    else:
        place.symlink_to(tmp_path / "mine")
    os.chown(place, 12345, 12345, follow_symlinks=False)
    monkeypatch.setenv("POTLUCK_RUNTIME", str(place))
    with pytest.raises(ConfigError, match="another user"):
        paths.runtime_dir()


def test_names_of_devices_become_names_of_files_on_every_system() -> None:
    assert paths.safe_file_name("gaming-pc/cuda:0") == "gaming-pc-cuda-0"
    assert paths.safe_file_name('a\\b|c"d<e>f?g*h\n..') == "a-b-c-d-e-f-g-h-.."
