"""A worker process: one device. Registers with the head, loads what it is told to, and serves it.

Started as `python -P -m shard.worker --control ENDPOINT --register JSON` with a lifeline on standard input; with the
head's key and this host's own keys where the head is on another host.
The main thread loads and runs the stage; the control thread only passes commands and answers for statistics.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import signal
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal

import msgspec
import psutil
import zmq

from shard.formats.checkpoint import Checkpoint
from shard.pieces.model_fetch import ModelFetcher, PieceFolders
from shard.pieces.open import open_checkpoint
from shard.stage import ShardBackend
from shard.worker.load import load_shard
from shard.worker.local_stage import LocalStage
from shard.worker.machine import machine_fingerprint
from shard.worker.measure import MeasureService
from shard.worker.serve import StageServer
from transport.codec import EdgeLimits
from transport.control import ControlClient
from transport.errors import ConfigError, DeadlineExceeded, ErrorInfo, PotluckError, StageFailed
from transport.links.secure_endpoints import SecureEndpoints
from transport.links.zmq_link import ZmqReceiver, ZmqSender
from transport.messages.control import (
    Connect,
    ControlMessage,
    Listening,
    Load,
    Loaded,
    Loading,
    Register,
    Stats,
    StatsRequest,
    Stop,
    Unload,
    WorkerFault,
)
from transport.messages.measure import EndProfile, LinkListen, LinkProbe, MeasureUnderLoad, Profile
from transport.messages.ring import Fence
from transport.pieces.fetcher import FetchReport
from transport.process.child import start_parent_watch
from transport.security.curve import KeyPair, read_keys

_PROGRESS_INTERVAL_S = 0.1
_CONNECT_TIMEOUT_S = 60.0
log = logging.getLogger("potluck.worker")


class Worker:
    """One device's process between `run` and its return."""

    def __init__(
        self,
        control_endpoint: str,
        register: Register,
        run_dir: Path,
        *,
        keys: KeyPair | None = None,
        head_key: str = "",
        folders: PieceFolders | None = None,
    ) -> None:
        """`keys` are this host's; with the head on another one, `head_key` is its, and `folders` are where models that
        come from it are kept."""
        self._register = register
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._edges = SecureEndpoints(self._context, run_dir, keys=keys, address=register.address)
        self._commands: queue.SimpleQueue[Load | Connect | Unload | Stop] = queue.SimpleQueue()
        self._deferred_command: Load | Unload | Stop | None = None
        self._num_pending = 0  # Commands that wait and end what is being done: all but Connect.
        self._pending_lock = threading.Lock()
        self._receiver: ZmqReceiver | None = None
        self._backend: ShardBackend | None = None
        self._server: StageServer | None = None
        self._control = ControlClient(
            self._context,
            control_endpoint,
            register,
            on_message=self._on_control,
            on_lost=self._on_head_lost,
            prepare=self._edges.client_auth(control_endpoint, head_key),
        )
        self._is_remote = bool(head_key)
        self._model_fetcher = ModelFetcher(self._context, self._edges, folders) if folders is not None else None
        self._measure_service = MeasureService(
            self._context, register, edges=self._edges, models=self._model_fetcher, send=self._control.send
        )

    def run(self) -> None:
        """Obey the head until it says stop or is gone."""
        while True:
            command = self._next_command()
            if isinstance(command, Stop):
                log.info("stopping: %s", command.reason or "told to")
                break
            self._measure_service.stop_profile()  # It would take the memory that is to be loaded into.
            try:
                self._serve(command)
            except PotluckError as error:
                log.error("%s", error)
                self._control.send(WorkerFault(command.fence, ErrorInfo.of(error)))
            except Exception as error:
                log.exception("stage %d failed", command.stage)
                self._control.send(WorkerFault(command.fence, ErrorInfo.of(error, StageFailed)))
            self._backend = self._server = None
        self._measure_service.stop_profile()
        self._control.close()

    def _serve(self, load: Load) -> None:
        with ExitStack() as leases:
            checkpoint = self._open_checkpoint(load)
            leases.callback(checkpoint.close)
            self._serve_from(checkpoint, load, leases)

    def _open_checkpoint(self, load: Load) -> Checkpoint:
        if load.shared is None:
            if self._is_remote:
                raise ConfigError("another host's head named a folder of this one", hint="update Potluck on both")
            return open_checkpoint(Path(load.model_path))
        models = self._require_models()
        models.fetch_metadata(load.shared, self._has_pending_command)
        return models.open(load.shared)

    def _require_models(self) -> ModelFetcher:
        if self._model_fetcher is None:
            raise ConfigError("this worker has no folder for models of other hosts", hint="start potluck join anew")
        return self._model_fetcher

    def _fetch_pieces(self, checkpoint: Checkpoint, load: Load, leases: ExitStack) -> FetchReport:
        """What is missing here of the stage's weights comes from other hosts."""
        if load.shared is None:
            return FetchReport(is_complete=True, seconds=0.0)
        report = self._require_models().fetch_stage(
            load.shared,
            checkpoint,
            load.spec.first,
            load.spec.last,
            leases=leases,
            progress=_LoadingProgress(self._control, load, "fetch"),
            stop=self._has_pending_command,
        )
        log.info("fetched %s in %.1f s", report.bytes_by_peer or "nothing", report.seconds)
        return report

    def _serve_from(self, checkpoint: Checkpoint, load: Load, leases: ExitStack) -> None:
        # On the device that this worker offered, whatever the head says.
        spec = msgspec.structs.replace(load.spec, device=self._register.kind)
        limits = EdgeLimits(
            fence=load.fence,
            hidden_size=checkpoint.spec.hidden_size,
            dtype=load.spec.wire_dtype,
            vocab_size=checkpoint.spec.vocab_size,
            context_tokens=load.spec.context_tokens,
            max_step_tokens=load.max_step_tokens,
        )
        endpoint = self._edges.listen_at(load.listen, str(load.fence.epoch))
        guard = self._edges.guard(endpoint, load.upstream)
        self._receiver = receiver = ZmqReceiver(self._context, endpoint, limits, guard=guard)
        try:
            self._control.send(Listening(load.fence, receiver.endpoint))
            fetched = self._fetch_pieces(checkpoint, load, leases)
            if not fetched.is_complete:
                return
            started = time.monotonic()
            backend = load_shard(
                checkpoint, spec, backend=self._register.backend, progress=_LoadingProgress(self._control, load, "read")
            )
            checkpoint.close()
            load_s = time.monotonic() - started
            connect = self._wait_for_connect(load.fence)
            if connect is None:
                return
            next_limits = replace(limits, dtype=load.spec.next_dtype)
            sender = ZmqSender(
                self._context,
                connect.next,
                next_limits,
                name=f"stage {load.stage} ({self._register.device})",
                prepare=self._edges.client_auth(connect.next, connect.key),
                stop=self._has_pending_command,
            )
            try:
                server = StageServer(LocalStage(backend), spec, receiver, sender, fence=load.fence, index=load.stage)
                self._backend, self._server = backend, server
                self._control.send(
                    Loaded(
                        load.fence,
                        backend.weights_bytes,
                        backend.kv.num_bytes(),
                        load_s,
                        fetch_s=fetched.seconds,
                        fetched=fetched.bytes_by_peer,
                    )
                )
                log.info("stage %d holds layers [%d, %d)", load.stage, load.spec.first, load.spec.last)
                server.run(self._is_interrupted)
            finally:
                sender.close()
        finally:
            self._receiver = None
            receiver.close()

    def _next_command(self) -> Load | Stop:
        command: Load | Connect | Unload | Stop | None = self._deferred_command
        self._deferred_command = None
        while command is None or isinstance(command, Connect | Unload):  # of a load that has failed
            command = self._take_command(None)
        return command

    def _take_command(self, timeout_s: float | None) -> Load | Connect | Unload | Stop:
        """Raises queue.Empty."""
        command = self._commands.get(timeout=timeout_s)
        if not isinstance(command, Connect):
            with self._pending_lock:
                self._num_pending -= 1
        return command

    def _has_pending_command(self) -> bool:
        return self._deferred_command is not None or self._num_pending > 0

    def _wait_for_connect(self, fence: Fence) -> Connect | None:
        """None if something else is to be done first. Raises DeadlineExceeded."""
        while True:
            try:
                command = self._take_command(_CONNECT_TIMEOUT_S)
            except queue.Empty:
                raise DeadlineExceeded(
                    f"the head did not say within {_CONNECT_TIMEOUT_S:.0f} s where the next stage is",
                    hint="did another stage fail to start?",
                ) from None
            if not isinstance(command, Connect):
                self._deferred_command = command
                return None
            if command.fence == fence:
                return command

    def _on_control(self, message: ControlMessage) -> None:
        match message:
            case StatsRequest(token=token):
                self._control.send(self._stats(token))
            case Load() | Connect() | Unload() | Stop():
                self._enqueue(message)
            case Profile() | MeasureUnderLoad() | LinkListen() | LinkProbe():
                self._measure_service.submit(message)
            case EndProfile():
                self._measure_service.stop_profile()
            case _:
                log.warning("unexpected %s", type(message).__name__)

    def _on_head_lost(self) -> None:
        self._enqueue(Stop("the head is gone"))

    def _enqueue(self, command: Load | Connect | Unload | Stop) -> None:
        if not isinstance(command, Connect):
            with self._pending_lock:
                self._num_pending += 1
        self._commands.put(command)
        receiver = self._receiver
        if receiver is not None:
            receiver.wake()

    def _is_interrupted(self) -> bool:
        return self._deferred_command is not None or not self._commands.empty()

    def _stats(self, token: int) -> Stats:
        backend, server = self._backend, self._server
        rss_bytes = psutil.Process().memory_info().rss
        if backend is None or server is None:
            return Stats(token=token, rss_bytes=rss_bytes)
        counters = server.counters
        return Stats(
            token=token,
            decode_steps=counters.decode_steps,
            decode_tokens=counters.decode_tokens,
            decode_s=counters.decode_s,
            decode_p50_s=counters.decode_p50_s,
            decode_buckets=counters.buckets(),
            prefill_tokens=counters.prefill_tokens,
            prefill_s=counters.prefill_s,
            sequences=backend.kv.num_sequences(),
            kv_tokens=backend.kv.num_tokens(),
            weights_bytes=backend.weights_bytes,
            kv_bytes=backend.kv.num_bytes(),
            rss_bytes=rss_bytes,
        )


