"""The chat page with its key, and the pages of others, in a real browser."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from potluck.api.server import create_app
from tests.support.api.chromium import Browser, Page, chromium, needs_chromium
from tests.support.api.scripted_engine import ScriptedEngine
from tests.support.api.server import MODEL, Server

pytestmark = needs_chromium

_KEY = "sk-potluck-right"


class _OneKey:
    def is_right(self, presented: bytes) -> bool:
        return presented == _KEY.encode()


class _Counted:
    """The application, and what reached it."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self._app = create_app(engine, model=MODEL)
        self.seen: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(f"{scope['method']} {scope['path']}")
        await self._app(scope, receive, send)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    opened = Server(key=_OneKey())
    yield opened
    opened.close()


def test_the_key_in_the_address_is_taken_once_and_leaves_no_trace(browser: Browser, locked: Server) -> None:
    home = f"http://127.0.0.1:{locked.port}/"
    page = browser.open(f"{home}#key={_KEY}")
    _is_ready(page)
    assert page.value("location.href") == home
    assert page.history()[-1] == home and not any(_KEY in url for url in page.history())
    assert page.value("document.getElementById('unlock').hidden")
    assert _ask(page, "one two") == "two one "
    page.reload()
    _is_ready(page)
    # Another tab has no key, and no trace of it is in what pages of one origin share.
    other = browser.open(home)
    other.wait_for("document.getElementById('state').dataset.state === 'locked'")
    assert other.value("localStorage.length + document.cookie.length") == 0


def test_without_a_key_the_page_asks_for_it(browser: Browser, locked: Server) -> None:
    page = browser.open(f"http://127.0.0.1:{locked.port}/")
    page.wait_for("!document.getElementById('unlock').hidden && document.getElementById('form').hidden")
    _unlock(page, "sk-potluck-wrong")
    page.wait_for("document.getElementById('error').textContent.includes('not right')")
    _unlock(page, "schlüssel")
    page.wait_for("document.getElementById('error').textContent.includes('not a key')")
    _unlock(page, f" {_KEY} ")
    _is_ready(page)
    assert page.value("document.getElementById('error').hidden && document.getElementById('key').value === ''")
    assert _ask(page, "three four") == "four three "


def test_what_a_model_says_or_is_called_is_text(browser: Browser) -> None:
    engine = ScriptedEngine()
    bad = "<img/src=x/onerror=window.pwned=1><script>window.pwned=1</script><svg/onload=window.pwned=1>"
    server = Server(create_app(engine, model=bad))
    try:
        page = browser.open(f"http://127.0.0.1:{server.port}/")
        _is_ready(page)
        assert page.value("document.getElementById('model').textContent") == bad
        assert _ask(page, f"``` {bad} ```{bad} {bad}") == f"{bad} ```{bad} {bad} ``` "
        engine.reason, engine.state = bad, "down"
        page.wait_for("document.getElementById('error').textContent.includes('onerror')")
        assert (
            page.value("document.querySelectorAll('main img, main svg, body script, header img, #error *').length") == 0
        )
        # And if something were ever put in as it is, it would still not run, and have nobody to talk to.
        page.value(f"document.getElementById('log').innerHTML = {json.dumps(bad)}")
        page.value(
            "document.body.append(Object.assign(document.createElement('script'), { textContent: 'window.pwned=1' }))"
        )
        elsewhere = f"http://localhost:{server.port}/health"
        assert page.value(f"fetch('{elsewhere}').then(() => 'sent', () => 'blocked')") == "blocked"
        seen = "new Promise((done) => addEventListener('securitypolicyviolation', () => done('blocked')))"
        beacon = f"(() => {{ const seen = {seen}; new Image().src = '{elsewhere}'; return seen; }})()"
        assert page.value(beacon) == "blocked"
        assert page.value("window.pwned") is None
    finally:
        server.close()


def test_no_page_of_another_origin_gets_in(browser: Browser) -> None:
    engine = ScriptedEngine()
    app = _Counted(engine)
    server = Server(app)
    try:
        with _evil_site() as port:
            for host in ("localhost", "evil.test"):
                results = _attack(browser, f"http://{host}:{port}/", server.port)
                assert results and not [result for result in results if result["got"] != "refused"], results
        # The endpoint under a name that resolves to it: what rebinding amounts to.
        renamed = browser.open(f"http://rebound.test:{server.port}/")
        renamed.wait_for("document.body && document.body.innerText.includes('is not served here')")
        assert renamed.value("fetch('/v1/models').then((r) => r.status)") == 403
        assert app.seen == [] and engine.submitted == []
    finally:
        server.close()


def test_a_named_origin_gets_in_by_asking(browser: Browser) -> None:
    with _evil_site() as port:
        server = Server(origins=frozenset({f"http://localhost:{port}"}))
        try:
            results = _attack(browser, f"http://localhost:{port}/", server.port)
            got = {result["name"]: result["got"] for result in results}
            assert got["fetch"] == "200" and got["read"] == "200"
            # Nor does it get more than that.
            assert got["frame"] == "refused" and got["socket"] == "refused"
            assert len(server.engine.submitted) == 1
        finally:
            server.close()


