"""The node runs one worker process for each of a host's devices, and reads their logs. Part of `up`, all of `join`."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.markup import escape

from devices.hardware.device import Device
from potluck.store.store import Store
from potluck.system.paths import pieces_dir, safe_file_name, shared_dir
from transport.errors import PotluckError, RingDown
from transport.messages.control import Register
from transport.messages.ring import PROTOCOL_VERSION
from transport.process.child_process import ChildProcess, stop_processes

_LINE = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+ (?P<level>[A-Z]+) (?P<text>.*)")
_HOLDS = re.compile(r"stage \d+ holds layers \[(?P<first>\d+), (?P<last>\d+)\)")
_HINT = "hint: "
_MAX_LOG_BYTES = 1 << 16
_LOG_INTERVAL_S = 1.0


def register_of(device: Device, *, address: str | None = None) -> Register:
    """How a worker introduces its device; it fills in its own `pid`. `address` is its host's for other hosts."""
    return Register(
        version=PROTOCOL_VERSION,
        device=device.name,
        backend=device.backend,
        kind=device.kind,
        host=device.host,
        pid=0,
        threads=device.threads,
        free_bytes=device.free_bytes,
        total_bytes=device.total_bytes,
        memory_pool=device.memory_pool,
        bandwidth_bytes_per_s=device.bandwidth_bytes_per_s,
        compute_dtype=device.compute_dtype,
        address=address,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeWorker:
    device: Device
    child: ChildProcess


class Node:
    """Starts workers and watches them; `on_exit(pid, error)` is called from a thread when one ends by itself. Starts
    once."""

    def __init__(
        self,
        *,
        control: str,
        logs: Path,
        run_dir: Path,
        on_exit: Callable[[int, PotluckError], object] = lambda pid, error: None,
        address: str | None = None,
        keys_file: Path | None = None,
        head_key: str = "",
    ) -> None:
        """Workers put their sockets in `run_dir` and delete it should this process crash; `address` is where they
        listen for other hosts, `keys_file` has this host's keys, and `head_key` is that of a head on another host."""
        self._control = control
        self._logs = logs
        self._run_dir = run_dir
        self._address = address
        self._keys_file = keys_file
        self._head_key = head_key
        self._on_exit = on_exit
        self._stopping = threading.Event()
        self.workers: list[NodeWorker] = []
        self.exit_errors: list[PotluckError] = []
        """Of workers that have ended by themselves, in order."""
        self.ended = threading.Event()
        """Set once all workers have ended; whoever waits for that may set it for other reasons too."""

    def start(self, devices: Sequence[Device]) -> None:
        """One worker a device."""
        for device in devices:
            register = msgspec.json.encode(register_of(device, address=self._address)).decode()
            arguments = ["--control", self._control, "--register", register, "--run-dir", str(self._run_dir)]
            if self._keys_file is not None:
                arguments += ["--keys", str(self._keys_file)]
            if self._address is not None:
                arguments += ["--pieces", str(pieces_dir()), "--shared", str(shared_dir())]
                arguments += [f"--own={path}" for model in Store().list() for path in model.weight_paths()]
            if self._head_key:
                arguments.append(f"--head-key={self._head_key}")  # A key may begin with a dash.
            log = self._logs / f"worker-{safe_file_name(device.name)}.log"
            with contextlib.suppress(OSError):  # Windows, while somebody looks at it.
                log.unlink(missing_ok=True)
            child = ChildProcess("shard.worker", arguments, log=log, threads=device.threads)
            self.workers.append(NodeWorker(device=device, child=child))
        for worker in self.workers:
            threading.Thread(target=self._watch, args=(worker,), name=f"node-{worker.child.pid}", daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()
        stop_processes(worker.child for worker in self.workers)

    def _watch(self, worker: NodeWorker) -> None:
        """Blocks in the system until the process ends: an idle node takes no time."""
        worker.child.wait()
        code = worker.child.exit_code()
        if code is None or self._stopping.is_set():
            return
        error = _exit_error(worker, code)
        self.exit_errors.append(error)
        self._on_exit(worker.child.pid, error)
        if all(one.child.exit_code() is not None for one in self.workers):
            self.ended.set()


def _exit_error(worker: NodeWorker, code: int) -> PotluckError:
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    hint = f"its log: {worker.child.log}"
    if code == -9:
        hint = f"if you did not kill it, the system was out of memory: lower --context or --memory; {hint}"
    return RingDown(f"the worker of {worker.device.name} {how}", hint=hint)


def relay_worker_log(node: Node, *, say: Callable[[str], object]) -> str:
    """Pass on what a user should know of the workers' logs, until `node.ended`. Returns why they ended: what the
    head said or what went wrong, as the end of a worker's log has it; else how its process ended."""
    log = WorkerEventLog([(worker.device.name, worker.child.log) for worker in node.workers])
    is_over = False
    while not is_over:
        is_over = node.ended.wait(_LOG_INTERVAL_S)
        for line in log.read_new():
            say(line)
    said = [why for worker in node.workers if (why := _reason_in_log_line(worker.child.last_log_line()))]
    return said[0] if said else str(node.exit_errors[0]) if node.exit_errors else ""


def _reason_in_log_line(line: str) -> str:
    """Of a log's last line; empty if that is about something else, as where the process was killed."""
    _, stopped, reason = line.partition(" INFO stopping: ")
    return reason if stopped else "" if " INFO " in line else line


@dataclass(slots=True)
class _Log:
    device: str
    path: Path
    read_bytes: int = 0


class WorkerEventLog:
    """What this host's user should know of workers with these devices and logs: what went wrong with them, and which
    layers they hold. They talk to their head, which may be on another host; here their logs are read as they grow."""

    def __init__(self, logs: Sequence[tuple[str, Path]]) -> None:
        self._logs = [_Log(device, path) for device, path in logs]

    def read_new(self) -> list[str]:
        """Lines in rich markup, of what was logged since the last call."""
        return [line for log in self._logs for line in _event_lines(log.device, _new_lines(log))]


def _new_lines(log: _Log) -> list[str]:
    try:
        with log.path.open("rb") as file:
            file.seek(log.read_bytes)
            data = file.read(_MAX_LOG_BYTES)
    except OSError:
        return []
    complete = data[: data.rfind(b"\n") + 1]
    log.read_bytes += len(complete)
    return complete.decode(errors="replace").splitlines()


def _event_lines(device: str, lines: Sequence[str]) -> Iterator[str]:
    is_wrong = False
    for line in lines:
        found = _LINE.fullmatch(line)
        if found is not None:
            is_wrong = found["level"] == "ERROR"
            if is_wrong:
                yield f"[yellow]{escape(device)}: {escape(found['text'])}[/yellow]"
            elif (holds := _HOLDS.fullmatch(found["text"])) is not None:
                yield f"{escape(device)} holds layers {holds['first']}–{int(holds['last']) - 1}"
        elif is_wrong and line.startswith(_HINT):
            yield f"[dim]{escape(line)}[/dim]"