class _LoadingProgress:
    """Passes loading progress on, some times a second."""

    def __init__(self, control: ControlClient, load: Load, phase: Literal["fetch", "read"]) -> None:
        self._control = control
        self._load = load
        self._phase = phase
        self._next_s = 0.0

    def __call__(self, read_bytes: int, total_bytes: int) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_s or read_bytes == total_bytes:
            self._next_s = now_s + _PROGRESS_INTERVAL_S
            self._control.send(Loading(self._load.fence, read_bytes, total_bytes, self._phase))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="shard.worker", description=__doc__)
    parser.add_argument("--control", required=True, help="the head's control endpoint")
    parser.add_argument("--register", required=True, help="the device, as a Register message in JSON")
    parser.add_argument("--run-dir", type=Path, required=True, help="folder for sockets; deleted if the parent crashes")
    parser.add_argument("--keys", type=Path, default=None, help="file with this host's keys")
    parser.add_argument("--pieces", type=Path, default=None, help="folder for pieces of models of other hosts")
    parser.add_argument("--own", type=Path, action="append", default=[], help="a weight file that this host has")
    parser.add_argument("--shared", type=Path, default=None, help="folder that such models are opened from")
    parser.add_argument("--head-key", default="", help="the head's public key, if it is on another host")
    options = parser.parse_args(arguments)
    # The parent decides when to stop: a Ctrl-C in its terminal must not cut a step in half here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    start_parent_watch(options.run_dir)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    register = msgspec.json.decode(options.register, type=Register)
    register = msgspec.structs.replace(register, pid=os.getpid(), machine=machine_fingerprint(register.backend))
    keys = read_keys(options.keys) if options.keys is not None else None
    folders = None
    if options.pieces is not None:
        folders = PieceFolders(pieces=options.pieces, shared=options.shared, local_files=tuple(options.own))
    Worker(options.control, register, options.run_dir, keys=keys, head_key=options.head_key, folders=folders).run()
    return 0
