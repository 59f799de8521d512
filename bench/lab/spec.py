"""A lab's spec is a TOML file of hosts and the links between them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potluck.system.byte_sizes import parse_bytes
from transport.errors import ConfigError, PotluckError


class LabError(PotluckError):
    """A lab that can't be as it was described, or a machine that can't have one."""

    code = "lab"


_HOST_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,15}")
_CPUSET = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]?)bit", re.IGNORECASE)
_RATE_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
_MAX_HOSTS = 200
_LEAST_RATE_BITS_PER_S = 8e3


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSpec:
    """None is no limit. `cpu` is in cores; `rate_bits_per_s` is that of its network card, each way."""

    name: str
    cpu: float | None = None
    memory_bytes: int | None = None
    cpuset: str | None = None
    rate_bits_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """One direction from a host to another. `loss` is the share of packets."""

    source: str
    target: str
    rate_bits_per_s: float | None = None
    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0

    @property
    def is_relayed(self) -> bool:
        """Whether packets go through the relay, which delays and drops them."""
        return self.delay_s > 0 or self.loss > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LabSpec:
    """Pairs without a link are connected without limits. At most one link for each ordered pair."""

    hosts: tuple[HostSpec, ...]
    links: tuple[LinkSpec, ...] = field(default=())

    def host(self, name: str) -> HostSpec:
        """Raises LabError."""
        for host in self.hosts:
            if host.name == name:
                return host
        names = ", ".join(host.name for host in self.hosts)
        raise LabError(f"the lab has no host {name!r}", hint=f"its hosts are: {names}")

    def links_from(self, name: str) -> tuple[LinkSpec, ...]:
        return tuple(link for link in self.links if link.source == name)


def load_spec(path: Path) -> LabSpec:
    """Raises LabError with the file's name."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise LabError(f"{path} can't be read: {error}", hint="it must be a TOML file") from error
    return parse_spec(data, where=str(path))


def parse_spec(data: Mapping[str, Any], *, where: str = "the lab") -> LabSpec:
    """Raises LabError for an unknown key, a wrong type or a value that can't work."""
    try:
        _known(data, ("hosts", "links"), "the file")
        hosts = tuple(_host(entry) for entry in _tables(data, "hosts"))
        links = tuple(link for entry in _tables(data, "links") for link in _links(entry))
        _check(hosts, links)
    except (LabError, ConfigError) as error:
        raise LabError(f"{where}: {error.message}", hint=error.hint) from error
    return LabSpec(hosts=hosts, links=links)


def parse_rate(text: str) -> float:
    """ "100mbit" in bits per second. Raises LabError."""
    match = _RATE.fullmatch(text.strip())
    rate = float(match[1]) * _RATE_UNITS[match[2].lower()] if match else 0.0
    if rate < _LEAST_RATE_BITS_PER_S:
        raise LabError(f"{text!r} is not a rate", hint='write it as "100mbit", "1gbit" or "500kbit"; at least 8kbit')
    return rate


def _host(entry: Mapping[str, Any]) -> HostSpec:
    _known(entry, ("name", "cpu", "memory", "cpuset", "rate"), "a host")
    name = _text(entry, "name")
    if name is None or not _HOST_NAME.fullmatch(name):
        raise LabError(f"{name!r} is no name for a host", hint="1 to 16 of a–z, 0–9 and -, beginning without -")
    cpu, memory, cpuset, rate = _number(entry, "cpu"), _text(entry, "memory"), _text(entry, "cpuset"), entry.get("rate")
    if cpu is not None and not 0.01 <= cpu <= 1024:
        raise LabError(f"host {name}: cpu = {cpu}", hint="cores, such as 0.5; at least 0.01")
    if cpuset is not None and not _CPUSET.fullmatch(cpuset):
        raise LabError(f"host {name}: cpuset = {cpuset!r}", hint='cores, such as "0" or "0-1"')
    return HostSpec(
        name=name,
        cpu=cpu,
        memory_bytes=parse_bytes(memory) if memory is not None else None,
        cpuset=cpuset,
        rate_bits_per_s=parse_rate(str(rate)) if rate is not None else None,
    )


def _links(entry: Mapping[str, Any]) -> list[LinkSpec]:
    _known(entry, ("between", "from", "to", "rate", "delay_ms", "jitter_ms", "loss"), "a link")
    between, source, target = entry.get("between"), _text(entry, "from"), _text(entry, "to")
    if between is not None and (source or target):
        raise LabError("a link with both between and from or to", hint='write between = ["a", "b"] for both ways')
    if between is not None:
        if not isinstance(between, list) or len(between) != 2 or not all(isinstance(name, str) for name in between):
            raise LabError(f"between = {between!r}", hint='write between = ["a", "b"]')
        pairs = [(between[0], between[1]), (between[1], between[0])]
    elif source and target:
        pairs = [(source, target)]
    else:
        raise LabError("a link that does not say between which hosts", hint='write between = ["a", "b"]')
    rate, loss = entry.get("rate"), _number(entry, "loss") or 0.0
    delay_ms, jitter_ms = _number(entry, "delay_ms") or 0.0, _number(entry, "jitter_ms") or 0.0
    if not 0 <= jitter_ms <= delay_ms <= 10_000:
        raise LabError(f"delay_ms = {delay_ms:g}, jitter_ms = {jitter_ms:g}", hint="0 ≤ jitter_ms ≤ delay_ms ≤ 10000")
    if not 0 <= loss < 1:
        raise LabError(f"loss = {loss:g}", hint="a share of packets, such as 0.01")
    return [
        LinkSpec(
            source=a,
            target=b,
            rate_bits_per_s=parse_rate(str(rate)) if rate is not None else None,
            delay_s=delay_ms / 1e3,
            jitter_s=jitter_ms / 1e3,
            loss=loss,
        )
        for a, b in pairs
    ]


def _check(hosts: tuple[HostSpec, ...], links: tuple[LinkSpec, ...]) -> None:
    names = [host.name for host in hosts]
    if not names or len(names) > _MAX_HOSTS:
        raise LabError(f"{len(names)} hosts", hint=f"1 to {_MAX_HOSTS} [[hosts]]")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise LabError(f"two hosts are called {twice}", hint="names tell them apart")
    pairs = [(link.source, link.target) for link in links]
    for source, target in pairs:
        for name in (source, target):
            if name not in names:
                raise LabError(f"a link of {name!r}, which is no host", hint=f"the hosts are: {', '.join(names)}")
        if source == target:
            raise LabError(f"a link from {source} to itself", hint="leave it out")
        if pairs.count((source, target)) > 1:
            raise LabError(f"two links from {source} to {target}", hint="write one")


def _tables(data: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = data.get(key, [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise LabError(f"{key} is not a list of tables", hint=f"write [[{key}]] before each")
    return found


def _known(entry: Mapping[str, Any], keys: tuple[str, ...], what: str) -> None:
    unknown = sorted(set(entry) - set(keys))
    if unknown:
        raise LabError(f"{what} has the unknown key {unknown[0]!r}", hint=f"the keys are: {', '.join(keys)}")


def _text(entry: Mapping[str, Any], key: str) -> str | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise LabError(f"{key} = {value!r} has the wrong type", hint="it must be a text")
    return value


def _number(entry: Mapping[str, Any], key: str) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LabError(f"{key} = {value!r} has the wrong type", hint="it must be a number")
    return float(value)
