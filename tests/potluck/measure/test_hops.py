"""What hops cost is measured over real links of every kind, and told in a table that adds up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from potluck.measure.hop_process import CARRIERS
from potluck.measure.hops import STEPS, HopRow, HopSeconds, main, table


def test_every_message_crosses_every_carrier_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "hops.json"
    assert main(["--no-ring", "--rounds", "1", "--trips", "2", "--pause-ms", "0", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["ring"] is None
    assert [(row["step"], row["carrier"]) for row in found["links"]] == [
        (step.name, carrier) for step in STEPS for carrier in CARRIERS
    ]
    for row in found["links"]:
        assert (row["potluck"] is None) == (row["carrier"] == "tcp")
        for part in ("raw", "potluck", "encode", "decode"):
            if row[part] is None:
                continue
            assert 0 < row[part]["p50_s"] <= row[part]["p95_s"]
    assert len(capsys.readouterr().out.splitlines()) == 3 + len(STEPS) * len(CARRIERS)


def test_the_table_splits_a_hop_into_its_parts() -> None:
    def us(value: float) -> HopSeconds:
        return HopSeconds(p50_s=value * 1e-6, p95_s=value * 2e-6)

    row = HopRow(step="decode", carrier="curve", raw=us(200), potluck=us(250), encode=us(15), decode=us(35))
    lines = table([row], {"model": "smollm2", "stages": 2, "p50_s": 240e-6, "p95_s": 300e-6}, 3.0).splitlines()
    assert lines[3].split("  ")[-1].strip() == "200"
    assert "TCP with CURVE" in lines[3]
    assert "200 / 400" in lines[3]
    assert "250 / 500" in lines[3]
    assert "240 / 300" in lines[-1]
    assert lines[2].rindex("rest") + len("rest") == len(lines[3])


@pytest.mark.parametrize("options", [["--rounds", "0"], ["--trips", "1"], ["--pause-ms", "-1"], ["--pause-ms", "nan"]])
def test_numbers_that_make_no_sense_are_refused(options: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(options)
