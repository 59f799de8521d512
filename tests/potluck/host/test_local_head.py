from __future__ import annotations

import threading
from pathlib import Path

import pytest
from filelock import FileLock

from potluck.host.local_head import HeadFile, LocalHead, running_head
from transport.errors import AlreadyRunning, NotRunning


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POTLUCK_RUNTIME", str(tmp_path))
    return tmp_path


def test_a_head_is_found_from_when_it_says_where_it_is_until_it_ends() -> None:
    facts = LocalHead(
        pid=1, url="http://127.0.0.1:1", model="tiny", control="ipc://control", host="here", address=None, lan=None
    )
    with HeadFile() as file:
        with pytest.raises(NotRunning, match="starting"):
            running_head()
        with pytest.raises(AlreadyRunning, match="starting"), HeadFile():
            pass
        file.publish(facts)
        assert running_head() == facts
        with pytest.raises(AlreadyRunning, match="tiny"), HeadFile():
            pass
    with pytest.raises(NotRunning, match="no head runs"):
        running_head()


def test_someone_who_only_looks_is_not_taken_for_a_head(runtime: Path) -> None:
    def hold_for_a_moment() -> None:
        looking = FileLock(runtime / "head.lock")
        looking.acquire()
        threading.Timer(0.1, looking.release, [True]).start()

    hold_for_a_moment()
    with pytest.raises(NotRunning, match="no head runs"):
        running_head()
    hold_for_a_moment()
    with HeadFile():
        pass
