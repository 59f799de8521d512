"""Limits go into the files that the kernel's two versions of control groups have for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.lab import HostSpec, LabError
from bench.lab.groups import cpu_quota_us, hierarchy, make_groups

HOST = HostSpec(name="a", cpu=0.5, memory_bytes=2**30, cpuset="0")


def test_version_2(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory cpuset")
    (group,) = make_groups(hierarchy(tmp_path), "plab1", HOST)
    assert group == tmp_path / "plab1" / "a"
    assert (group / "cpu.max").read_text() == "2500 5000"
    assert (group / "memory.max").read_text() == str(2**30)
    assert (group / "cpuset.cpus").read_text() == "0"
    assert (tmp_path / "cgroup.subtree_control").read_text()
    assert (tmp_path / "plab1" / "cgroup.subtree_control").read_text()


def test_version_1(tmp_path: Path) -> None:
    for controller in ("cpu", "memory", "cpuset"):
        (tmp_path / controller).mkdir()
    for name in ("mems", "cpus"):
        (tmp_path / "cpuset" / f"cpuset.{name}").write_text("0\n")
    cpu, memory, cpuset = make_groups(hierarchy(tmp_path), "plab1", HOST)
    assert (cpu / "cpu.cfs_period_us").read_text() == "5000"
    assert (cpu / "cpu.cfs_quota_us").read_text() == "2500"
    assert (memory / "memory.limit_in_bytes").read_text() == str(2**30)
    assert (cpuset / "cpuset.cpus").read_text() == "0"
    assert (cpuset / "cpuset.mems").read_text() == "0"


def test_a_host_without_limits_still_has_groups(tmp_path: Path) -> None:
    for controller in ("cpu", "memory", "cpuset"):
        (tmp_path / controller).mkdir()
    groups = make_groups(hierarchy(tmp_path), "plab1", HostSpec(name="a"))
    assert groups == [tmp_path / "cpu/plab1/a", tmp_path / "memory/plab1/a"]
    assert not any(list(group.iterdir()) for group in groups)


def test_no_control_groups(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="no control groups"):
        hierarchy(tmp_path)


@pytest.mark.parametrize(("cpu", "expected"), [(1.0, (5000, 5000)), (0.25, (1250, 5000)), (0.1, (1000, 10000))])
def test_quotas_are_no_shorter_than_the_kernel_takes(cpu: float, expected: tuple[int, int]) -> None:
    assert cpu_quota_us(cpu) == expected
