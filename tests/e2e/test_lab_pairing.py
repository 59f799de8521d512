"""Three hosts with networks of their own become one pool: by invite, by code and multicast DNS, one model for all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.lab import why_not
from bench.lab.lan_pairing import PairingExperiment, lab_of_three, start_twice
from potluck.store.store import Store

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture
def experiment(data_home: Path) -> Iterator[PairingExperiment]:
    with lab_of_three(200e6, data_home) as lab:
        yield PairingExperiment(lab, Store(data_home).show("smollm2"))


def test_each_host_is_sent_its_own_layers_once(experiment: PairingExperiment) -> None:
    first, second = start_twice(experiment)
    assert len(first.text) > 10
    for host, own_bytes in first.own.items():
        assert own_bytes > 10e6
        # By what the hosts say, and by what came in at their network cards, headers and all.
        assert own_bytes <= first.fetched[host] <= 1.01 * own_bytes
        assert own_bytes < first.received[host] <= 1.06 * own_bytes
        assert second.fetched[host] == 0
        assert second.received[host] <= 0.02 * own_bytes
