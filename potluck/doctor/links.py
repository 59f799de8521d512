"""The link to another host of the pool: how fast it is, and what that, its clock and its version mean."""

from __future__ import annotations

import zmq

from potluck.doctor.check import Check
from transport.curve import Curve, KeyPair
from transport.errors import DeadlineExceeded
from transport.pieces.speed import link_speed
from transport.pool_messages import PiecePeer

_SLOW_BYTES_PER_S = 20e6
_LOAD_BYTES = 10e9
_CLOCK_OFF_S = 60.0


def measure_link(peer: PiecePeer, keys: KeyPair, within_s: float) -> float:
    """Bytes per second from `peer` to this host. Raises NotAllowed, DeadlineExceeded, BadMessage."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    curve = Curve(context, keys)
    try:
        speed = link_speed(peer, curve, context, within_s=within_s)
    finally:
        curve.close()
        context.destroy(0)
    if not speed:
        raise DeadlineExceeded(f"nearly nothing came from {peer.name} in {within_s:.0f} s", hint="try again")
    return speed


def speed_check(name: str, bytes_per_s: float, *, is_wifi: bool) -> Check:
    """`is_wifi`: whether that host, or this one, is on Wi-Fi."""
    what = f"{bytes_per_s / 1e6:,.1f} MB/s{', over Wi-Fi' if is_wifi else ''}"
    if bytes_per_s >= _SLOW_BYTES_PER_S:
        return Check(name=name, state="ok", what=what)
    wish = "a cable is faster" if is_wifi else "is the cable, the switch or a relay between them slow?"
    return Check(
        name=name, state="warning", what=what, hint=f"10 GB of a model take {_duration(bytes_per_s)} to load; {wish}"
    )


def clock_check(name: str, off_s: float) -> Check:
    """`off_s`: how far the other host's clock is ahead of this one's."""
    way = "ahead of" if off_s > 0 else "behind"
    if abs(off_s) <= _CLOCK_OFF_S:
        return Check(name=name, state="ok", what=f"the same to {abs(off_s):.1f} s")
    return Check(
        name=name,
        state="warning",
        what=f"{abs(off_s):,.0f} s {way} this host's",
        hint="nothing breaks, but logs do not match: let both set their clocks from the network",
    )


def version_check(name: str, own: str, other: str) -> Check:
    if own == other:
        return Check(name=name, state="ok", what=f"Potluck {other}, as here")
    hint = "they understand each other; update the older one before it is too old"
    return Check(name=name, state="warning", what=f"Potluck {other}, here {own}", hint=hint)


def _duration(bytes_per_s: float) -> str:
    seconds = _LOAD_BYTES / max(bytes_per_s, 1.0)
    return f"{seconds / 60:,.0f} minutes" if seconds < 3 * 3600 else f"{seconds / 3600:,.0f} hours"
