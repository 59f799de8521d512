"""The bench of pieces between hosts, in short: what is sent does not depend on how fast the machine is."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from bench.lab import Lab, parse_spec, why_not
from bench.ring.transfer import RandomModel, TransferBench, load_round, shared_round


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_three_hosts_get_their_stages_once_and_two_get_half_from_each_other(tmp_path: Path) -> None:
    hosts = [{"name": "head", "rate": "200mbit"}, *({"name": name} for name in ("one", "two", "three"))]
    (tmp_path / "model").mkdir()
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(parse_spec({"hosts": hosts}), store=tmp_path))
        bench = TransferBench(stack, lab, RandomModel(tmp_path / "model", [6 * 2**20] * 3), tmp_path / "stores")
        found = load_round(bench, 25e6) | shared_round(bench)
    assert found["sent ratio"] == 1.0
    assert found["second run bytes"] == 0
    # A head that has been idle for two seconds, as on a busy machine, takes some of what is left to the other host.
    assert 1.0 <= found["shared head ratio"] < 1.5
    for host in ("one", "two"):
        assert found[f"shared: to {host} from head MB"] < 0.75 * 12 * 2**20 / 1e6
