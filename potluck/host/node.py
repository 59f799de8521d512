"""The node runs one worker process for each of a host's devices. Part of `up`, all of `join`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from devices.hardware.device import Device
from potluck.store import Store
from potluck.system.child_process import ChildProcess, stop_processes
from potluck.system.paths import pieces_dir, safe_file_name, shared_dir
from transport.errors import PotluckError, RingDown
from transport.messages.control import Register
from transport.messages.ring import PROTOCOL_VERSION


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
