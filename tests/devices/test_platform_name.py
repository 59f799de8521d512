"""How hosts call their systems."""

from __future__ import annotations

import pytest

from devices.pairing.identity import MAX_PLATFORM_CHARACTERS, format_platform, platform_name


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
