"""A lab's file means what it says, and what it can't mean is refused with the next step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.lab import LabError, load_spec, parse_spec
from bench.lab.spec import LinkSpec, parse_rate

TWO: list[dict[str, Any]] = [{"name": "a"}, {"name": "b"}]


def test_everything_that_can_be_said(tmp_path: Path) -> None:
    file = tmp_path / "lab.toml"
    file.write_text(
        """
        [[hosts]]
        name = "fast"
        cpu = 1.5
        memory = "2GiB"
        cpuset = "0-1"
        rate = "1gbit"
        [[hosts]]
        name = "slow-2"
        [[links]]
        between = ["fast", "slow-2"]
        rate = "100mbit"
        delay_ms = 2
        jitter_ms = 0.5
        loss = 0.01
        """
    )
    spec = load_spec(file)
    fast = spec.host("fast")
    assert (fast.cpu, fast.memory_bytes, fast.cpuset, fast.rate_bits_per_s) == (1.5, 2 * 2**30, "0-1", 1e9)
    assert spec.host("slow-2").cpu is None
    there = {"rate_bits_per_s": 1e8, "delay_s": 0.002, "jitter_s": 0.0005, "loss": 0.01}
    assert spec.links == (
        LinkSpec(source="fast", target="slow-2", **there),
        LinkSpec(source="slow-2", target="fast", **there),
    )


def test_one_way() -> None:
    spec = parse_spec({"hosts": TWO, "links": [{"from": "a", "to": "b", "delay_ms": 3}]})
    assert [(link.source, link.target) for link in spec.links] == [("a", "b")]
    assert spec.links_from("b") == ()
    assert spec.links[0].is_relayed


@pytest.mark.parametrize(("text", "bits"), [("8kbit", 8e3), ("100mbit", 1e8), ("2.5 Gbit", 2.5e9), ("10000bit", 1e4)])
def test_rates(text: str, bits: float) -> None:
    assert parse_rate(text) == bits


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, ["0 hosts"]),
        ({"hosts": TWO, "host": []}, ["'host'", "hosts, links"]),
        ({"hosts": "a"}, ["list of tables"]),
        ({"hosts": [{"name": "a", "cores": 1}]}, ["'cores'", "cpu"]),
        ({"hosts": [{"cpu": 1}]}, ["None", "name"]),
        ({"hosts": [{"name": "A_b"}]}, ["A_b"]),
        ({"hosts": [{"name": "a"}, {"name": "a"}]}, ["two hosts", "a"]),
        ({"hosts": [{"name": "a", "cpu": 0}]}, ["cpu = 0"]),
        ({"hosts": [{"name": "a", "cpu": True}]}, ["cpu = True", "number"]),
        ({"hosts": [{"name": "a", "memory": 5}]}, ["memory = 5", "text"]),
        ({"hosts": [{"name": "a", "memory": "much"}]}, ["much"]),
        ({"hosts": [{"name": "a", "cpuset": "first"}]}, ["first"]),
        ({"hosts": [{"name": "a", "rate": "fast"}]}, ["fast", "100mbit"]),
        ({"hosts": [{"name": "a", "rate": "0mbit"}]}, ["0mbit"]),
        ({"hosts": TWO, "links": [{}]}, ["between"]),
        ({"hosts": TWO, "links": [{"between": ["a", "b"], "to": "b"}]}, ["both"]),
        ({"hosts": TWO, "links": [{"between": ["a"]}]}, ["between"]),
        ({"hosts": TWO, "links": [{"between": ["a", "c"]}]}, ["'c'", "a, b"]),
        ({"hosts": TWO, "links": [{"between": ["a", "a"]}]}, ["itself"]),
        ({"hosts": TWO, "links": [{"between": ["a", "b"]}, {"from": "b", "to": "a"}]}, ["two links", "b to a"]),
        ({"hosts": TWO, "links": [{"between": ["a", "b"], "delay_ms": -1}]}, ["delay_ms = -1"]),
        ({"hosts": TWO, "links": [{"between": ["a", "b"], "delay_ms": 1, "jitter_ms": 2}]}, ["jitter_ms = 2"]),
        ({"hosts": TWO, "links": [{"between": ["a", "b"], "loss": 1}]}, ["loss = 1"]),
        ({"hosts": TWO, "links": [{"between": ["a", "b"], "latency": 1}]}, ["latency"]),
    ],
)
def test_what_can_not_be(data: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(LabError) as raised:
        parse_spec(data, where="my.toml")
    assert raised.value.message.startswith("my.toml: ")
    assert raised.value.hint
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("text", ["hosts = [", "\x00"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "broken.toml"
    file.write_text(text)
    with pytest.raises(LabError, match=r"broken\.toml"):
        load_spec(file)
    with pytest.raises(LabError, match=r"absent\.toml"):
        load_spec(tmp_path / "absent.toml")
