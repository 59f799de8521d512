"""All that `potluck doctor` looks at, side by side, with an end however much of it hangs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

from devices.interfaces import LanInterface, lan_interfaces
from devices.known_pools import load_known_pools
from potluck.config import Settings
from potluck.doctor.alone import alone_checks
from potluck.doctor.check import Check, failed
from potluck.doctor.firewall import active_firewalls, how_to_open
from potluck.doctor.guest_side import guest_checks
from potluck.doctor.head_side import head_checks
from potluck.doctor.later import Later
from potluck.doctor.multicast import multicast_problem
from potluck.doctor.own_host import gather_host, host_checks, lan_of, listening_ports, multicast_check
from potluck.head_file import HeadFacts, running_head
from potluck.paths import known_pools_file
from transport.errors import NotRunning, PotluckError

WITHIN_S = 19.0
_FIREWALL_S = 5.5
_MULTICAST_S = 3.0


def examine(settings: Settings, *, within_s: float = WITHIN_S) -> list[Check]:
    """Ends in that time; what has not ended then is a problem of its own. Raises ConfigError if Potluck's own folders
    can't be used."""
    deadline = time.monotonic() + within_s
    try:
        head: HeadFacts | NotRunning = running_head()
    except NotRunning as error:
        head = error
    firewalls = Later("the firewall", active_firewalls)
    parts = [Part("this host", _own_host(settings, head))]
    if settings.discovery:
        parts.append(Part("multicast", _multicast()))
    parts.append(Part("pool", _pool(settings, head, firewalls)))
    return [check for part in parts for check in part.checks(deadline)]


class Part:
    """Checks that follow from one another, in a thread of their own."""

    def __init__(self, name: str, checks: Iterator[Check]) -> None:
        self._name = name
        self._checks = checks
        self._found: list[Check] = []
        self._later: Later[None] = Later(name, self._run)

    def checks(self, deadline: float) -> list[Check]:
        """Those that there are then, and what has kept the rest away."""
        try:
            self._later.wait(deadline - time.monotonic())
        except PotluckError as error:
            return [*self._found, failed(self._name, error)]
        except OSError as error:
            return [*self._found, Check(name=self._name, state="problem", what=error.strerror or str(error))]
        return list(self._found)

    def _run(self) -> None:
        for check in self._checks:
            self._found.append(check)


def _own_host(settings: Settings, head: HeadFacts | NotRunning) -> Iterator[Check]:
    facts = gather_host(listening_ports(head.pid) if isinstance(head, HeadFacts) else ())
    yield from host_checks(facts, is_lan_wanted=settings.lan)


def _multicast() -> Iterator[Check]:
    interfaces = lan_interfaces()
    later = [Later(one.name, partial(multicast_problem, one.address)) for one in interfaces]
    if interfaces:
        yield multicast_check([(one, tried.wait(_MULTICAST_S)) for one, tried in zip(interfaces, later, strict=True)])


def _pool(settings: Settings, head: HeadFacts | NotRunning, firewalls: Later[tuple[str, ...]]) -> Iterator[Check]:
    firewall = _opening(firewalls, lan_interfaces())
    if isinstance(head, HeadFacts):
        yield from head_checks(head, firewall=firewall)
        return
    pools = load_known_pools(known_pools_file())
    if pools:
        yield from guest_checks(pools[0], settings, firewall=firewall)
    else:
        yield from alone_checks(settings, head)


def _opening(firewalls: Later[tuple[str, ...]], interfaces: Sequence[LanInterface]) -> str:
    try:
        active = firewalls.wait(_FIREWALL_S)
    except PotluckError:
        active = ()
    return how_to_open(active, lan_of(interfaces))
