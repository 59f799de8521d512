from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from devices.pairing.identity import fingerprint
from devices.pairing.roster import MAX_NAME_CHARACTERS, RosterFile, clean_name, clean_text
from transport.errors import ConfigError
from transport.security.curve import new_key_pair

KEY, OTHER = new_key_pair().public, new_key_pair().public


@pytest.fixture
def file(tmp_path: Path) -> RosterFile:
    return RosterFile(tmp_path / "roster.json", name="head")


def test_a_pool_has_an_id_of_its_own_from_the_first_look_on(tmp_path: Path) -> None:
    one = RosterFile(tmp_path / "one" / "roster.json", name="my mac").read()
    other = RosterFile(tmp_path / "other" / "roster.json").read()
    assert len(one.pool) == 32
    assert one.pool != other.pool
    assert one.name == "my-mac"
    assert RosterFile(tmp_path / "one" / "roster.json").read() == one
    assert (tmp_path / "one" / "roster.json").stat().st_mode & 0o077 == 0


def test_only_members_are_admitted_and_a_restart_keeps_them(file: RosterFile) -> None:
    assert not file.admits(KEY)
    member = file.add(KEY, "mac", "macOS arm64")
    assert file.admits(KEY)
    assert not file.admits(OTHER)
    again = RosterFile(file.path)
    assert again.admits(KEY)
    assert again.member(KEY) == member == again.find("mac")
    assert again.name_of(KEY) == "mac"
    assert again.keys() == (KEY,)


def test_names_are_unique_among_all_who_ever_paired_and_the_head(file: RosterFile) -> None:
    names = [file.add(new_key_pair().public, name, "Linux").name for name in ("mac", "mac", "mac", "head")]
    assert names == ["mac", "mac-2", "mac-3", "head-2"]


def test_who_pairs_again_keeps_its_name(file: RosterFile) -> None:
    file.add(KEY, "mac", "macOS")
    file.rename("mac", "kitchen")
    assert file.add(KEY, "mac", "macOS").name == "kitchen"
    assert len(file.read().members) == 1


def test_a_revoked_key_is_out_and_counts_anew_when_it_pairs_again(file: RosterFile) -> None:
    file.add(KEY, "mac", "macOS")
    revoked = file.revoke("mac")
    assert revoked.is_revoked
    assert not file.admits(KEY)
    assert file.member(KEY) is None
    assert file.name_of(KEY) is None
    assert file.keys() == ()
    assert file.find("mac").is_revoked
    with pytest.raises(ConfigError, match="revoked already"):
        file.revoke("mac")
    file.add(KEY, "mac", "macOS")
    assert file.admits(KEY)
    assert file.find("mac").revoked_at is None


def test_what_another_process_changes_is_known_a_tenth_of_a_second_later_and_not_looked_at_more_often(
    file: RosterFile,
) -> None:
    now = [0.0]
    head = RosterFile(file.path, monotonic=lambda: now[0])
    head.read()
    file.add(KEY, "mac", "macOS")
    now[0] = 0.09
    assert not head.admits(KEY)
    now[0] = 0.11
    assert head.admits(KEY)
    file.revoke("mac")
    now[0] = 0.2
    assert head.admits(KEY)
    now[0] = 0.22
    assert not head.admits(KEY)


def test_a_member_is_found_by_its_fingerprint(file: RosterFile) -> None:
    file.add(KEY, "mac", "macOS")
    file.add(OTHER, "pc", "Windows")
    assert file.find(fingerprint(OTHER)).name == "pc"
    assert file.find(fingerprint(OTHER).upper()[:12]).name == "pc"
    with pytest.raises(ConfigError, match="no device") as raised:
        file.find("lamp")
    assert "mac, pc" in raised.value.hint
    with pytest.raises(ConfigError, match="no device"):
        file.find(fingerprint(OTHER)[:2])


