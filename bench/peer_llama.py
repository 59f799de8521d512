"""llama.cpp as a pipeline: two RPC servers of one thread each, its HTTP server in front of them.

`make llama-rpc` builds it. Layers are split evenly over the two; the HTTP server has one thread too, and computes
nothing but embeddings and samples.
"""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from bench.contestant import ROOT

LLAMA_RPC = ROOT / ".venv-peers" / "llama-rpc" / "bin"
"""Where `make llama-rpc` puts `ggml-rpc-server` and `llama-server`."""

_RPC_SERVER, _SERVER = "ggml-rpc-server", "llama-server"
_LISTENS_WITHIN_S = 20.0
_READY_WITHIN_S = 120.0
_STOP_WITHIN_S = 10.0


def llama_rpc(wanted: Path | None) -> Path | None:
    """The folder of binaries: the one asked for, that of `make llama-rpc`, or none.

    Raises FileNotFoundError for one that was asked for and lacks them.
    """
    folder = wanted or LLAMA_RPC
    if all((folder / name).is_file() for name in (_RPC_SERVER, _SERVER)):
        return folder
    if wanted is not None:
        raise FileNotFoundError(f"{wanted} has no {_RPC_SERVER} and {_SERVER}")
    return None


@contextmanager
def llama_server(folder: Path, gguf: Path, *, num_stages: int, slots: int, context_tokens: int) -> Iterator[str]:
    """Its URL, once it is ready. `slots` chats at once, each with `context_tokens`. Raises RuntimeError."""
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="plb-")))
        *rpc_ports, port = free_ports(num_stages + 1)
        for number, rpc_port in enumerate(rpc_ports):
            command = [str(folder / _RPC_SERVER), "-H", "127.0.0.1", "-p", str(rpc_port), "-t", "1"]
            process = stack.enter_context(_running(command, logs / f"rpc-{number}.log"))
            _wait_for_port(process, rpc_port, logs / f"rpc-{number}.log")
        command = [str(folder / _SERVER), *server_arguments(gguf, rpc_ports, port, slots, context_tokens)]
        process = stack.enter_context(_running(command, logs / "server.log"))
        url = f"http://127.0.0.1:{port}"
        _wait_for_health(process, url, logs / "server.log")
        yield url


def server_arguments(gguf: Path, rpc_ports: list[int], port: int, slots: int, context_tokens: int) -> list[str]:
    """All layers on the RPC servers, as many on each."""
    return [
        *("-m", str(gguf), "--host", "127.0.0.1", "--port", str(port)),
        *("--rpc", ",".join(f"127.0.0.1:{rpc_port}" for rpc_port in rpc_ports)),
        *("-ngl", "99", "--tensor-split", ",".join("1" for _ in rpc_ports)),
        *("--parallel", str(slots), "-c", str(slots * context_tokens), "-t", "1", "-tb", "1"),
    ]


def free_ports(count: int) -> list[int]:
    """Different ones, free a moment ago."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(one.getsockname()[1]) for one in sockets]


@contextmanager
def _running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Looked up, and not tried: an RPC server that has one client at a time would take the try for one."""
    deadline = time.monotonic() + _LISTENS_WITHIN_S
    while f":{port:04X} 00000000:0000 0A" not in Path("/proc/net/tcp").read_text():
        _check_alive(process, deadline, log)


def _wait_for_health(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _READY_WITHIN_S
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=5.0, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        _check_alive(process, deadline, log)


def _check_alive(process: subprocess.Popen[bytes], deadline: float, log: Path) -> None:
    if process.poll() is not None or time.monotonic() > deadline:
        words = log.read_text(errors="replace").strip().splitlines()[-4:]
        raise RuntimeError(f"llama.cpp is not up: {' '.join(words)}")
    time.sleep(0.05)
