"""Amounts of bytes as people write and read them."""

from __future__ import annotations


def format_bytes(num_bytes: float) -> str:
    """ "1.5 GiB", "57 MiB"."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