def test_a_name_that_is_taken_or_none_is_refused(file: RosterFile) -> None:
    file.add(KEY, "mac", "macOS")
    for wrong in ("head", "mac", "", "a/b", "\x1b[31m", "x" * 41):
        with pytest.raises(ConfigError):
            file.rename("mac", wrong)
    file.rename("head", "den")
    assert file.read().name == "den"


def test_a_newer_version_is_refused_and_nothing_is_lost(file: RosterFile) -> None:
    file.path.write_text('{"version": 2, "people": ["all"]}')
    before = file.path.read_bytes()
    for change in (file.read, lambda: file.add(KEY, "mac", "macOS"), lambda: file.revoke("mac")):
        with pytest.raises(ConfigError, match="newer Potluck"):
            change()
    assert not file.admits(KEY)
    assert file.path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 1}', b"\xff\xff"])
def test_nobody_is_admitted_while_the_file_is_broken(file: RosterFile, content: bytes) -> None:
    file.add(KEY, "mac", "macOS")
    good = file.path.read_bytes()
    head = RosterFile(file.path, monotonic=iter(range(100)).__next__)
    assert head.admits(KEY)
    file.path.write_bytes(content)
    assert not head.admits(KEY)
    assert head.name_of(KEY) is None
    assert head.keys() == ()
    with pytest.raises(ConfigError, match=r"roster\.json"):
        head.read()
    with pytest.raises(ConfigError):
        head.add(OTHER, "pc", "Linux")
    assert file.path.read_bytes() == content
    file.path.write_bytes(good)
    assert head.admits(KEY)


def test_a_file_that_vanishes_while_it_is_looked_at_admits_nobody_and_raises_nothing(
    file: RosterFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanish() -> tuple[int, int, int]:
        raise FileNotFoundError(file.path)

    monkeypatch.setattr(file, "_stamp", vanish)
    assert not file.admits(KEY)


def test_who_asks_does_not_wait_for_another_process_that_holds_the_file(file: RosterFile) -> None:
    """A head that is held up so long is silent, and loses its workers."""
    file.add(KEY, "mac", "macOS")
    with FileLock(file.path.with_suffix(".lock")):
        writer = threading.Thread(target=file.add, args=(OTHER, "pc", "Linux"))
        writer.start()
        time.sleep(0.2)  # It waits now, and the file is to be looked at anew.
        started = time.monotonic()
        assert file.admits(KEY)
        assert time.monotonic() - started < 60.0
        assert not file.admits(OTHER)
    writer.join(10.0)
    assert file.admits(OTHER)


def test_many_writers_lose_nobody_while_others_read(file: RosterFile) -> None:
    keys = [new_key_pair().public for _ in range(24)]
    done = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        reader = RosterFile(file.path, monotonic=iter(range(10**9)).__next__)
        while not done.is_set():
            try:
                reader.read()
            except ConfigError as error:
                failures.append(error)

    watcher = threading.Thread(target=read, daemon=True)
    watcher.start()
    with ThreadPoolExecutor(4) as pool:
        added = [pool.submit(RosterFile(file.path).add, key, "mac", "macOS") for key in keys]
    done.set()
    watcher.join(10.0)
    assert len([future.result() for future in added]) == len(keys)
    assert not failures
    roster = RosterFile(file.path).read()
    assert {member.key for member in roster.members} == set(keys)
    assert len({member.name for member in roster.members}) == 24


@given(st.text())
def test_whatever_a_host_calls_itself_becomes_a_name_of_one_line(text: str) -> None:
    name = clean_name(text)
    assert 1 <= len(name) <= MAX_NAME_CHARACTERS
    assert name == clean_name(name)
    assert name.isprintable()
    assert not set(name) & set(" /\\[]\"'")
    assert clean_text(text).isprintable()


def test_the_file_is_readable_by_people_and_versioned(file: RosterFile) -> None:
    file.add(KEY, "mac", "macOS")
    assert msgspec.json.decode(file.path.read_bytes())["version"] == 1
    assert file.path.read_text().count("\n") > 5
