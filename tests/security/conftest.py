"""One pool of two hosts, and all that has crossed the wire since before it was started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.ring.hostile import LoopbackHosts, loopback_hosts
from tests.support.security.capture import Capture, why_not


@pytest.fixture(scope="package")
def capture() -> Iterator[Capture]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    capture = Capture()
    yield capture
    capture.close()


@pytest.fixture(scope="package")
def hosts(smollm2_path: Path, request: pytest.FixtureRequest) -> Iterator[LoopbackHosts]:
    if why_not() is None:
        request.getfixturevalue("capture")
    with loopback_hosts("smollm2", smollm2_path.parents[1]) as hosts:
        yield hosts
