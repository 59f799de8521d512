"""`potluck bench --serve --url` from its arguments to its tables, on scripted servers."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from potluck.measure import __main__
from tests.support.bench.scripted_server import Reply, ScriptedServer, words

SHORT = ("--clients", "2", "--requests", "4", "--warm-up", "0", "--prompt", "20", "--output", "3", "--timeout", "5")


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("POTLUCK_HOME", str(tmp_path / "home"))


def counted(body: dict[str, Any]) -> Reply:
    """As a tokenizer of one token a word counts, with 5 of the template's."""
    return words(body["max_tokens"], 5 + sum(len(message["content"].split()) for message in body["messages"]))


def result(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert __main__.main(["--serve", *SHORT, *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_prompts_have_the_length_that_the_endpoint_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedServer(counted, owner="llamacpp") as server:
        found = result(capsys, "--url", f"{server.url}/v1/")
    (row,) = found["rows"]
    assert (found["prompt_lengths_by"], row["prompt_tokens"], row["output_tokens"]) == ("usage", 20, 3)
    assert (row["done"], row["tokens_counted_by"], row["load"]) == (4, "usage", "2 clients")
    assert row["client_cpu_s"] > 0
    assert found["cores"] > 0
    asked = server.bodies[-1]
    assert (asked["model"], asked["temperature"], asked["ignore_eos"], asked["stream"]) == ("m", 0, True, True)


def test_an_endpoint_without_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedServer(lambda body: Reply(texts=["a"] * body["max_tokens"])) as server:
        found = result(capsys, "--url", server.url)
    (row,) = found["rows"]
    assert found["prompt_lengths_by"] == "words"
    assert (row["output_tokens"], row["prompt_tokens"], row["tokens_counted_by"]) == (3, None, "events")
    assert len(server.bodies[-1]["messages"][0]["content"].split()) == 20


def test_fields_that_an_endpoint_refuses_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def strict(body: dict[str, Any]) -> Reply:
        for name in ("ignore_eos", "stream_options"):
            if name in body:
                return Reply(status=400, message=f"unknown field {name}")
        return Reply(texts=["a"] * body["max_tokens"])

    with ScriptedServer(strict, owner="vllm") as server:
        assert result(capsys, "--url", server.url)["endpoints"][0]["fields"] == []


def test_several_endpoints_take_turns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    slow = ScriptedServer(lambda body: Reply(**{**_fields(counted(body)), "wait_s": 0.05}))
    with ScriptedServer(counted) as fast, slow:
        files = ("--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md"))
        code = __main__.main(["--serve", *SHORT, "--rounds", "2", "--url", fast.url, "--url", slow.url, *files])
        shown = capsys.readouterr()
        # Both were asked the same, in every round something new.
        texts = [[body["messages"][0]["content"] for body in server.bodies] for server in (fast, slow)]
    assert code == 0
    assert sorted(texts[0][-8:]) == sorted(texts[1][-8:]) and len(set(texts[1][-8:])) == 8
    turns = [line.rsplit(" ", 1)[1] for line in shown.err.splitlines() if line.startswith("round")]
    assert turns == [fast.url, slow.url] * 2
    first, second = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert "ratio" not in first and second["ratio"]["tokens_per_s"] < 1
    for table in (shown.out, (tmp_path / "out.md").read_text()):
        assert "2 clients" in table and "× first" in table and fast.url.removeprefix("http://") in table


def _fields(reply: Reply) -> dict[str, Any]:
    return {"texts": reply.texts, "usage": reply.usage}


def test_a_key_comes_from_the_environment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    with ScriptedServer(counted) as server:
        assert result(capsys, "--url", server.url)["rows"][0]["done"] == 4
        assert set(server.keys) == {"Bearer sk-1"}
        server.refuse_key = True
        assert __main__.main(["--serve", *SHORT, "--url", server.url]) == 1
        assert "refuses the key in OPENAI_API_KEY" in capsys.readouterr().err
        monkeypatch.delenv("OPENAI_API_KEY")
        assert __main__.main(["--serve", *SHORT, "--url", server.url]) == 1
        assert "wants an API key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "other"), "does not serve other"),
        (("--tokenizer", "/nowhere"), "no such folder"),
        (("--clients", "0"), "--clients"),
        (("--rate", "0"), "--rate"),
        (("--prompt", "8:x"), "--prompt"),
        (("--output", "1"), "--output"),
        (("--shared-prefix", "20"), "--shared-prefix"),
        (("--what",), "--what"),
        (("--json", "/nowhere/out.json"), "no folder /nowhere"),
        (("--", "--device", "cpu"), "name a MODEL"),
    ],
)
def test_what_can_not_be_done_is_said_in_a_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    with ScriptedServer(counted) as server:
        assert __main__.main(["--serve", *SHORT, "--url", server.url, *arguments]) == 1
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith("error: ") and says in error
    assert hint.startswith("hint: ")


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (Reply(status=503, message="loading the model"), "loading the model"),
        (Reply(status=404, message="no chats here"), "404: no chats here"),
        (Reply(texts=["a", "b"], hangs_after=0), "no news for 1 s"),
        (Reply(texts=["a", "b"], hangs_after=1, breaks=True), "broke off"),
    ],
)
def test_an_endpoint_that_can_not_answer(capsys: pytest.CaptureFixture[str], reply: Reply, says: str) -> None:
    with ScriptedServer(lambda body: reply) as server:
        assert __main__.main(["--serve", *SHORT, "--timeout", "1", "--url", server.url]) == 1
    assert says in capsys.readouterr().err


def test_nobody_there_and_something_else_there(capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedServer(counted) as server:
        gone = server.url
        assert __main__.main(["--serve", "--url", f"{gone}/nothing"]) == 1
        assert "says 404" in capsys.readouterr().err
    for url, says in ((gone, "no connection"), ("ftp://x", "not an endpoint's address"), ("http://:1", "not an")):
        assert __main__.main(["--serve", "--url", url]) == 1
        assert says in capsys.readouterr().err


def test_ctrl_c_shows_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    def script(body: dict[str, Any]) -> Reply:
        if len(server.bodies) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        # Enough for the trial, two for lengths, and four that are measured; the others take their time.
        return counted(body) if len(server.bodies) < 8 else Reply(texts=["a"], hangs_after=0)

    with ScriptedServer(script) as server:
        code = __main__.main(
            ["--serve", *SHORT, "--clients", "1", "--requests", "50", "--rounds", "3", "--url", server.url]
        )
    shown = capsys.readouterr()
    assert code == 130
    assert "Interrupted" in shown.out and "1 unfinished" in shown.out
    assert shown.out.count("1 client") == 1


def test_a_spell_in_which_all_fails(capsys: pytest.CaptureFixture[str]) -> None:
    replies = iter([words(2), words(1, 13), words(1, 141)])  # the trial, and two for lengths
    with ScriptedServer(lambda body: next(replies, Reply(status=400, message="too long"))) as server:
        assert __main__.main(["--serve", *SHORT, "--url", server.url]) == 1
    shown = capsys.readouterr()
    assert "4 failed" in shown.out
    assert "every request fails: 400: too long" in shown.err
