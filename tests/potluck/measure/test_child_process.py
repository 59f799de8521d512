"""A child answers commands in turn, keeps its libraries' words out of the replies, and ends with its pipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from potluck.measure.child_process import SystemUnderTest, llama_python


def test_it_answers_what_it_is_asked_and_says_how_it_ended() -> None:
    with SystemUnderTest("echo", "tests.support.bench.echo_child", ["7"], threads=1) as child:
        assert child.ready == {"argument": "7", "threads": "1"}
        assert child.call("double", number=21) == {"number": 42}
        assert child.call("double", number=1) == {"number": 2}
        with pytest.raises(RuntimeError, match="echo exited with code 3"):
            child.call("die")


def test_an_interpreter_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        llama_python(str(tmp_path / "python"))
