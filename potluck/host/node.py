"""The node runs one worker process for each of a host's devices. Part of `up`, all of `join`."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from devices.hardware.device import Device
from potluck.store.store import Store
from potluck.system.paths import pieces_dir, safe_file_name, shared_dir
from transport.errors import PotluckError, RingDown
from transport.messages.control import Register
from transport.messages.ring import PROTOCOL_VERSION
from transport.process.child_process import ChildProcess, stop_processes


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


_WATCH_INTERVAL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeWorker:
    device: Device
    child: ChildProcess


class Node:
    """Starts workers and watches them; `on_exit(pid, error)` is called from a thread when one ends by itself."""

    def __init__(
        self,
        *,
        control: str,
        logs: Path,
        run_dir: Path,
        on_exit: Callable[[int, PotluckError], None],
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
        threading.Thread(target=self._watch, name="node", daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()
        stop_processes(worker.child for worker in self.workers)

    def all_exited(self) -> bool:
        return all(worker.child.exit_code() is not None for worker in self.workers)

    def _watch(self) -> None:
        running = list(self.workers)
        while running and not self._stopping.is_set():
            for worker in list(running):
                code = worker.child.exit_code()
                if code is not None and not self._stopping.is_set():
                    running.remove(worker)
                    self._on_exit(worker.child.pid, _exit_error(worker, code))
            time.sleep(_WATCH_INTERVAL_S)


def _exit_error(worker: NodeWorker, code: int) -> PotluckError:
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    hint = f"its log: {worker.child.log}"
    if code == -9:
        hint = f"if you did not kill it, the system was out of memory: lower --context or --memory; {hint}"
    return RingDown(f"the worker of {worker.device.name} {how}", hint=hint)
