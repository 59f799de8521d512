"""As much of a head as other hosts see of one, without models. As a program: `HOME ADDRESS GUESTS-HOME`, until its
input ends."""

from __future__ import annotations

import shutil
import sys
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import zmq

from devices.pairing.identity import load_keys
from devices.pairing.known_pools import KnownPool, save_known_pool
from devices.pairing.pake import PoolInfo
from devices.pairing.roster import RosterFile
from devices.pairing.server import PairingServer
from potluck.head.pool import Pool
from potluck.host.local_host import ThisHost
from potluck.host.piece_server import HostPieceServer
from transport.links.endpoints import port_of, tcp_endpoint
from transport.messages.ring import PROTOCOL_VERSION

NAME = "alpha"


class SmallHead:
    """With `ports` those of door, control and pieces; else any."""

    def __init__(self, home: Path, address: str, *, ports: tuple[int, int, int] | None = None) -> None:
        door, control, pieces = ports or (0, 0, 0)
        keys = load_keys(home / "identity")
        self.key = keys.public
        self.protocol = PROTOCOL_VERSION
        self.roster = RosterFile(home / "roster.json", name=NAME)
        here = self.here = ThisHost(name=NAME, address=address, keys=keys)
        self._stack = ExitStack()
        run_dir = Path(tempfile.mkdtemp(prefix="plt-"))
        self._stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._stack.callback(context.destroy, 0)
        giver = self.piece_server = HostPieceServer(here, tcp_endpoint(address, pieces), self.roster.admits)
        self._stack.callback(giver.close)
        self.pool = Pool(
            context,
            run_dir,
            on_change=lambda: None,
            here=here,
            roster=self.roster,
            control=tcp_endpoint(address, control),
            pool=self.roster.read().pool,
            pieces=lambda: giver.endpoint,
        )
        self._stack.callback(self.pool.close)
        self.control_port = port_of(self.pool.control or "")
        front_door = PairingServer(
            address,
            door,
            pool_info=self._facts,
            roster=self.roster,
            keys=keys,
            approve=lambda candidate: False,
            notify=lambda line: None,
        )
        self._stack.callback(front_door.close)
        self.pairing_address = f"{address}:{front_door.port}"

    def pair(self, home: Path, name: str = "beta") -> None:
        """The host whose data lie there is a member from now on, and knows it."""
        self.roster.add(load_keys(home / "identity").public, name, "Linux x86-64")
        save_known_pool(home / "pools.json", self.known(name))

    def known(self, name: str = "beta") -> KnownPool:
        pool = self.roster.read().pool
        return KnownPool(pool=pool, key=self.key, name=NAME, my_name=name, doors=(self.pairing_address,))

    def close(self) -> None:
        self._stack.close()

    def _facts(self) -> PoolInfo:
        return PoolInfo(
            pool=self.roster.read().pool,
            name=NAME,
            key=self.key,
            protocol=self.protocol,
            potluck=version("potluck"),
            control_port=self.control_port,
        )


def main() -> None:
    home, address, guest = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    head = SmallHead(home, address, ports=(11501, 11502, 11503))
    head.pair(guest)
    print("up", flush=True)
    sys.stdin.read()
    head.close()


if __name__ == "__main__":
    main()
