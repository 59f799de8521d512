"""The process that profiles: what it prints, how it ends, and which reports are refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest

from shard.pieces.open import open_checkpoint
from shard.worker.profile.process import ProfileProcess
from shard.worker.profile.profiler import Profiler
from shard.worker.profile.report import ProfileSettings
from shard.worker.profile.timed_stage import LayerSpan, TimedStage
from tests.support.shard.tiny import save_tiny
from transport.errors import BadMessage, DeadlineExceeded, ModelNotFound, StageFailed
from transport.messages.measure import ProfileReport, read_report
from transport.messages.ring import WeightsForm

TINY = ProfileSettings(backend="torch", device="cpu", dtype="float32", budget_s=0.5)


def command(model: Path, *more: str) -> list[str]:
    fixed = ["--backend", "torch", "--device", "cpu", "--dtype", "float32", "--budget", "0.3"]
    return [sys.executable, "-P", "-m", "shard.worker.profile", "--model", str(model), *fixed, *more]


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", 0, tmp_path_factory.mktemp("tiny"))


def test_the_command_line_prints_json(tiny_path: Path) -> None:
    done = subprocess.run(command(tiny_path), capture_output=True, text=True, timeout=400, check=True)
    assert read_report(json.loads(done.stdout)).kinds == (0, 0, 0, 0)


def test_a_profile_holds_weights_in_the_form_asked_for(tiny_path: Path) -> None:
    checkpoint, span = open_checkpoint(tiny_path), LayerSpan(first=1, last=2)
    held = {
        weights: TimedStage(
            checkpoint, span, backend="torch", device="cpu", dtype="float32", weights=weights
        ).weights_bytes
        for weights in get_args(WeightsForm)
    }
    assert held["dense"] == held["stored"] > 3 * held["8-bit"] > 4.5 * held["4-bit"]
    profiler = Profiler(checkpoint, replace(TINY, weights="4-bit", budget_s=0.2), on_progress=lambda what: None)
    assert profiler.profile().is_plausible()
    done = subprocess.run(command(tiny_path, "--weights", "8-bit"), capture_output=True, text=True, timeout=400)
    assert read_report(json.loads(done.stdout)).is_plausible()
    done = subprocess.run(command(tiny_path, "--weights", "5-bit"), capture_output=True, text=True, timeout=400)
    assert done.returncode == 2 and "invalid choice" in done.stderr


def test_a_child_reports_says_what_it_does_and_measures_again(tiny_path: Path) -> None:
    child = ProfileProcess(tiny_path, TINY, threads=1)
    doing: list[str] = []
    try:
        assert isinstance(child.report(doing.append), ProfileReport)
        assert doing[0] == "loading layers"
        assert child.measure_under_load(0.1) > 0
    finally:
        child.close()
    assert not profiles_running()


def test_a_profile_that_can_not_load_says_why(tmp_path: Path) -> None:
    child = ProfileProcess(tmp_path / "nowhere", TINY, threads=1)
    with pytest.raises(ModelNotFound, match="nowhere"):
        child.report()
    child.close()


def test_a_profile_that_is_killed_is_an_error(tiny_path: Path) -> None:
    child = ProfileProcess(tiny_path, TINY, threads=1)
    threading.Timer(1.0, lambda: [os.kill(one.pid, signal.SIGKILL) for one in profiles_running()]).start()
    with pytest.raises(StageFailed, match="signal 9"):
        while True:
            child.report()
            child.measure_under_load(60)
    child.close()


def test_a_profile_that_hangs_is_given_up(tiny_path: Path) -> None:
    child = ProfileProcess(tiny_path, TINY, threads=1, silence_s=0.1)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="nothing for"):
        child.report()
    assert time.monotonic() - started < 5
    assert not profiles_running()


def test_a_profile_ends_with_its_parent(tiny_path: Path) -> None:
    with subprocess.Popen(command(tiny_path, "--serve"), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdin is not None
        child.stdout.readline()
        child.stdin.close()
        assert child.wait(10) == 75


@pytest.mark.parametrize("data", [None, {}, [1], {"kinds": [0]}])
def test_a_report_that_can_not_be_planned_with_is_refused(data: object) -> None:
    with pytest.raises(BadMessage):
        read_report(data)


def test_impossible_numbers_are_refused() -> None:
    good = {"rows": [1], "contexts": [0], "seconds": [[0.1]]}
    report: dict[str, Any] = {
        "kinds": [0],
        "layers": [{"decode": good, "prefill": good}],
        "embed": good,
        "lm_head": good,
        "step_s": 0.0,
        "under_load_s": 0.1,
    }
    read_report(report)
    for change in (
        {"kinds": [1]},
        {"kinds": []},
        {"step_s": -1.0},
        {"under_load_s": 0.0},
        {"lm_head": {**good, "seconds": [[-0.1]]}},
        {"lm_head": {**good, "rows": [2, 1], "seconds": [[1.0], [1.0]]}},
        {"lm_head": {**good, "seconds": [[0.1, 0.2]]}},
    ):
        with pytest.raises(BadMessage):
            read_report({**report, **change})


def profiles_running() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "shard.worker.profile" in " ".join(child.cmdline())]
