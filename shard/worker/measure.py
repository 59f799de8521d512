"""A worker measures for its head before a ring is loaded: its device in a child process, and links from here."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import zmq

from shard.pieces.model_fetch import ModelFetcher
from shard.worker.profile.process import ProfileProcess
from shard.worker.profile.report import ProfileSettings
from transport.errors import ErrorInfo, PotluckError, StageFailed
from transport.links.link_probe import LinkProbeEnd
from transport.links.secure_endpoints import SecureEndpoints
from transport.messages.control import ControlMessage, Register
from transport.messages.measure import (
    LinkListen,
    LinkListening,
    LinkProbe,
    MeasureFault,
    MeasureReply,
    MeasureRequest,
    MeasureUnderLoad,
    Profile,
    Profiled,
    ProfileProgress,
    UnderLoadTime,
)

log = logging.getLogger(__name__)


class MeasureService:
    """Answers questions in order, in a thread of its own; `ask` and `end` never block. `models` gets models that lie
    on other hosts."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        register: Register,
        *,
        edges: SecureEndpoints,
        models: ModelFetcher | None = None,
        send: Callable[[ControlMessage], None],
    ) -> None:
        self._context = context
        self._register = register
        self._edges = edges
        self._model_fetcher = models
        self._send = send
        self._requests: queue.SimpleQueue[MeasureRequest] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._profile: ProfileProcess | None = None
        self._link: LinkProbeEnd | None = None

    def submit(self, request: MeasureRequest) -> None:
        self._requests.put(request)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="measuring", daemon=True)
            self._thread.start()

    def stop_profile(self) -> None:
        """Free what a profile holds, also one that is still measuring: it is answered by a fault."""
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.close()

    def _run(self) -> None:
        while True:
            request = self._requests.get()
            try:
                reply = self._handle(request)
            except PotluckError as error:
                log.error("it could not be measured: %s", error)
                reply = MeasureFault(request.token, ErrorInfo.of(error))
            except Exception as error:  # The root of the thread: the head must hear of it.
                log.exception("measuring failed")
                reply = MeasureFault(request.token, ErrorInfo.of(error, StageFailed))
            self._send(reply)

    def _handle(self, request: MeasureRequest) -> MeasureReply:
        match request:
            case Profile():
                return self._profile_device(request)
            case MeasureUnderLoad(token=token, seconds=seconds):
                if self._profile is None:
                    raise StageFailed("nothing is profiled now")
                return UnderLoadTime(token, self._profile.measure_under_load(seconds))
            case LinkListen(token=token, listen=listen, shape=shape, upstream=upstream):
                self._close_link()
                endpoint = self._edges.listen_at(listen, f"probe-{token}")
                guard = self._edges.guard(endpoint, upstream)
                self._link = LinkProbeEnd(self._context, endpoint, shape, guard=guard)
                return LinkListening(token, self._link.endpoint)
            case LinkProbe(token=token, next=next, leads=leads, key=key):
                if self._link is None:
                    raise StageFailed("no link is measured now")
                try:
                    probed = self._link.run(next, leads=leads, prepare=self._edges.client_auth(next, key))
                    return msgspec.structs.replace(probed, token=token)
                finally:
                    self._close_link()

    def _profile_device(self, request: Profile) -> Profiled:
        self.stop_profile()
        settings = ProfileSettings(
            backend=self._register.backend,
            device=self._register.kind,
            dtype=request.dtype,
            budget_s=request.budget_s,
            memory_bytes=request.memory_bytes,
            weights=request.weights,
        )
        model = Path(request.model_path)
        if request.shared is not None and self._model_fetcher is not None:
            # Times do not depend on what the numbers are: the weights may stay where they lie.
            model = self._model_fetcher.fetch_metadata(request.shared)
            settings = replace(settings, dummy_weights=True)
        profile = ProfileProcess(model, settings, threads=self._register.threads)
        self._profile = profile
        try:
            report = profile.report(lambda what: self._send(ProfileProgress(request.token, what)))
        except PotluckError:
            self.stop_profile()
            raise
        return Profiled(request.token, report)

    def _close_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
