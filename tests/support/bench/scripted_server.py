"""An OpenAI-compatible server over real sockets answers as a test says."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """Texts, each an event of its own after `wait_s`; or, with a status other than 200, `message`. `hangs_after` events
    nothing more comes, with `breaks` the connection ends there."""

    texts: Sequence[str] = ()
    wait_s: float = 0.0
    usage: Mapping[str, Any] | None = None
    status: int = 200
    message: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    hangs_after: int | None = None
    breaks: bool = False


Script = Callable[[dict[str, Any]], Reply]


def words(count: int, prompt_tokens: int = 7, **usage: Any) -> Reply:
    """An answer of `count` tokens, with usage."""
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": count, **usage}
    return Reply(texts=[" word"] * count, usage=counts)


class ScriptedServer:
    """`with ScriptedServer(script) as server:` answers on `server.url` until the end. `bodies` are the
    chats asked, `answered` of them with a whole answer."""

    def __init__(
        self, script: Script, *, owner: str = "test", models: Sequence[str] = ("m",), at_once: int = 64
    ) -> None:
        self._script = script
        self._models = [{"id": name, "object": "model", "owned_by": owner} for name in models]
        self._at_once = at_once
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.bodies: list[dict[str, Any]] = []
        self.answered = 0
        self.keys: list[str] = []
        self.refuse_key = False

    def __enter__(self) -> Self:
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(self._start(), self._loop)
        self.url = f"http://127.0.0.1:{starting.result(10.0)}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        async def stop() -> None:
            self._server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(10.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)
        self._loop.close()

    async def _start(self) -> int:
        self._slots = asyncio.Semaphore(self._at_once)
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=256)
        return int(self._server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            self.keys.append(headers.get("authorization", ""))
            if self.refuse_key:
                self._write_json(writer, 401, {"error": {"message": "who are you?"}}, {})
            elif head[0].startswith("GET /v1/models"):
                self._write_json(writer, 200, {"data": self._models}, {})
            elif head[0].startswith("POST /v1/chat/completions"):
                await self._chat(writer, json.loads(body))
            else:
                self._write_json(writer, 404, {"error": {"message": "nothing here"}}, {})
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _chat(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        self.bodies.append(body)
        reply = self._script(body)
        if reply.status != 200:
            self._write_json(writer, reply.status, {"error": {"message": reply.message}}, reply.headers)
            return
        async with self._slots:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            _write_event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            for number, text in enumerate(reply.texts):
                if number == reply.hangs_after:
                    await writer.drain()
                    await asyncio.sleep(0.0 if reply.breaks else 60.0)
                    return
                await asyncio.sleep(reply.wait_s)
                _write_event(writer, {"choices": [{"index": 0, "delta": {"content": text}}]})
            _write_event(writer, {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
            if reply.usage is not None and body.get("stream_options", {}).get("include_usage"):
                _write_event(writer, {"choices": [], "usage": reply.usage})
            self.answered += 1
            _write_chunk(writer, b"data: [DONE]\n\n")
            writer.write(b"0\r\n\r\n")

    def _write_json(
        self, writer: asyncio.StreamWriter, status: int, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> None:
        data = json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} So", *(f"{name}: {value}" for name, value in headers.items())]
        writer.write("\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data)


def _write_event(writer: asyncio.StreamWriter, event: Mapping[str, Any]) -> None:
    _write_chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")


def _write_chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n" % len(data) + data + b"\r\n")
