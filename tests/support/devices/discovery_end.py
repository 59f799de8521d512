"""One host of a lab: `advertise POOL PORT`, until its input ends; `find SECONDS [FINGERPRINT]`; `addresses`."""

from __future__ import annotations

import json
import sys

import msgspec

from devices.discovery.mdns import AdvertisedPool, Advertiser, browse_pools
from devices.hardware.interfaces import lan_address, lan_addresses, lan_interfaces


def main() -> None:
    match sys.argv[1:]:
        case ["advertise", pool, port]:
            advertiser = Advertiser(int(port), pool)
            sys.stdin.read()
            advertiser.close()
        case ["find", seconds, *fingerprints]:
            found: list[AdvertisedPool] = browse_pools(float(seconds), *fingerprints)
            print(json.dumps([msgspec.to_builtins(pool) for pool in found]))
        case ["addresses"]:
            names = [interface.name for interface in lan_interfaces()]
            print(json.dumps({"names": names, "addresses": lan_addresses(), "chosen": lan_address()}))


if __name__ == "__main__":
    main()
