"""Two hosts on loopback addresses that have paired already, as their files say."""

from __future__ import annotations

import shutil

from devices.pairing.identity import load_keys
from devices.pairing.known_pools import KnownPool, save_known_pool
from devices.pairing.roster import RosterFile
from tests.support.e2e.lan_hosts import join, up
from tests.support.e2e.potluck_process import Home, Running
from transport.links.endpoints import free_port

HEAD, BETA = "127.0.0.1", "127.0.0.2"


class Pair:
    """The homes of a head, alpha, and of beta, which it has paired with."""

    def __init__(self, alpha: Home, beta: Home) -> None:
        self.alpha, self.beta = alpha, beta
        self.port = free_port(HEAD)
        self.roster = RosterFile(self.alpha.data / "roster.json", name="alpha")
        key = load_keys(self.alpha.data / "identity").public
        self.roster.add(load_keys(self.beta.data / "identity").public, "beta", "Linux x86-64")
        pool = self.roster.read().pool
        door = f"{HEAD}:{self.port}"
        known = KnownPool(pool=pool, key=key, name="alpha", my_name="beta", doors=(door,))
        save_known_pool(self.beta.data / "pools.json", known)

    def up(self, *extra: str) -> Running:
        return up(self.alpha, "alpha", HEAD, *extra, port=self.port)

    def join(self) -> Running:
        return join(self.beta, "beta", BETA)

    def clean(self) -> None:
        for home in (self.alpha, self.beta):
            for process in home.processes():
                process.kill()
            shutil.rmtree(home.data.parent, ignore_errors=True)
