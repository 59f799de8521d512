"""The engine process of a head: one for all of its rings, as long as the model lies in the same place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from potluck.engine.client import EngineClient
from potluck.engine.settings import EngineSettings, RingSpec
from potluck.host.local_host import ThisHost
from potluck.store.manifest import StoredModel
from transport.errors import PotluckError, RingDown
from transport.links.endpoints import fixed_local_endpoint
from transport.messages.ring import Fence
from transport.process.child_process import ChildProcess, stop_processes
from transport.security.curve import Prepare

_START_TIMEOUT_S = 60.0
_READY_TIMEOUT_S = 300.0
_DETACH_TIMEOUT_S = 2.0


class EngineProcess:
    """Starts it. Rings are attached one after the other; `stop` ends it."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        run_dir: Path,
        model: StoredModel,
        *,
        here: ThisHost,
        logs: Path,
        client_auth: Callable[[str], Prepare | None],
        prefix_cache: bool = True,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`client_auth` is for a socket that connects to a process of this host; `on_change` is called when it is not
        ready any more, and must not block."""
        self.model_path = model.path
        self.api_endpoint = fixed_local_endpoint(run_dir, f"api-{id(self):x}")
        """Where it answers the HTTP side."""
        self._log = logs / "engine.log"
        with contextlib.suppress(OSError):  # Windows, while somebody looks at it.
            self._log.unlink(missing_ok=True)
        settings = EngineSettings(
            model=model.name,
            model_path=str(model.path),
            api=self.api_endpoint,
            run_dir=str(run_dir),
            hidden_size=model.spec.hidden_size,
            vocab_size=model.spec.vocab_size,
            prefix_cache=prefix_cache,
            keys=str(here.keys_file) if here.keys_file is not None else None,
        )
        arguments = ["--settings", msgspec.json.encode(settings).decode(), "--remove", str(run_dir)]
        self._child = ChildProcess("potluck.engine.process", arguments, log=self._log, threads=1)
        self._is_stopped = False
        self.client = EngineClient(
            context, self.api_endpoint, prepare=client_auth(self.api_endpoint), on_change=on_change
        )

    @property
    def pid(self) -> int:
        return self._child.pid

    def attach(self, ring: RingSpec) -> str:
        """Returns where it listens for the last stage. Raises PotluckError."""
        return self.client.attach(ring, self.check, _START_TIMEOUT_S)

    def warm_up(self, fence: Fence) -> None:
        """All stages have loaded: returns once the ring has answered. Raises PotluckError."""
        self.client.warm_up(fence)
        self.client.wait_ready(_READY_TIMEOUT_S)

    def end_ring(self, error: PotluckError) -> None:
        """Its requests end with `error`, and it hears nobody any more, even if the process has to end for that."""
        if not self.client.detach(error, _DETACH_TIMEOUT_S if self.is_running() else 0.0):
            self.stop()

    def check(self) -> None:
        """Raises RingDown if the process is gone."""
        if (error := self.exit_error()) is not None:
            raise error

    def exit_error(self) -> PotluckError | None:
        """Why the process is gone, if it has ended by itself."""
        code = self._child.exit_code()
        if code is None or self._is_stopped:
            return None
        words = self._child.last_log_line()
        return RingDown(
            f"the engine ended with exit code {code}" + (f": {words}" if words else ""), hint=f"its log: {self._log}"
        )

    def is_running(self) -> bool:
        return self._child.exit_code() is None

    def stop(self) -> None:
        self._is_stopped = self.is_running()
        self.client.close()
        stop_processes([self._child])
