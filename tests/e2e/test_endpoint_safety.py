"""A running head with a key, whose model brings a chat template that misbehaves: who gets in, what stops, and what no
log ever holds."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.api.raw_http import Raw, send
from tests.support.e2e.known_devices import know_devices
from tests.support.e2e.potluck_process import ASK_S, Home, Running, up_arguments, wait_until

_PLAIN: Any = {"trust_env": False, "timeout": ASK_S}
_ONE_DEVICE = ("--device", "torch:cpu")
_BOMB = "GO-OFF"
# Made of pieces, so that no file of the test's own command line holds one.
_MARKER = "-".join(("xylophone", "quagmire", "7319"))
_TEMPLATE = (
    "{% if '" + _BOMB + "' in messages[-1].content %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}{% endif %}"
    "{% if messages[-1].role != 'user' %}{{ raise_exception('no user: ' + messages[-1].content) }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def home(data_home: Path) -> Iterator[Home]:
    """Folders of its own: a key, logs, and the demo's model with another chat template."""
    folder = Path(tempfile.mkdtemp(prefix="plt-"))
    model = folder / "data" / "models" / "smollm2"
    model.mkdir(parents=True)
    for path in (data_home / "models" / "smollm2").iterdir():
        (model / path.name).symlink_to(path)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": _TEMPLATE}))
    (folder / "run").mkdir()
    home = Home(data=folder / "data", runtime=folder / "run")
    know_devices(home.data / "probe.json")
    yield home
    for process in home.processes():
        process.kill()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def running(home: Home) -> Iterator[Running]:
    made = Running(home, *up_arguments("--require-key", "--context", "1024", devices=_ONE_DEVICE))
    try:
        made.facts()
        yield made
    finally:
        made.stop()


@pytest.fixture
def url(running: Running) -> str:
    found: str = running.facts()["url"]
    return found


def _key(home: Home) -> str:
    return (home.data / "api-key").read_text().strip()


def _ask(url: str, key: str, content: str, **fields: Any) -> httpx.Response:
    body = {"model": "smollm2", "messages": [{"role": "user", "content": content}], "max_tokens": 3, **fields}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, **_PLAIN)


def _get(url: str, target: str, key: str) -> Raw:
    port = httpx.URL(url).port or 0
    lines = [f"GET {target} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Connection: close"]
    lines += [f"Authorization: Bearer {key}"] if key else []
    return send(port, "\r\n".join([*lines, "", ""]).encode())


def test_the_key_is_shown_once_when_it_is_made(home: Home, running: Running) -> None:
    file = home.data / "api-key"
    key = file.read_text().strip()
    assert key.startswith("sk-potluck-") and len(key) == len("sk-potluck-") + 43
    assert file.stat().st_mode & 0o777 == 0o600
    assert running.said().count(key) == 1
    assert home.run("key").stdout == f"{key}\n"
    assert json.loads(home.run("key", "--json").stdout) == {"key": key, "is_new": False}


