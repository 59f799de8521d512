"""The head's network: who is paired, the pairing server where others come in, and what advertises it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

from devices.hardware.interfaces import lan_addresses
from devices.pairing.pake import Code, Invite
from devices.pairing.roster import RosterFile
from devices.pairing.server import PairingServer, PoolInfo
from potluck.head.approvals import Approvals
from potluck.host.local_host import PAIRING_PORT, ThisHost, is_loopback
from potluck.system.paths import roster_file
from potluck.system.settings import Settings
from transport.links.endpoints import port_or_zero, tcp_endpoint
from transport.messages.ring import PROTOCOL_VERSION

if TYPE_CHECKING:
    from devices.discovery.mdns import Advertiser

Say = Callable[[str], object]
CONTROL_PORT = PAIRING_PORT + 1
PIECES_PORT = PAIRING_PORT + 2


class Network:
    """Of a head whose host has an address. `here` is that host as the pool calls it. Bind `control_endpoint` for other
    hosts, then `open`."""

    def __init__(self, here: ThisHost, settings: Settings, *, say: Say) -> None:
        assert here.address is not None and here.keys is not None
        self._settings = settings
        self._say = say
        # At all addresses, so that the head is still there when its own one changes.
        self.bind_address = here.address if settings.lan_host is not None else "*"
        self.roster = RosterFile(roster_file(), name=here.name)
        # The owner's name for this host holds, unless the settings have another.
        self.here = here if settings.host_name is not None else replace(here, name=self.roster.read().name)
        self.approvals = Approvals(say, allow_all=settings.approve_all)
        self._pairing_server: PairingServer | None = None
        self._advertiser: Advertiser | None = None

    @property
    def pool_id(self) -> str:
        return self.roster.read().pool

    @property
    def control_endpoint(self) -> str:
        return self._endpoint(CONTROL_PORT)

    @property
    def piece_endpoint(self) -> str:
        return self._endpoint(PIECES_PORT)

    @property
    def pairing_address(self) -> str | None:
        """ "ADDRESS:PORT" of the pairing server."""
        return f"{self.here.address}:{self._pairing_server.port}" if self._pairing_server is not None else None

    def open(self, control_port: int) -> None:
        """Start the pairing server and advertise it. Raises PortInUse, ConfigError."""
        keys, address = self.here.keys, self.here.address
        assert keys is not None and address is not None

        def pool_info() -> PoolInfo:
            return PoolInfo(
                pool=self.pool_id,
                name=self.here.name,
                key=keys.public,
                protocol=PROTOCOL_VERSION,
                potluck=version("potluck"),
                control_port=control_port,
            )

        self._pairing_server = PairingServer(
            "0.0.0.0" if self.bind_address == "*" else self.bind_address,
            self._settings.lan_port,
            pool_info=pool_info,
            roster=self.roster,
            keys=keys,
            approve=self.approvals.wait_for_decision,
            notify=self._say,
        )
        if self._settings.discovery and not is_loopback(address):
            from devices.discovery.mdns import Advertiser  # Here, since zeroconf takes a while to import.

            addresses = lan_addresses if self._settings.lan_host is None else lambda: (address,)

            self._advertiser = Advertiser(self._pairing_server.port, self.pool_id, addresses=addresses)

    def invite(self) -> tuple[Invite, Code]:
        """Fresh ones; the earlier ones are void."""
        assert self._pairing_server is not None and self.here.address is not None
        return self._pairing_server.new_invite(self.here.address), self._pairing_server.new_code()

    def update_host(self, here: ThisHost) -> None:
        """This host has another address; what tells the network where it is finds that out by itself."""
        self.here = here

    def close(self) -> None:
        if self._advertiser is not None:
            self._advertiser.close()
        if self._pairing_server is not None:
            self._pairing_server.close()

    def _endpoint(self, port: int) -> str:
        """At its usual port if that is free, and the pairing server has its own usual one."""
        usual = self._settings.lan_port in (None, PAIRING_PORT)
        return tcp_endpoint(self.bind_address, port_or_zero(self.bind_address, port) if usual else 0)
