"""Run in a network namespace: the endpoint at every address, asked over one that is not loopback's."""

from __future__ import annotations

import asyncio
import json
import threading

import httpx

from potluck.api.server import create_app, make_server
from potluck.head.api_access import endpoint_access
from potluck.head.endpoint import bind_endpoint
from potluck.system.settings import Settings
from tests.support.api.scripted_engine import ScriptedEngine
from tests.support.api.server import MODEL, eventually


def main() -> None:
    settings = Settings(host="0.0.0.0", host_name="kitchen")
    listener = bind_endpoint(settings.host, 0)
    port = listener.getsockname()[1]
    opened = endpoint_access(settings, port)
    server = make_server(create_app(ScriptedEngine(), model=MODEL), opened.access)
    threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True).start()
    eventually(lambda: server.started)
    lan, loopback = f"http://10.77.0.1:{port}", f"http://127.0.0.1:{port}"
    key = {"Authorization": f"Bearer {opened.new_key}"}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a b"}]}

    def ask(url: str, **headers: str) -> int:
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60.0, trust_env=False)
        return answer.status_code

    health = httpx.get(f"{lan}/health", timeout=60.0, trust_env=False)
    statuses = {
        "page": httpx.get(f"{lan}/", timeout=60.0, trust_env=False).status_code,
        "health": health.status_code,
        "no key": ask(lan),
        "wrong key": ask(lan, Authorization="Bearer sk-potluck-wrong"),
        "key": ask(lan, **key),
        "key, loopback": ask(loopback, **key),
        "no key, loopback": ask(loopback),
        "key, by name": ask(lan, Host=f"kitchen.local:{port}", **key),
        "key, another name": ask(lan, Host=f"evil.example:{port}", **key),
        "key, another address": ask(lan, Host=f"10.77.0.2:{port}", **key),
    }
    pages = [page.replace(str(port), "PORT") for page in opened.pages]
    print(json.dumps({"statuses": statuses, "health": health.json(), "pages": pages}))


if __name__ == "__main__":
    main()