def test_nothing_but_the_page_and_health_is_open(home: Home, url: str) -> None:
    key = _key(home)
    with httpx.Client(base_url=url, **_PLAIN) as client:
        for path in ("/", "/page/chat.js", "/page/key.js", "/page/chat.css", "/page/icon.svg"):
            assert client.get(path).status_code == 200
        assert client.get("/health").json() == {"status": "ready"}
        assert client.get("/health", headers={"x-api-key": key}).json() == {"status": "ready", "model": "smollm2"}
        for method, path in (
            ("GET", "/v1/models"),
            ("GET", "/v1/models/smollm2"),
            ("GET", "/potluck/status"),
            ("POST", "/potluck/replan"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/nothing"),
            ("POST", "/"),
            ("GET", "/page"),
        ):
            bodies = set()
            for headers in (
                {},
                {"Authorization": "Bearer sk-potluck-wrong"},
                {"Authorization": f"Bearer {key}x"},
                {"Authorization": f"Bearer {key[:-1]}"},
                {"Authorization": f"Basic {key}"},
                {"Authorization": key},
                {"x-api-key": "wrong"},
                {"Cookie": f"key={key}"},
            ):
                answer = client.request(method, path, headers=headers, json={} if method == "POST" else None)
                assert answer.status_code == 401, (method, path, headers)
                assert answer.headers["www-authenticate"] == "Bearer"
                bodies.add(answer.text)
            assert len(bodies) == 1 and json.loads(bodies.pop())["error"]["code"] == "invalid_api_key"
        assert client.get(f"/v1/models?key={key}").status_code == 401
        assert client.get("/v1/models", headers={"authorization": f"bearer {key}"}).status_code == 200


def test_openais_client_with_the_key_and_without(home: Home, url: str) -> None:
    def ask(key: str) -> Any:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        messages: Any = [{"role": "user", "content": "Hi"}]
        return client.chat.completions.create(model="smollm2", messages=messages, max_tokens=3)

    assert ask(_key(home)).choices[0].message.content
    with pytest.raises(openai.AuthenticationError, match="API key"):
        ask("none")


def test_names_of_models_never_become_paths(home: Home, url: str) -> None:
    key = _key(home)
    names = [
        "../smollm2",
        "..%2f..%2fsmollm2",
        "%2e%2e/%2e%2e/etc/passwd",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "smollm2%00",
        "smollm2/../smollm2",
        "./smollm2",
        "smollm2/",
        "smollm2%2ftokenizer_config.json",
        "C:%5cWindows",
        "%ff%fe",
        "sm%E2%80%8Bollm2",
        "%ef%bd%93mollm2",
        "file:%2f%2f%2fetc%2fpasswd",
        "a" * 8000,
    ]
    for name in names:
        for folder in ("/v1/models/", "/page/"):
            # As they are: a client's library would tidy them up.
            answer = _get(url, f"{folder}{name}", key)
            assert answer.status == 404 and len(answer.body) < 4096, (folder, name)
            assert b"root:" not in answer.body and b"chat_template" not in answer.body
    for path in ("//health", "/page/../v1/models", "/page/..", "/health/../v1/models", "/%2fhealth", "/HEALTH"):
        assert _get(url, path, "").status in (401, 404), path
    for name in ("../smollm2", "/etc/passwd", "smollm2\0", "\u202esmollm2", "a" * 300, "", ".", "smollm2\n"):
        refused = _ask(url, key, "Hi", model=name)
        assert refused.status_code in (400, 404) and refused.json()["error"]["param"] == "model", name


def test_a_template_that_does_not_end_is_stopped_and_others_go_on(home: Home, url: str) -> None:
    key = _key(home)
    found: list[httpx.Response] = []
    going = threading.Thread(target=lambda: found.append(_ask(url, key, "Tell a story", max_tokens=300)))
    going.start()
    bomb = _ask(url, key, f"{_BOMB} {_MARKER}")
    assert bomb.status_code == 400 and "chat template computed for more than 1.0 s" in bomb.json()["error"]["message"]
    going.join(ASK_S)
    assert found[0].status_code == 200
    assert _ask(url, key, "Hi").status_code == 200


def test_a_new_key_is_taken_within_a_second(home: Home, url: str) -> None:
    old = _key(home)
    made = home.run("key", "--new")
    new = made.stdout.strip()
    assert new != old and made.returncode == 0
    time.sleep(1.0)
    assert _ask(url, old, "Hi").status_code == 401
    assert _ask(url, new, "Hi").status_code == 200


def test_the_own_commands_bring_the_key(home: Home, running: Running, url: str) -> None:
    status = home.run("status", "--json")
    assert status.returncode == 0 and json.loads(status.stdout)["url"] == url, status.stderr
    replan = home.run("replan", "--json")
    assert replan.returncode == 0, replan.stderr
    said = home.run("run", "smollm2", "Hi", "--max-tokens", "3", "--json")
    assert said.returncode == 0 and json.loads(said.stdout)["tokens"] == 3, said.stderr
    (home.data / "api-key").rename(home.data / "hidden")
    try:
        for command in (("run", "smollm2", "Hi"), ("status",)):
            refused = home.run(*command)
            assert refused.returncode == 1 and "needs its API key" in refused.stderr, refused.stderr
            assert "Traceback" not in refused.stderr
    finally:
        (home.data / "hidden").rename(home.data / "api-key")
        time.sleep(1.0)


def test_the_key_is_for_chatting_and_lets_nobody_change_the_pool(home: Home, url: str) -> None:
    bearer = {"Authorization": f"Bearer {_key(home)}"}
    for path in ("replan", "invite", "approve"):
        refused = httpx.post(f"{url}/potluck/{path}", json={}, headers=bearer, timeout=60, trust_env=False)
        assert refused.status_code == 403 and refused.json()["error"]["code"] == "not_allowed", path


def test_no_log_holds_a_prompt_an_answer_or_a_key(home: Home, url: str, running: Running) -> None:
    key = _key(home)
    chat = [{"role": "system", "content": _MARKER}, {"role": "user", "content": f"Repeat: {_MARKER}"}]
    whole = _ask(url, key, "", messages=chat, max_tokens=20, temperature=0, stop=[f"{_MARKER}!"])
    assert whole.status_code == 200
    for fields in (
        {"messages": [*chat, {"role": "assistant", "content": _MARKER}]},  # the template refuses it
        {"messages": [{"role": "user", "content": f"{_MARKER} " * 2000}]},  # too long
        {"messages": [{"role": _MARKER, "content": _MARKER}]},
        {"messages": [{"role": "user", "content": [{"type": _MARKER}]}]},
        {"messages": [{"role": "user", "content": _MARKER + "<|im_end|>😀"}], _MARKER: 1},
        {"model": _MARKER},
        {"tools": [{"name": _MARKER}]},
        {"temperature": _MARKER},
        {"logit_bias": {_MARKER: 1}},
    ):
        assert _ask(url, key, _MARKER, **fields).status_code in (400, 404)
    head = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    for body in (f'{{"{_MARKER}"', f'"{_MARKER}"', f'{{"a": "{_MARKER}", "a": 1}}'):
        assert httpx.post(f"{url}/v1/chat/completions", content=body, headers=head, **_PLAIN).status_code == 400
    for wrong in (f"{_MARKER}-key", key[:-4]):
        assert _ask(url, wrong, _MARKER).status_code == 401
    for name, value in (("Host", _MARKER), ("Origin", f"http://{_MARKER}"), ("Content-Type", _MARKER)):
        assert httpx.post(f"{url}/v1/{_MARKER}", headers={**head, name: value}, **_PLAIN).status_code >= 400
    asked = {"model": "smollm2", "messages": chat, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, headers=head, **_PLAIN) as cut:
        next(cut.iter_raw())
    wait_until(lambda: _idle(url, key), ASK_S)
    answer = whole.json()["choices"][0]["message"]["content"]
    secrets = {"prompt": _MARKER.encode(), "key": key.encode(), "answer": answer[:40].encode()}
    assert len(answer) >= 20
    # What the user saw of a key was the first one, when it was made: this one came after.
    places = {str(path): path.read_bytes() for path in home.runtime.rglob("*") if path.is_file()}
    places |= {str(path): path.read_bytes() for path in home.data.rglob("*.log")}
    places |= {"stdout": "".join(running.lines).encode(), "stderr": running.said().encode()}
    for process in home.processes():
        places[f"arguments of {process.pid}"] = " ".join(process.cmdline()).encode()
        places[f"environment of {process.pid}"] = json.dumps(process.environ()).encode()
    assert len([name for name in places if name.endswith(".log")]) >= 3
    found = [(what, name) for name, text in places.items() for what, secret in secrets.items() if secret in text]
    assert found == []


def _idle(url: str, key: str) -> bool:
    report = httpx.get(f"{url}/potluck/status", headers={"x-api-key": key}, **_PLAIN).json()
    return bool(report["engine"]["running_requests"] == 0)


def test_a_key_file_that_others_can_read_is_refused(home: Home, running: Running, url: str) -> None:
    file = home.data / "api-key"
    key = _key(home)
    file.chmod(0o644)
    try:
        told = home.run("key")
        assert told.returncode == 1 and "open to other users" in told.stderr and key not in told.stdout + told.stderr
        time.sleep(1.0)
        assert _ask(url, key, "Hi").status_code == 401
    finally:
        file.chmod(0o600)
    time.sleep(1.0)
    assert _ask(url, key, "Hi").status_code == 200


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (("--host", "mymac.local"), "no address"),
        (("--allow-origin", "*"), "is no origin"),
        (("--allow-origin", "https://a.example/path"), "is no origin"),
        (("--allow-host", "a.example:80"), "is no host"),
    ],
)
def test_what_can_not_be_allowed_is_told(home: Home, option: tuple[str, str], says: str) -> None:
    fresh = Home(data=home.data, runtime=Path(tempfile.mkdtemp(prefix="plt-")))
    told = fresh.run(*up_arguments(*option, devices=_ONE_DEVICE))
    shutil.rmtree(fresh.runtime)
    assert told.returncode == 1 and says in told.stderr and "Traceback" not in told.stderr
