"""A host's keys in a folder that only its user reads, and how hosts call their systems."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from devices.pairing.identity import MAX_PLATFORM_CHARACTERS, fingerprint, format_platform, load_keys, platform_name
from transport.errors import ConfigError
from transport.security.curve import KEY_FILE, KeyPair, new_key_pair, write_keys


@pytest.mark.parametrize(
    ("said", "name"),
    [
        (("Linux", "x86_64", "6.1.0-13-amd64"), "Linux x86-64"),
        (("Linux", "aarch64", "6.6.20+rpt-rpi-v8"), "Linux arm64"),
        (("Linux", "x86_64", "5.15.153.1-microsoft-standard-WSL2"), "Linux x86-64 (WSL)"),
        (("Darwin", "arm64", "24.1.0"), "macOS arm64"),
        (("Windows", "AMD64", "11"), "Windows x86-64"),
        (("Windows", "ARM64", "11"), "Windows arm64"),
        (("FreeBSD", "amd64", "14.1"), "FreeBSD x86-64"),
        (("", "", ""), "unknown"),
    ],
)
def test_systems_have_the_names_that_users_know(said: tuple[str, str, str], name: str) -> None:
    assert format_platform(*said) == name


def test_a_name_is_short_and_printable_whatever_the_system_says() -> None:
    name = format_platform("Li\nnux\x1b[31m", "é" * 10 + "m" * 100, "")
    assert name.isprintable() and name.isascii() and len(name) <= MAX_PLATFORM_CHARACTERS
    assert 0 < len(platform_name()) <= MAX_PLATFORM_CHARACTERS


def test_keys_are_made_once_for_this_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "home" / "identity"
    keys = load_keys(folder)
    assert load_keys(folder) == keys
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert keys.secret not in repr(keys)


def test_processes_that_start_together_have_the_same_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_slowly(path: Path, keys: KeyPair) -> None:
        time.sleep(0.05)
        write_keys(path, keys)

    monkeypatch.setattr("devices.pairing.identity.write_keys", write_slowly)
    with ThreadPoolExecutor(8) as pool:
        assert len({keys.public for keys in pool.map(load_keys, [tmp_path / "identity"] * 8)}) == 1


def test_what_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    keys = load_keys(tmp_path)
    tmp_path.chmod(0o755)
    (tmp_path / KEY_FILE).chmod(0o644)
    assert load_keys(tmp_path) == keys
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o077 == 0
    assert tmp_path.stat().st_mode & 0o077 == 0


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can give a file to someone else")
def test_a_file_of_someone_else_is_refused(tmp_path: Path) -> None:
    load_keys(tmp_path)
    os.chown(tmp_path / KEY_FILE, 12345, 12345)
    with pytest.raises(ConfigError, match="another user"):
        load_keys(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"public": "short", "secret": "short"}'])
def test_a_broken_file_is_named_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    (tmp_path / KEY_FILE).write_bytes(content)
    with pytest.raises(ConfigError, match=KEY_FILE) as raised:
        load_keys(tmp_path)
    assert raised.value.hint
    assert (tmp_path / KEY_FILE).read_bytes() == content


def test_two_halves_of_different_pairs_are_refused(tmp_path: Path) -> None:
    mixed = {"public": new_key_pair().public, "secret": new_key_pair().secret}
    (tmp_path / KEY_FILE).write_bytes(msgspec.json.encode(mixed))
    with pytest.raises(ConfigError, match="do not belong together"):
        load_keys(tmp_path)


def test_a_fingerprint_is_short_and_of_one_key() -> None:
    one, other = new_key_pair().public, new_key_pair().public
    assert fingerprint(one) == fingerprint(one) != fingerprint(other)
    assert len(fingerprint(one)) == 19
    assert set(fingerprint(one)) <= set("0123456789abcdef-")


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / KEY_FILE
    write_keys(path, new_key_pair())
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_keys(path, new_key_pair())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ConfigError, match="No space"):
        load_keys(tmp_path / "new")


def no_space(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
