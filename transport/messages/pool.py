"""Messages between the head and another host's node, and what names a host that gives pieces of models.

Keys are public CURVE keys in Z85, 40 characters.
"""

from __future__ import annotations

from msgspec import Struct

from transport.errors import ErrorInfo


class NodeHello(Struct, frozen=True, tag="arrive", kw_only=True):
    """A host says that it is there, before its workers register. `potluck` is the version of the package, `platform`
    that of the system; `pieces` is where it gives pieces of models to members of the pool; `clock_s` is its time of
    day, in seconds since 1970."""

    version: int
    potluck: str
    platform: str
    address: str
    pieces: str
    is_wifi: bool = False
    clock_s: float = 0.0


class NodeAccepted(Struct, frozen=True, tag="welcome", kw_only=True):
    """`name` is what the roster calls the host; `members` may take pieces from it; `pieces` and `clock_s` are the
    head's."""

    name: str
    pool: str
    members: tuple[str, ...]
    pieces: str = ""
    clock_s: float = 0.0


class ProbeConnection(Struct, frozen=True, tag="reach"):
    """A host asks the head to connect to `port` of the address that it arrived with, to see whether it can."""

    port: int


class ProbeResult(Struct, frozen=True, tag="reached"):
    """`problem` is empty if the head could."""

    port: int
    problem: str


class MembersChanged(Struct, frozen=True, tag="members"):
    """The pool's members have changed."""

    members: tuple[str, ...]


class ListHostModels(Struct, frozen=True, tag="ask_models", kw_only=True):
    """The head asks a host which models its own store has; answered by `HostModels`."""

    token: int = 0


class HostModel(Struct, frozen=True, array_like=True):
    """`source` is what to pull it from; empty where that says something about the host alone."""

    name: str
    source: str
    num_bytes: int


class HostModels(Struct, frozen=True, tag="host_models"):
    token: int
    models: tuple[HostModel, ...]


class OfferModel(Struct, frozen=True, tag="ask_offer", kw_only=True):
    """The head asks a host to give a model of its store in pieces to whoever is in the pool; answered by
    `OfferProgress` now and then, and `ModelOffered`."""

    token: int = 0
    model: str


class OfferProgress(Struct, frozen=True, tag="preparing"):
    """So much of the model has been read, to name its pieces."""

    token: int
    done_bytes: int
    total_bytes: int


class ModelOffered(Struct, frozen=True, tag="offered"):
    """The host gives pieces of the model with this digest (see `SharedModel`); its files have `num_bytes` together."""

    token: int
    digest: str
    num_bytes: int


class FindFile(Struct, frozen=True, tag="ask_files", kw_only=True):
    """The head asks a host whether it has a whole file with this SHA-256, and to give it; answered by `HostFile`."""

    token: int = 0
    sha256: str


class HostFile(Struct, frozen=True, tag="host_file"):
    """`num_bytes` of the file, which the host gives by its SHA-256 as if it were one piece; 0: it does not have it."""

    token: int
    num_bytes: int


class HostFault(Struct, frozen=True, tag="host_fault"):
    """What was asked of the host could not be done."""

    token: int
    error: ErrorInfo


HostRequest = ListHostModels | OfferModel | FindFile
HostReply = HostModels | ModelOffered | HostFile | HostFault


class PiecePeer(Struct, frozen=True, array_like=True):
    """A host that gives pieces of models at `endpoint` and has the key `key`."""

    name: str
    endpoint: str
    key: str


class PieceHint(Struct, frozen=True, array_like=True):
    """Pieces [first, last) of the model's list are best had from the host with the key `peer`: it is getting them from
    the head now."""

    peer: str
    first: int
    last: int


class SharedModel(Struct, frozen=True, kw_only=True):
    """A model that lies on other hosts. `digest` is the SHA-256 of its piece list; `peers` are asked for what is
    missing, the head last."""

    name: str
    digest: str
    peers: tuple[PiecePeer, ...]
    hints: tuple[PieceHint, ...] = ()
