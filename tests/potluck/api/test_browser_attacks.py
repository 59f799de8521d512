"""What other people's pages can make a browser of this host send, and what programs can pretend to be: none of it is
accepted, whether there is a key or not."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.support.api.raw_http import Raw, send
from tests.support.api.server import MODEL, Server

_BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}).encode()
_CHAT = "/v1/chat/completions"
_JSON = ("Content-Type: application/json",)


class _AnyKey:
    """Takes every request as one with the right key: what refuses it is not the key."""

    def is_right(self, presented: bytes) -> bool:
        return True


@pytest.fixture(scope="module", params=["without a key", "with a key"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    opened = Server(key=_AnyKey() if request.param == "with a key" else None)
    yield opened
    opened.close()


def _request(
    port: int,
    *headers: str,
    method: str = "POST",
    target: str = _CHAT,
    host: str | None = "127.0.0.1:PORT",
    version: str = "1.1",
    body: bytes = _BODY,
) -> bytes:
    lines = [f"{method} {target} HTTP/{version}", *([] if host is None else [f"Host: {host}"]), *headers]
    lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
    return "\r\n".join(lines).replace("PORT", str(port)).encode("latin-1") + body


def _get(port: int, *headers: str, target: str = "/v1/models", host: str | None = "127.0.0.1:PORT") -> bytes:
    return _request(port, *headers, method="GET", target=target, host=host, body=b"")


_FOREIGN = "Origin: https://evil.example"
_OWN = "Origin: http://127.0.0.1:PORT"
_PREFLIGHT = ("Access-Control-Request-Method: POST", "Access-Control-Request-Headers: content-type")

# What the attack is → what is sent, as arguments of _request.
ATTACKS: dict[str, dict[str, object]] = {
    # A page whose name now resolves to this host.
    "rebinding": {"headers": _JSON, "host": "evil.example:PORT"},
    "rebinding, same origin": {"headers": (*_JSON, "Origin: http://evil.example:PORT"), "host": "evil.example:PORT"},
    "rebinding, a read": {"method": "GET", "target": "/v1/models", "host": "evil.example:PORT"},
    "rebinding, the page": {"method": "GET", "target": "/", "host": "evil.example:PORT"},
    "rebinding, health": {"method": "GET", "target": "/health", "host": "evil.example:PORT"},
    "rebinding, upper case": {"headers": _JSON, "host": "EVIL.EXAMPLE:PORT"},
    "rebinding, a name that begins like ours": {"headers": _JSON, "host": "localhost.evil.example:PORT"},
    "rebinding, a name that ends like ours": {"headers": _JSON, "host": "evil-localhost:PORT"},
    "rebinding, a service that names addresses": {"headers": _JSON, "host": "127.0.0.1.sslip.example:PORT"},
    "a trailing dot": {"headers": _JSON, "host": "localhost.:PORT"},
    "another port": {"headers": _JSON, "host": "127.0.0.1:1"},
    "a port with zeros": {"headers": _JSON, "host": "127.0.0.1:0PORT"},
    "an empty port": {"headers": _JSON, "host": "127.0.0.1:"},
    "user information": {"headers": _JSON, "host": "evil@127.0.0.1:PORT"},
    "user information, ours": {"headers": _JSON, "host": "localhost:PORT@evil.example"},
    "every address": {"headers": _JSON, "host": "0.0.0.0:PORT"},
    "an address in one number": {"headers": _JSON, "host": "2130706433:PORT"},
    "an address in short": {"headers": _JSON, "host": "127.1:PORT"},
    "another address of loopback": {"headers": _JSON, "host": "127.0.0.2:PORT"},
    "two names": {"headers": _JSON, "host": "127.0.0.1:PORT, evil.example"},
    "a path in the name": {"headers": _JSON, "host": "127.0.0.1:PORT/evil"},
    "no name": {"headers": _JSON, "host": ""},
    "no Host": {"headers": _JSON, "host": None},
    "no Host, HTTP/1.0": {"headers": _JSON, "host": None, "version": "1.0"},
    "no Host but a forwarded one": {
        "headers": (*_JSON, "X-Forwarded-Host: 127.0.0.1:PORT"),
        "host": None,
        "version": "1.0",
    },
    "two Hosts": {"headers": (*_JSON, "Host: evil.example")},
    "two Hosts, HTTP/1.0": {"headers": (*_JSON, "Host: 127.0.0.1:PORT"), "host": "evil.example", "version": "1.0"},
    "X-Forwarded-Host": {"headers": (*_JSON, "X-Forwarded-Host: 127.0.0.1:PORT"), "host": "evil.example"},
    "Forwarded": {"headers": (*_JSON, "Forwarded: host=127.0.0.1;for=127.0.0.1"), "host": "evil.example"},
    "X-Real-Host": {"headers": (*_JSON, "X-Original-Host: localhost", "X-Host: localhost"), "host": "evil.example"},
    "absolute form": {"headers": _JSON, "target": f"http://evil.example{_CHAT}"},
    "absolute form, ours": {"headers": _JSON, "target": f"http://127.0.0.1:PORT{_CHAT}", "host": "evil.example"},
    "absolute form, a read": {"method": "GET", "target": "http://evil.example/v1/models"},
    "an authority": {"method": "CONNECT", "target": "evil.example:443"},
    # What a page may send without asking.
    "text/plain": {"headers": ("Content-Type: text/plain",)},
    "text/plain that says JSON": {"headers": ("Content-Type: text/plain; application/json",)},
    "a form": {"headers": ("Content-Type: application/x-www-form-urlencoded",)},
    "a form in parts": {"headers": ("Content-Type: multipart/form-data; boundary=x",)},
    "a beacon": {"headers": ("Content-Type: text/plain;charset=UTF-8", _FOREIGN)},
    "no content type": {},
    "two content types": {"headers": (*_JSON, "Content-Type: text/plain")},
    "two content types in one": {"headers": ("Content-Type: application/json, text/plain",)},
    "a kind of JSON": {"headers": ("Content-Type: application/json+evil",)},
    "replan by a form": {"headers": ("Content-Type: text/plain",), "target": "/potluck/replan"},
    "a form that says it is another method": {
        "headers": ("Content-Type: application/x-www-form-urlencoded", "X-HTTP-Method-Override: POST"),
    },
    "a read that says it is a post": {
        "headers": (*_JSON, "X-HTTP-Method-Override: POST", "X-Method-Override: POST"),
        "method": "GET",
    },
    "a read with a body": {"headers": _JSON, "method": "GET", "target": f"{_CHAT}?_method=POST"},
    # Where it says that it comes from.
    "foreign origin": {"headers": (*_JSON, _FOREIGN)},
    "foreign origin, a read": {"headers": (_FOREIGN,), "method": "GET", "target": "/v1/models"},
    "foreign origin, health": {"headers": (_FOREIGN,), "method": "GET", "target": "/health"},
    "foreign origin, the page": {"headers": (_FOREIGN,), "method": "GET", "target": "/"},
    "foreign origin, status": {"headers": (_FOREIGN,), "method": "GET", "target": "/potluck/status"},
    "null origin": {"headers": (*_JSON, "Origin: null")},
    "null origin, a read": {"headers": ("Origin: null",), "method": "GET", "target": "/v1/models"},
    "an empty origin": {"headers": (*_JSON, "Origin: ")},
    "another port's origin": {"headers": (*_JSON, "Origin: http://127.0.0.1:1")},
    "our origin under another name": {"headers": (*_JSON, "Origin: http://localhost:PORT")},
    "our origin over https": {"headers": (*_JSON, "Origin: https://127.0.0.1:PORT")},
    "our origin and more": {"headers": (*_JSON, "Origin: http://127.0.0.1:PORT.evil.example")},
    "our origin and another": {"headers": (*_JSON, f"{_OWN} https://evil.example")},
    "two origins": {"headers": (*_JSON, _OWN, _FOREIGN)},
    "an extension": {"headers": (*_JSON, "Origin: chrome-extension://abcdefgh")},
    "cross-site": {"headers": (*_JSON, "Sec-Fetch-Site: cross-site")},
    "cross-site, a read": {
        "headers": ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: image"),
        "method": "GET",
        "target": "/v1/models",
    },
    "cross-site, a link to the API": {
        "headers": ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"),
        "method": "GET",
        "target": "/potluck/status",
    },
    "cross-site, the page in a frame": {
        "headers": ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: iframe"),
        "method": "GET",
        "target": "/",
    },
    "cross-site, a script of ours": {
        "headers": ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: script"),
        "method": "GET",
        "target": "/page/chat.js",
    },
    "same site, another port": {"headers": (*_JSON, "Sec-Fetch-Site: same-site")},
    "cross-site with our origin": {"headers": (*_JSON, _OWN, "Sec-Fetch-Site: cross-site")},
    "cookies": {"headers": (*_JSON, "Cookie: session=1", _FOREIGN)},
    # Asking first.
    "preflight": {"headers": (_FOREIGN, *_PREFLIGHT), "method": "OPTIONS"},
    "preflight of nobody": {"headers": _PREFLIGHT, "method": "OPTIONS"},
    "preflight of null": {"headers": ("Origin: null", *_PREFLIGHT), "method": "OPTIONS"},
    "preflight for a private network": {
        "headers": (_FOREIGN, *_PREFLIGHT, "Access-Control-Request-Private-Network: true"),
        "method": "OPTIONS",
    },
    "preflight for the local network": {
        "headers": (_FOREIGN, *_PREFLIGHT, "Access-Control-Request-Local-Network: true"),
        "method": "OPTIONS",
        "target": "/health",
    },
    "preflight after rebinding": {
        "headers": ("Origin: http://evil.example:PORT", *_PREFLIGHT),
        "method": "OPTIONS",
        "host": "evil.example:PORT",
    },
    "preflight of everything": {"headers": (_FOREIGN, *_PREFLIGHT), "method": "OPTIONS", "target": "*"},
    # Another protocol.
    "a web socket": {
        "headers": (
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Version: 13",
        ),
        "method": "GET",
        "target": "/v1/models",
    },
    "a web socket from elsewhere": {
        "headers": ("Upgrade: WebSocket", "Connection: Upgrade", _FOREIGN),
        "method": "GET",
        "target": "/",
    },
    "another method": {"headers": _JSON, "method": "PUT"},
    "TRACE": {"method": "TRACE", "target": "/"},
    "a space before the colon": {"headers": (*_JSON, "Host : evil.example")},
    "two lengths": {"headers": (*_JSON, "Content-Length: 0")},
    "a length and chunks": {"headers": (*_JSON, "Transfer-Encoding: chunked")},
}


@pytest.mark.parametrize("name", ATTACKS)
def test_none_is_accepted(server: Server, name: str) -> None:
    attack = dict(ATTACKS[name])
    headers = attack.pop("headers", ())
    if attack.get("method") == "GET" and "with a body" not in name:
        attack["body"] = b""
    answer = send(server.port, _request(server.port, *headers, **attack))  # type: ignore[arg-type, misc]
    assert 400 <= answer.status < 500, answer
    _reads_nothing(answer)
    assert server.engine.submitted == []


def _reads_nothing(answer: Raw) -> None:
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert b'potluck"' not in answer.body and "101" not in str(answer.status)


def test_the_same_without_what_is_wrong_is_accepted(server: Server) -> None:
    """Or the table would prove nothing."""
    for headers in (
        _JSON,
        (*_JSON, _OWN, "Sec-Fetch-Site: same-origin"),
        ("Content-Type: Application/JSON; charset=utf-8",),
    ):
        assert send(server.port, _request(server.port, *headers)).status == 200
    assert len(server.engine.submitted) == 3
    server.engine.submitted.clear()
    for host in ("127.0.0.1:PORT", "localhost:PORT", "LocalHost:PORT", "[::1]:PORT", "localhost"):
        assert send(server.port, _get(server.port, host=host)).status == 200
    link = ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document")
    assert send(server.port, _get(server.port, *link, target="/")).status == 200


def test_no_cache_keeps_an_answer_and_no_browser_guesses_what_it_is(server: Server) -> None:
    asked = {
        "models": _get(server.port),
        "health": _get(server.port, target="/health"),
        "nothing": _get(server.port, target="/nothing"),
        "refused": _get(server.port, host="evil.example"),
        "chat": _request(server.port, *_JSON),
    }
    for what, request in asked.items():
        answer = send(server.port, request)
        assert answer.headers["cache-control"] == "no-store", what
        assert answer.headers["x-content-type-options"] == "nosniff", what
    kinds = {
        "": "text/html",
        "page/chat.js": "text/javascript",
        "page/chat.css": "text/css",
        "page/icon.svg": "image/svg+xml",
    }
    for name, kind in kinds.items():
        # In parts too it would be the same for everybody, and whoever asks for thousands of them is up to something.
        file = send(server.port, _get(server.port, "Range: bytes=0-1,4-5", target=f"/{name}"))
        assert file.status == 200 and file.headers["content-type"].startswith(kind)
        assert file.headers["cache-control"] == "no-cache" and file.headers["x-content-type-options"] == "nosniff"
        # Who opens the page in a window gets no hold of that.
        assert file.headers["cross-origin-opener-policy"] == "same-origin"


def test_a_named_origin_may_ask_and_read() -> None:
    server = Server(origins=frozenset({"https://chat.example"}))
    try:
        named = "Origin: https://chat.example"
        ask = (named, *_PREFLIGHT, "Access-Control-Request-Private-Network: true")
        allowed = send(server.port, _request(server.port, *ask, method="OPTIONS", body=b""))
        assert allowed.status == 204
        assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
        assert allowed.headers["access-control-allow-headers"] == "content-type"
        assert allowed.headers["access-control-allow-private-network"] == "true"
        answer = send(server.port, _request(server.port, *_JSON, named, "Sec-Fetch-Site: cross-site"))
        assert answer.status == 200 and answer.headers["access-control-allow-origin"] == "https://chat.example"
        assert answer.headers["vary"] == "Origin"
        for found in (allowed, answer):
            assert "access-control-allow-credentials" not in found.headers
        # It may read what went wrong, and must still send JSON.
        wrong = send(server.port, _request(server.port, "Content-Type: text/plain", named))
        assert wrong.status == 415 and wrong.headers["access-control-allow-origin"] == "https://chat.example"
        for other in ("http://chat.example", "https://chat.example:444", "https://chat.example.evil", "null"):
            refused = send(server.port, _request(server.port, *_JSON, f"Origin: {other}"))
            assert refused.status == 403
            _reads_nothing(refused)
    finally:
        server.close()