_ATTACKS = """
async function attack(target) {
  const body = JSON.stringify({ model: "tiny", messages: [{ role: "user", content: "hi" }] });
  const chat = `${target}/v1/chat/completions`;
  const json = { "Content-Type": "application/json" };
  const asked = async (url, options) => String((await fetch(url, options)).status);
  const loaded = (tag, attribute, url) => new Promise((resolve, reject) => {
    const element = document.createElement(tag);
    element[attribute] = url;
    element.onload = () => resolve("loaded");
    element.onerror = () => reject(new Error("error"));
    document.body.append(element);
  });
  const opaque = async (options) => {
    // What it answered can't be seen; whether it was taken the endpoint knows.
    await fetch(chat, { method: "POST", mode: "no-cors", ...options }).catch(() => {});
    throw new Error("opaque");
  };
  const posted = (enctype) => new Promise((resolve, reject) => {
    const frame = document.createElement("iframe");
    frame.name = `frame${Math.random()}`;
    const form = document.createElement("form");
    Object.assign(form, { method: "POST", action: chat, enctype, target: frame.name });
    const input = document.createElement("input");
    [input.name, input.value] = [body.slice(0, -1) + ', "x": "', '"}'];
    form.append(input);
    document.body.append(frame, form);
    form.submit();
    setTimeout(() => reject(new Error("sent")), 400);
  });
  const framed = () => new Promise((resolve, reject) => {
    const frame = document.createElement("iframe");
    frame.src = `${target}/`;
    frame.onload = () => {
      // A page that is shown in a frame answers; an error page of the browser has no such window.
      try { frame.contentWindow.location.href; resolve("same origin"); } catch { reject(new Error("blocked")); }
    };
    document.body.append(frame);
    setTimeout(() => reject(new Error("nothing")), 1000);
  });
  const socket = () => new Promise((resolve, reject) => {
    const opened = new WebSocket(target.replace("http", "ws") + "/v1/chat/completions");
    opened.onopen = () => resolve("open");
    opened.onerror = () => reject(new Error("error"));
  });
  const events = () => new Promise((resolve, reject) => {
    const opened = new EventSource(`${target}/v1/models`);
    opened.onopen = () => resolve("open");
    opened.onerror = () => { opened.close(); reject(new Error("error")); };
  });
  const attacks = {
    fetch: () => asked(chat, { method: "POST", headers: json, body }),
    read: () => asked(`${target}/v1/models`),
    status: () => asked(`${target}/potluck/status`, { credentials: "include" }),
    "with a key": () => asked(`${target}/v1/models`, { headers: { Authorization: "Bearer x" } }),
    "text/plain": () => asked(chat, { method: "POST", headers: { "Content-Type": "text/plain" }, body }),
    "no-cors": () => opaque({ body }),
    "no-cors form": () => opaque({ body: new URLSearchParams({ a: body }) }),
    "no-cors blob": () => opaque({ body: new Blob([body], { type: "text/plain" }) }),
    "no-cors empty": () => opaque({}),
    beacon: async () => { navigator.sendBeacon(chat, body); throw new Error("opaque"); },
    "form text/plain": () => posted("text/plain"),
    "form urlencoded": () => posted("application/x-www-form-urlencoded"),
    "form parts": () => posted("multipart/form-data"),
    image: () => loaded("img", "src", `${target}/page/icon.svg`),
    script: () => loaded("script", "src", `${target}/page/chat.js`),
    frame: framed,
    socket,
    events,
  };
  const results = [];
  for (const [name, go] of Object.entries(attacks)) {
    const got = await go().catch(() => "refused");
    results.push({ name, got });
  }
  return JSON.stringify(results);
}
"""


@contextmanager
def _evil_site() -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(f"<!doctype html><body><script>{_ATTACKS}</script>".encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=site.serve_forever, daemon=True)
    thread.start()
    try:
        yield site.server_address[1]
    finally:
        site.shutdown()
        site.server_close()
        thread.join(5.0)


def _attack(browser: Browser, url: str, port: int) -> list[dict[str, str]]:
    page = browser.open(url)
    page.wait_for("window.attack")
    found: list[dict[str, str]] = json.loads(page.value(f"attack('http://127.0.0.1:{port}')"))
    return found


def _is_ready(page: Page) -> None:
    page.wait_for("document.getElementById('state')?.dataset.state === 'ready'")


def _unlock(page: Page, key: str) -> None:
    page.value(f"document.getElementById('key').value = {json.dumps(key)}")
    page.value("document.getElementById('unlock').requestSubmit()")


def _ask(page: Page, text: str) -> str:
    page.value(f"document.getElementById('input').value = {json.dumps(text)}")
    page.value("document.getElementById('input').dispatchEvent(new Event('input'))")
    page.value("document.getElementById('form').requestSubmit()")
    page.wait_for("document.querySelector('article.assistant .facts')")
    said: str = page.value("document.querySelector('article.assistant .text').textContent")
    return said.partition("seed=")[0]
