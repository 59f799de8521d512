"""A host without a head that has joined nothing yet: which pools are near, and how to begin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from potluck.config import Settings
from potluck.doctor.check import Check, failed
from potluck.doctor.search import discover
from transport.errors import PotluckError

if TYPE_CHECKING:
    from devices.discovery import FoundPool

_BEGIN = "serve a model with potluck up MODEL; or join another host's pool: potluck invite there, potluck join here"


def alone_checks(settings: Settings, why: PotluckError) -> Iterator[Check]:
    """`why` there is no head."""
    yield Check(name="head", state="ok", what=f"{why.message}, and this host has joined no pool", hint=_BEGIN)
    if not settings.discovery:
        return
    try:
        found = discover(None)
    except PotluckError as error:
        yield failed("pools", error, state="warning")
        return
    yield pools_check(found)


def pools_check(found: Sequence[FoundPool]) -> Check:
    """What discovery saw; anyone may have said it."""
    if not found:
        hint = "a head on this network is not seen? Join with potluck join --head HOST:PORT, as it prints it"
        return Check(name="pools", state="ok", what="none is seen on this network", hint=hint)
    words = ", ".join(f"pool {pool.fingerprint} at {pool.addresses[0]}:{pool.port}" for pool in found)
    door = f"{found[0].addresses[0]}:{found[0].port}"
    hint = f"join one with the code that potluck invite shows there: potluck join --head {door} --code CODE"
    return Check(name="pools", state="ok", what=words, hint=hint)
