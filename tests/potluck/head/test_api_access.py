from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from potluck.api.access import AccessPolicy, parse_host, parse_origin, url_host
from potluck.api.api_key import key_file
from potluck.head.api_access import endpoint_access, local_url
from potluck.head.endpoint import bind_endpoint
from potluck.system.settings import Settings, parse_settings, settings_of
from transport.errors import ConfigError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POTLUCK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("host", "local_address", "is_known"),
    [
        ("192.168.1.20:11500", "192.168.1.20", True),
        ("192.168.1.20:11500", "::ffff:192.168.1.20", True),
        ("192.168.1.20", "192.168.1.20", True),
        ("192.168.1.21:11500", "192.168.1.20", False),
        ("[fd00::20]:11500", "fd00::20", True),
        ("[fd00:0::20]:11500", "fd00::20", False),
        ("fd00::20", "fd00::20", False),
        ("mymac.local:11500", "192.168.1.20", True),
        ("MyMac.local:11500", "192.168.1.20", True),
        ("mymac.local.:11500", "192.168.1.20", False),
        ("0.0.0.0:11500", "127.0.0.1", False),
        ("[::]:11500", "::1", False),
        ("localhost:11500", None, True),
        ("localhost:11501", None, False),
        ("localhost:", None, False),
        ("localhost:٣", None, False),
        ("ｌocalhost", None, False),
        ("localhost\n", None, False),
        ("", None, False),
    ],
)
def test_which_hosts_are_ours(host: str, local_address: str | None, is_known: bool) -> None:
    access = AccessPolicy(port=11500, hosts=frozenset({"localhost", "mymac.local"}))
    assert access.allows_host(host, local_address) == is_known


def test_names_and_origins_that_a_user_may_allow() -> None:
    assert [parse_host(text) for text in ("Potluck.Home", "10.0.0.1", "fd00::1", "[fd00::1]", "my_host")] == [
        "potluck.home", "10.0.0.1", "[fd00::1]", "[fd00::1]", "my_host",
    ]  # fmt: skip
    for text in ("", "*", "a b", "a:80", "a.", ".a", "a/b", "0.0.0.0", "::", "a" * 254, "ü.example", "http://a"):
        assert parse_host(text) is None, text
    assert [parse_origin(text) for text in ("http://LocalHost:3000/", "https://a.example:443", "http://[::1]:80")] == [
        "http://localhost:3000", "https://a.example", "http://[::1]",
    ]  # fmt: skip
    for text in ("*", "null", "a.example", "ftp://a", "https://a/b", "https://u@a", "https://a?b", "https://a:x", ""):
        assert parse_origin(text) is None, text
    assert url_host("fe80::1%eth0") == "[fe80::1]"


def test_this_host_alone_needs_no_key_and_has_no_network_name() -> None:
    opened = endpoint_access(Settings(), 11500)
    assert opened.access.key is None and opened.user_lines() == [] and not key_file().exists()
    assert opened.access.hosts == {"localhost", "127.0.0.1", "[::1]"}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "fd00::7"])
def test_the_network_needs_a_key_that_is_told_once(host: str) -> None:
    settings = Settings(host=host, host_name="kitchen")
    opened = endpoint_access(settings, 11500)
    assert opened.access.key is not None and opened.new_key is not None
    assert {"kitchen", "kitchen.local", "localhost"} <= opened.access.hosts
    assert any(opened.new_key in line for line in opened.user_lines())
    if host == "192.0.2.7":
        assert f"http://192.0.2.7:11500/#key={opened.new_key}" in opened.user_lines()[-1]
    again = endpoint_access(settings, 11500)
    assert again.new_key is None and not any(opened.new_key in line for line in again.user_lines())


def test_a_key_can_be_asked_for_on_this_host_too() -> None:
    opened = endpoint_access(Settings(require_key=True), 11500)
    assert opened.access.key is not None and opened.new_key is not None and opened.pages == ()


def test_programs_of_this_host_find_it_wherever_it_listens() -> None:
    assert local_url("0.0.0.0", 1) == "http://127.0.0.1:1"
    assert local_url("::", 1) == "http://[::1]:1"
    assert local_url("192.0.2.7", 1) == "http://192.0.2.7:1"


def test_settings_for_it() -> None:
    data = {"host": "0.0.0.0", "allowed_hosts": ["a.example"], "allowed_origins": ["http://localhost:3000"]}
    settings = settings_of(parse_settings(data, where="config.toml"))
    access = endpoint_access(settings, 1).access
    assert "a.example" in access.hosts and access.origins == {"http://localhost:3000"}
    for wrong in ({"host": "mymac.local"}, {"host": ""}, {"host": "fe80::1%eth0"}):
        with pytest.raises(ConfigError, match="no address"):
            parse_settings(wrong, where="config.toml")
    for bad in ({"allow_host": ("*",)}, {"allow_origin": ("*",)}):
        with pytest.raises(ConfigError, match=r"'\*' is no"):
            endpoint_access(Settings(**bad), 1)  # type: ignore[arg-type]


@pytest.fixture
def network() -> Iterator[str]:
    """A network namespace of its own, with an address that is not loopback's."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root, and ip")
    name = f"plt-http-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode:
        pytest.skip("no network namespaces here")
    try:
        for arguments in (
            ("link", "set", "lo", "up"),
            ("link", "add", "eth0", "type", "veth", "peer", "name", "eth1"),
            ("address", "add", "10.77.0.1/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "eth1", "up"),
        ):
            subprocess.run(["ip", "-n", name, *arguments], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False)


def test_on_a_network_only_the_key_opens(network: str) -> None:
    command = ["ip", "netns", "exec", network, sys.executable, "-m", "tests.support.api.lan_end"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["pages"] == ["http://10.77.0.1:PORT/"]
    assert found["statuses"] == {
        "page": 200, "health": 200, "no key": 401, "wrong key": 401, "key": 200, "key, loopback": 200,
        "no key, loopback": 401, "key, by name": 200, "key, another name": 403, "key, another address": 403,
    }  # fmt: skip
    assert found["health"] == {"status": "ready"}


def test_an_address_of_another_computer_is_not_taken_for_a_port() -> None:
    with pytest.raises(ConfigError, match=r"can't listen on 192\.0\.2\.1") as raised:
        bind_endpoint("192.0.2.1", 0)
    assert "--host" in raised.value.hint
