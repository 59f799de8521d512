"""A check says what was found and what to do; here also those of a link, a clock and a version."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import zmq

from transport.errors import DeadlineExceeded, PotluckError
from transport.messages.pool import PiecePeer
from transport.pieces.client import measure_link_speed
from transport.security.curve import Curve, KeyPair

State = Literal["ok", "warning", "problem"]
_BY_SEVERITY: tuple[State, ...] = ("ok", "warning", "problem")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """`what` was found out about `name`; `hint` says what to do next, if there is something to do."""

    name: str
    state: State
    what: str
    hint: str = ""


def worst_state(checks: Iterable[Check]) -> State:
    return max((check.state for check in checks), key=_BY_SEVERITY.index, default="ok")


def failed_check(name: str, error: PotluckError, *, state: State = "problem") -> Check:
    return Check(name=name, state=state, what=error.message, hint=error.hint)


_SLOW_BYTES_PER_S = 20e6
_LOAD_BYTES = 10e9
_CLOCK_OFF_S = 60.0


def measure_link(peer: PiecePeer, keys: KeyPair, within_s: float) -> float:
    """Bytes per second from `peer` to this host. Raises NotAllowed, DeadlineExceeded, BadMessage."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    curve = Curve(context, keys)
    try:
        speed = measure_link_speed(peer, curve, context, within_s=within_s)
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
