"""What a service is told to run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from potluck.cli.service.manager import make_job
from transport.errors import ConfigError


def test_it_runs_this_installation_by_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = make_job("smollm2", join=False, environment={"POTLUCK_HOME": "store"})
    assert job.command == (sys.executable, "-P", "-m", "potluck", "up", "smollm2")
    assert job.environment == {"POTLUCK_HOME": str(tmp_path / "store")}
    assert make_job(None, join=True, environment={}).command[-1] == "join"
    assert make_job("./a.gguf", join=False, environment={}).command[-1] == str(tmp_path / "a.gguf")
    assert make_job("file:a", join=False, environment={}).command[-1] == f"file:{tmp_path / 'a'}"
    assert make_job("hf:org/name", join=False, environment={}).command[-1] == "hf:org/name"


def test_no_secret_gets_into_it() -> None:
    secrets = {"HF_TOKEN": "hf_1", "OPENAI_API_KEY": "sk", "HF_ENDPOINT": "https://user:word@hub", "POTLUCK_KEY": "k"}
    assert make_job("m", join=False, environment=secrets).environment == {}


@pytest.mark.parametrize(
    ("model", "join", "environment"),
    [
        (None, False, {}),
        ("", False, {}),
        ("m", True, {}),
        ("--host=0.0.0.0", False, {}),
        ("m\nExecStartPre=/bin/evil", False, {}),
        ("m\r", False, {}),
        ("m\0", False, {}),
        ("m\x85", False, {}),
        ("m\udcff", False, {}),
        ("m", False, {"POTLUCK_HOME": "/x\nExecStartPre=/bin/evil"}),
    ],
)
def test_what_can_not_be_told_safely_is_refused(model: str | None, join: bool, environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as refused:
        make_job(model, join=join, environment=environment)
    assert refused.value.hint
