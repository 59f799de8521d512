from __future__ import annotations

import os
from pathlib import Path

import pytest

from potluck.api.api_key import KeyWatch, key_file, make_key, read_key
from potluck.head import client
from potluck.head.client import auth_headers, key_for_url
from potluck.host.local_head import LocalHead
from transport.errors import ConfigError, NotRunning


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POTLUCK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_key_is_kept_until_a_new_one_is_made(home: Path) -> None:
    assert read_key() is None and auth_headers() == {}
    key = make_key()
    assert read_key() == key and auth_headers() == {"Authorization": f"Bearer {key}"}
    assert key_file().stat().st_mode & 0o777 == 0o600
    assert make_key() != key and [path.name for path in home.iterdir()] == ["api-key"]


def test_keys_have_256_bits_and_differ() -> None:
    keys = {make_key() for _ in range(20)}
    # 43 characters of 6 bits.
    assert len(keys) == 20 and {len(key) for key in keys} == {len("sk-potluck-") + 43}


def test_a_file_that_others_made_is_replaced_not_written_to(home: Path, tmp_path: Path) -> None:
    home.mkdir()
    other = tmp_path / "other"
    other.write_text("old")
    key_file().symlink_to(other)
    key = make_key()
    assert other.read_text() == "old" and not key_file().is_symlink() and read_key() == key


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"secret", b"sk-potluck-", b"\xff" * 54, b"sk-potluck-" + b"a" * 44, b"a" * 10**6]
)
def test_what_is_no_key_is_refused(content: bytes) -> None:
    make_key()
    key_file().write_bytes(content)
    with pytest.raises(ConfigError, match="holds no key") as caught:
        read_key()
    assert "potluck key --new" in caught.value.hint


@pytest.mark.skipif(os.name != "posix", reason="no modes of files")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o602, 0o666])
def test_a_file_that_is_open_to_others_is_refused(mode: int) -> None:
    make_key()
    key_file().chmod(mode)
    with pytest.raises(ConfigError, match="open to other users"):
        read_key()


def test_a_watch_takes_a_new_key_soon_and_none_that_is_gone() -> None:
    now = 100.0
    watch = KeyWatch(clock=lambda: now)
    assert not watch.is_right(b"") and not watch.is_right(b"None")
    first = make_key()
    now += 1.0
    assert watch.is_right(first.encode()) and not watch.is_right(first.encode() + b"x")
    second = make_key()
    now += 1.0
    assert watch.is_right(second.encode()) and not watch.is_right(first.encode())
    key_file().chmod(0o644)
    now += 1.0
    assert not watch.is_right(second.encode())
    key_file().chmod(0o600)
    now += 1.0
    assert watch.is_right(second.encode())
    key_file().unlink()
    now += 1.0
    assert not watch.is_right(second.encode())


def test_only_the_own_head_is_told_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    key = make_key()
    facts = LocalHead(pid=1, url="http://127.0.0.1:11500", model="m", control="c", host="h")
    monkeypatch.setattr(client, "running_head", lambda: facts)
    assert key_for_url("http://127.0.0.1:11500") == key_for_url("http://127.0.0.1:11500/v1/") == key
    for other in ("http://127.0.0.1:11501", "http://127.0.0.1:11500.evil.example", "https://api.example/v1", ""):
        assert key_for_url(other) == ""

    def none() -> LocalHead:
        raise NotRunning("none")

    monkeypatch.setattr(client, "running_head", none)
    assert key_for_url("http://127.0.0.1:11500") == ""
