"""Free memory within control groups of both versions."""

from __future__ import annotations

from pathlib import Path

from devices.hardware.memory import cgroup_free_bytes, host_free_bytes


def _group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def _proc(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cgroup"
    path.write_text(text)
    return path


def test_v2_takes_the_tightest_group_and_counts_idle_cache_as_free(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    _group(root, {})
    _group(root / "user", {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "inactive_file 50\n"})
    _group(root / "user/app", {"memory.max": "max\n", "memory.current": "600\n", "memory.stat": "inactive_file 0\n"})
    assert cgroup_free_bytes(_proc(tmp_path, "0::/user/app\n"), root) == 350


def test_v1_reads_the_memory_controller_and_falls_back_to_the_root_in_a_container(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    files = {"memory.limit_in_bytes": "500", "memory.usage_in_bytes": "100", "memory.stat": "total_inactive_file 10"}
    _group(root / "memory", files)
    assert cgroup_free_bytes(_proc(tmp_path, "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n"), root) == 410


def test_no_limit_and_no_control_groups(tmp_path: Path) -> None:
    assert cgroup_free_bytes(_proc(tmp_path, "0::/\n"), tmp_path / "fs") is None
    assert cgroup_free_bytes(tmp_path / "missing", tmp_path) is None


def test_this_host_has_memory() -> None:
    assert host_free_bytes() > 2**20
