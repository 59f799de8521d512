"""What is kept is found again under the same facts only; a damaged file is as good as none."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
from msgspec import structs

from potluck.head.plan_watch import LearnedFactor
from potluck.head.profiling.cache import DeviceKey, ProfileCache, model_identity
from tests.support.head.profiles import model, report
from transport.links.link_probe import LinkMeasurement

KEY = DeviceKey(
    host="here", backend="torch", kind="cpu", threads=1, dtype="bfloat16", machine="m", model="x", weights="stored"
)
LINK = LinkMeasurement(hop_s=0.001, hop_p95_s=0.002, bytes_per_s=1e8)


def test_a_report_is_found_under_its_facts_only(tmp_path: Path) -> None:
    cache = ProfileCache(tmp_path / "profiles")
    assert cache.report(KEY) is None
    cache.save_report(KEY, report())
    assert ProfileCache(tmp_path / "profiles").report(KEY) == report()
    for one in fields(KEY):
        value = getattr(KEY, one.name)
        other = replace(KEY, **{one.name: value + 1 if isinstance(value, int) else value + "'"})
        assert cache.report(other) is None


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"facts": 1}', b"\xff\xfe", b'{"facts": {}, "found": {}}'])
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, damage: bytes) -> None:
    cache = ProfileCache(tmp_path)
    cache.save_report(KEY, report())
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage)
    assert cache.report(KEY) is None
    cache.save_report(KEY, report())
    assert cache.report(KEY) == report()


def test_impossible_numbers_in_a_file_are_not_planned_with(tmp_path: Path) -> None:
    cache = ProfileCache(tmp_path)
    cache.save_report(KEY, report())
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace("0.001", "-0.001"))
    assert cache.report(KEY) is None


def test_a_folder_that_can_not_be_written_only_costs_the_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = ProfileCache(tmp_path / "file")
    cache.save_report(KEY, report())
    assert cache.report(KEY) is None


def test_what_was_learned_goes_with_its_report(tmp_path: Path) -> None:
    cache = ProfileCache(tmp_path)
    learned = LearnedFactor(factor=1.5, at_s=100.0)
    cache.save_learned(KEY, learned)
    assert cache.learned(KEY) is None  # of no report
    cache.save_report(KEY, report())
    cache.save_learned(KEY, learned)
    assert cache.learned(KEY) == learned
    assert cache.report(KEY) == report()
    cache.save_report(KEY, report(0.002))
    assert cache.learned(KEY) is None


def test_links_hold_for_a_day(tmp_path: Path) -> None:
    cache = ProfileCache(tmp_path)
    cache.save_link("a", "b", "network 64", LINK, 1000.0)
    assert cache.link("a", "b", "network 64", 1000.0 + 3600) == LINK
    assert cache.link("a", "b", "network 64", 1000.0 + 2 * 86400) is None
    assert cache.link("a", "b", "network 64", 0.0) is None  # A clock that went back.
    assert cache.link("b", "a", "network 64", 1000.0) is None
    assert cache.link("a", "b", "local 64", 1000.0) is None


def test_devices_that_are_busy_together(tmp_path: Path) -> None:
    cache = ProfileCache(tmp_path)
    other = replace(KEY, kind="mlx")
    cache.save_slowdowns((KEY, other), (1.5, 2.0))
    assert cache.slowdowns((KEY, other)) == (1.5, 2.0)
    assert cache.slowdowns((KEY,)) is None


def test_a_model_of_other_contents_is_another_one(tmp_path: Path) -> None:
    assert model_identity(model(tmp_path)) == model_identity(model(tmp_path / "moved"))
    assert model_identity(model(tmp_path)) != model_identity(model(tmp_path, sha256="1" * 64))


def test_a_disturbed_report_is_due_some_time_later_and_not_for_ever(tmp_path: Path) -> None:
    cache = ProfileCache(tmp_path)
    disturbed = structs.replace(report(), others_share=0.5)
    now_s = 1e9
    for _ in range(2):
        cache.save_report(KEY, disturbed, now_s)
        assert not cache.should_remeasure(KEY, now_s + 60)
        assert cache.should_remeasure(KEY, now_s + 3600)
        assert cache.report(KEY) == disturbed
    cache.save_report(KEY, disturbed, now_s)
    assert not cache.should_remeasure(KEY, now_s + 1e6)  # It is like this here.
    cache.save_report(KEY, report(), now_s)
    assert not cache.should_remeasure(KEY, now_s + 1e6)


def test_a_report_that_use_disproved_is_due_at_once(tmp_path: Path) -> None:
    cache = ProfileCache(tmp_path)
    cache.mark_noisy(KEY)
    assert not cache.should_remeasure(KEY, 1e9)
    cache.save_report(KEY, report(), 1e9)
    cache.mark_noisy(KEY)
    assert cache.should_remeasure(KEY, 1e9 + 1)
    assert cache.report(KEY) == report()
