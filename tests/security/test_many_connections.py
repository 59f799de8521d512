"""200 hostile connections at every port that a ring of two hosts has open, opened anew as soon as they are ended: the
short form of `make bench-hostile`."""

from __future__ import annotations

import pytest

from bench.ring.hostile import MOST_GROWTH_BYTES, LoopbackHosts, attack
from tests.support.security.capture import why_not


def test_service_goes_on_and_memory_does_not_grow(hosts: LoopbackHosts, request: pytest.FixtureRequest) -> None:
    if why_not() is None:
        request.getfixturevalue("capture").close()  # What comes now would fill the memory.
    report = attack(hosts, seconds=5.0, connections=200)
    assert report.ports >= 5  # door, control, pieces, and the edges between two hosts
    assert report.opened > 200
    assert report.growth_bytes <= MOST_GROWTH_BYTES
    assert report.during.answered > 0
    assert report.during.failed == 0
    assert report.num_joins > 0
    assert report.descriptors_back_s is not None
