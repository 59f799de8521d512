"""Every error a user can meet, as one tree, with the code that carries it across processes.

PotluckError
├── BadRequest            what was asked for can't be done as asked (HTTP 400)
├── ModelNotFound         no such model in the store, or no such file (404)
├── BadCheckpoint         files that are truncated, corrupt or not what they say
├── UnsupportedModel      an architecture or a feature of it that a backend can't run
├── DoesNotFit            the pool's memory can't hold it
├── DownloadFailed        a pull that did not complete (resumable)
├── NoSpace               a disk that is too full
├── ConfigError           a config file, option or environment variable
├── AlreadyRunning        another head runs on this host
├── NotRunning            no head runs on this host
├── PortInUse             the endpoint's port is taken
├── Busy                  the queue is full; try again (429)
├── RingDown              a stage is gone; requests can't be served (503)
├── HostRevoked           a RingDown: a host was put out of the pool while its devices served (503)
├── StageFailed           a stage could not load or could not run a step
├── BadMessage            a message that breaks the protocol or a limit
├── NotAllowed            who asks is not paired, was revoked, or has no key (403)
├── PairingFailed         a wrong, used or expired code or invite, or a pairing that was refused
├── VersionMismatch       two hosts whose versions of Potluck do not understand each other
├── WrongBytes            what came is not what its hash says
└── DeadlineExceeded      something waited for did not come in time
"""

from __future__ import annotations

from typing import ClassVar

from msgspec import Struct


class PotluckError(Exception):
    """What went wrong, with values, and `hint`: what to do next."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class BadRequest(PotluckError):
    """A request with a field that can't be honoured; `param` names it."""

    code = "invalid_request"
    status = 400

    def __init__(self, message: str, *, hint: str = "", param: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.param = param


class ModelNotFound(PotluckError):
    code = "model_not_found"
    status = 404


class BadCheckpoint(PotluckError):
    code = "bad_checkpoint"


class UnsupportedModel(PotluckError):
    code = "unsupported_model"
    status = 400


class DoesNotFit(PotluckError):
    code = "does_not_fit"
    status = 503


class DownloadFailed(PotluckError):
    code = "download_failed"


class NoSpace(PotluckError):
    code = "no_space"


class ConfigError(PotluckError):
    code = "bad_config"


class AlreadyRunning(PotluckError):
    code = "already_running"


class NotRunning(PotluckError):
    code = "not_running"


class PortInUse(PotluckError):
    code = "port_in_use"


class Busy(PotluckError):
    code = "busy"
    status = 429


class RingDown(PotluckError):
    code = "ring_down"
    status = 503


class NeighbourGone(RingDown):
    code = "neighbour_gone"


class HostRevoked(RingDown):
    code = "host_revoked"


class StageFailed(PotluckError):
    code = "stage_failed"
    status = 503


class BadMessage(PotluckError):
    code = "bad_message"


class NotAllowed(PotluckError):
    code = "not_allowed"
    status = 403


class PairingFailed(PotluckError):
    code = "pairing_failed"


class VersionMismatch(PotluckError):
    code = "version_mismatch"


class WrongBytes(PotluckError):
    code = "wrong_bytes"


class DeadlineExceeded(PotluckError):
    code = "deadline_exceeded"
    status = 504


def _tree(root: type[PotluckError]) -> dict[str, type[PotluckError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


class ErrorInfo(Struct, frozen=True):
    """An error as it crosses processes."""

    code: str
    message: str
    hint: str = ""

    @classmethod
    def of(cls, error: Exception, otherwise: type[PotluckError] = PotluckError) -> ErrorInfo:
        """What is no PotluckError is `otherwise`."""
        if isinstance(error, PotluckError):
            return cls(error.code, error.message, error.hint)
        return cls(otherwise.code, f"{type(error).__name__}: {error}")

    def error(self, *, of: str = "") -> PotluckError:
        """As an exception here; `of` is whose it is."""
        return error_from_code(self.code, f"{of}: {self.message}" if of else self.message, self.hint)


def error_from_code(code: str, message: str, hint: str = "") -> PotluckError:
    """The error another process reported, as an exception here; an unknown code is a plain PotluckError."""
    return _tree(PotluckError).get(code, PotluckError)(message, hint=hint)
