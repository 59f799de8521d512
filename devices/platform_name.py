"""What kind of system a host is, in words that a user knows: "Linux x86-64", "macOS arm64", "Windows x86-64"."""

from __future__ import annotations

import platform

MAX_LENGTH = 40

_SYSTEMS = {"Darwin": "macOS"}
_PROCESSORS = {"x86_64": "x86-64", "AMD64": "x86-64", "amd64": "x86-64", "aarch64": "arm64", "ARM64": "arm64"}


def platform_name() -> str:
    """This host's, at most MAX_LENGTH printable ASCII characters: it is told to other hosts."""
    return name_of(platform.system(), platform.machine(), platform.release())


def name_of(system: str, machine: str, release: str) -> str:
    """From what Python's `platform` says. A Linux inside Windows is named, since others can't reach it as they would
    a host of its own."""
    words = f"{_SYSTEMS.get(system, system) or 'unknown'} {_PROCESSORS.get(machine, machine)}".strip()
    if system == "Linux" and "microsoft" in release.lower():
        words += " (WSL)"
    return "".join(char for char in words if char.isascii() and char.isprintable())[:MAX_LENGTH]
