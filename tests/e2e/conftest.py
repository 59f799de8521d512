"""One running demo ring for the tests that only use it; homes of their own for those that break it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.e2e.known_devices import know_devices
from tests.support.e2e.potluck_process import Home, Running, make_home, up_arguments


@pytest.fixture(scope="session")
def data_home(smollm2_path: Path) -> Path:
    """A POTLUCK_HOME that holds the demo model and knows this host's devices."""
    home = smollm2_path.parents[1]
    know_devices(home / "probe.json")
    return home


@pytest.fixture
def home(data_home: Path) -> Iterator[Home]:
    """Folders of one test; whatever the test left running is ended."""
    with kept_home(data_home) as home:
        yield home


@pytest.fixture
def another_home(data_home: Path) -> Iterator[Home]:
    """Of the same test."""
    with kept_home(data_home) as home:
        yield home


@contextmanager
def kept_home(data: Path) -> Iterator[Home]:
    home = make_home(data)
    yield home
    for process in home.processes():
        process.kill()
    shutil.rmtree(home.runtime, ignore_errors=True)


@pytest.fixture(scope="session")
def demo(data_home: Path) -> Iterator[Running]:
    """The demo's ring, torch, MLX, torch, serving."""
    home = make_home(data_home)
    running = Running(home, *up_arguments())
    try:
        running.facts()
        yield running
    finally:
        running.stop()
        for process in home.processes():
            process.kill()
        shutil.rmtree(home.runtime, ignore_errors=True)


@pytest.fixture(scope="session")
def url(demo: Running) -> str:
    found: str = demo.facts()["url"]
    return found
