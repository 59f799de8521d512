"""What hops cost, for people."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from bench.hop_ends import Carrier

_CARRIERS: dict[Carrier, str] = {"ipc": "ipc", "tcp": "TCP loopback", "curve": "TCP with CURVE"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Of many times the same."""

    p50_s: float
    p95_s: float

    @classmethod
    def of(cls, found: Sequence[float]) -> Self:
        return cls(p50_s=statistics.median(found), p95_s=statistics.quantiles(found, n=20, method="inclusive")[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class HopRow:
    """One message over one carrier. `encode` and `decode` are parts of `potluck`, measured apart after such pauses;
    `potluck` is None over TCP without encryption, where Potluck never sends."""

    step: str
    carrier: Carrier
    raw: Seconds
    potluck: Seconds | None
    encode: Seconds
    decode: Seconds


def table(rows: Sequence[HopRow], ring: dict[str, Any] | None, pause_ms: float) -> str:
    """Microseconds, a line a row; "rest" is what Potluck's hop has beside its two parts."""
    lines = [
        f"A hop on this machine, {pause_ms:g} ms of computing before each message; p50 and p95 in µs",
        "",
        f"{'message':<20} {'carrier':<15} {'ZeroMQ alone':>14} {'Potluck':>14}   "
        f"{'encode':>7} {'decode+check':>13} {'rest':>6}",
    ]
    for row in rows:
        start = f"{row.step:<20} {_CARRIERS[row.carrier]:<15} {_both(row.raw):>14}"
        if row.potluck is None:
            lines.append(f"{start} {'–':>14}")
            continue
        rest_s = row.potluck.p50_s - row.encode.p50_s - row.decode.p50_s
        lines.append(
            f"{start} {_both(row.potluck):>14}   "
            f"{row.encode.p50_s * 1e6:>7.0f} {row.decode.p50_s * 1e6:>13.0f} {rest_s * 1e6:>6.0f}"
        )
    if ring is not None:
        hop = Seconds(p50_s=ring["p50_s"], p95_s=ring["p95_s"])
        lines += ["", f"A ring of {ring['stages']} stages of {ring['model']}, one chat, over ipc: {_both(hop)} a hop"]
    return "\n".join(lines)


def _both(seconds: Seconds) -> str:
    return f"{seconds.p50_s * 1e6:.0f} / {seconds.p95_s * 1e6:.0f}"
