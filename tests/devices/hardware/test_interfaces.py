from __future__ import annotations

import ipaddress

import pytest

from devices.hardware.interfaces import (
    is_internal_interface,
    lan_address,
    lan_interfaces,
    preferred_address,
    wifi_in_hardware_ports,
)

PORTS = """
Hardware Port: Ethernet Adapter (en4)
Device: en4
Ethernet Address: 00:00:00:00:00:01

Hardware Port: Wi-Fi
Device: en0
Ethernet Address: 00:00:00:00:00:02

Hardware Port: Thunderbolt Bridge
Device: bridge0
Ethernet Address: 00:00:00:00:00:03
"""


@pytest.mark.parametrize(
    "name",
    [
        "lo",
        "lo0",
        "docker0",
        "br-1a2b3c",
        "virbr0",
        "veth12ab",
        "cni0",
        "lxcbr0",
        "tun0",
        "tap1",
        "utun3",
        "wg0",
        "tailscale0",
        "ztabcdef01",
        "vboxnet0",
        "vmnet8",
        "awdl0",
        "llw0",
        "bridge100",
        "ppp0",
        "nordlynx",
        "Loopback#Pseudo-Interface#1",
        "vEthernet#(WSL)",
        "VirtualBox#Host-Only#Network",
        "Bluetooth#Network#Connection",
        "incusbr0",
        "vxlan.calico",
        "cscotun0",
        "outline-tun0",
        "gpd0",
        "wt0",
        "nebula1",
        "CloudflareWARP",
        "Cisco#AnyConnect#Virtual#Adapter",
    ],
)
def test_networks_within_the_host_and_tunnels_are_none_of_the_lan(name: str) -> None:
    assert is_internal_interface(name.replace("#", " "))


@pytest.mark.parametrize(
    "name",
    [
        "eth0",
        "en0",
        "en4",
        "bridge0",
        "enp3s0",
        "wlan0",
        "wlp2s0",
        "bond0",
        "br0",
        "Ethernet",
        "Ethernet#2",
        "Wi-Fi",
        "usb0",
    ],
)
def test_cables_and_wifi_are(name: str) -> None:
    assert not is_internal_interface(name.replace("#", " "))


def test_the_interfaces_of_this_host_are_addresses_that_others_can_use() -> None:
    for interface in lan_interfaces():
        address = ipaddress.IPv4Address(interface.address)
        assert not address.is_loopback
        assert not address.is_link_local
        assert 0 < interface.prefix <= 32


def test_the_address_towards_a_host_is_the_one_of_the_route_to_it() -> None:
    assert lan_address("127.0.0.1") == "127.0.0.1"


def test_a_tunnel_that_has_the_default_route_is_not_what_others_are_told() -> None:
    lan = ("192.168.1.20", "192.168.2.20")
    assert preferred_address("10.8.0.2", lan) == "192.168.1.20"
    assert preferred_address("192.168.2.20", lan) == "192.168.2.20"
    assert preferred_address(None, lan) == "192.168.1.20"
    assert preferred_address("10.8.0.2", ()) == "10.8.0.2"
    assert preferred_address(None, ()) is None


def test_macos_says_which_device_is_wifi() -> None:
    assert wifi_in_hardware_ports(PORTS) == {"en0"}
