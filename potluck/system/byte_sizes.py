"""Amounts of bytes as people write and read them."""

from __future__ import annotations

import re

from transport.errors import ConfigError

_AMOUNT = re.compile(r"(\d+\.?\d*|\.\d+)\s*([a-z]*)", re.ASCII)
_UNITS = {"b": 1} | {
    f"{prefix}{end}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for end, base in (("", 2**10), ("ib", 2**10), ("b", 10**3))
}
# More than any computer has; an amount still fits into 64 bits when a few are added.
_LIMIT = 2**60
AN_AMOUNT = 'an amount with a unit, such as "8GiB" or "500MB"'


def parse_bytes(text: str) -> int:
    """ "8GiB", "500 MB" or "1073741824B" in bytes. Raises ConfigError, also for a number without a unit: 8 is not meant
    to be 8 bytes."""
    amount = _AMOUNT.fullmatch(text.strip().lower())
    unit = amount[2] if amount else ""
    if amount is None or unit not in ("", *_UNITS):
        raise ConfigError(
            f"expected {AN_AMOUNT}, got {text!r}", hint="the units are B, kB, MB, GB, TB, KiB, MiB, GiB, TiB"
        )
    if not unit:
        raise ConfigError(f"expected {AN_AMOUNT}, got {text}", hint=f'did you mean "{_with_unit(amount[1])}"?')
    num_bytes = float(amount[1]) * _UNITS[unit]
    if num_bytes >= _LIMIT:
        raise ConfigError(f"expected less than 1,048,576 TiB, got {text!r}", hint=f"write {AN_AMOUNT}")
    return int(num_bytes)


def _with_unit(digits: str) -> str:
    """What a number without a unit most likely means."""
    number = float(digits)
    if number < 2**10:
        return f"{digits}GiB"
    return f"{digits}MiB" if number < 2**20 or not digits.isdigit() else exact_bytes(int(digits))


def exact_bytes(num_bytes: int) -> str:
    """As `parse_bytes` reads it again, with nothing lost: "8GiB", "404MiB", "500MB", "12345B"."""
    for unit in ("gib", "gb", "mib", "mb", "kib", "kb"):
        if num_bytes and num_bytes % _UNITS[unit] == 0:
            return f"{num_bytes // _UNITS[unit]}{unit[:-1].replace('k', 'K').upper().replace('I', 'i')}B"
    return f"{num_bytes}B"


def format_bytes(num_bytes: float) -> str:
    """ "1.5 GiB", "57 MiB"."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
