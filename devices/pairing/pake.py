"""How two hosts that know one secret come to trust each other's keys. Values in, values out; the pairing server sends
them.

    joiner                        head
      Knock                 →
                            ←     DoorFacts
      Begin   (SPAKE2)      →                      counts as a guess from here
                            ←     Answer  (SPAKE2)
      Confirm (proof)       →                      the joiner proves first: who guesses learns nothing from the head
                            ←     Confirmed (proof)
                            ←     Waiting …        while the head's user is asked
                            ←     Result  (proof)

SPAKE2 (as in RFC 9382; the messages are those of the library) gives both the same session key only if both know the
secret and saw the same `PakeStart` and `PoolInfo`, which are its identities: both public keys, both names, the pool,
versions and ports. Someone in between who changes one of them has one guess, and is noticed by both. Everything that
counts afterwards is authenticated by that key.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct
from spake2 import SPAKE2_A, SPAKE2_B, SPAKEError
from spake2.ed25519_basic import NotOnCurve

from devices.pairing.credentials import Code, CredentialKind, Invite, RefusalReason
from transport.errors import BadMessage
from transport.security.curve import KEY_CHARACTERS

__all__ = ["Candidate", "Code", "HeadPake", "Invite", "JoinerPake", "PoolInfo"]

MAX_TEXT_CHARACTERS = 64
_SPAKE_BYTES = 33
_PROOF_BYTES = 32

Key = Annotated[str, Meta(min_length=KEY_CHARACTERS, max_length=KEY_CHARACTERS)]
ShortText = Annotated[str, Meta(max_length=MAX_TEXT_CHARACTERS)]
Spake = Annotated[bytes, Meta(min_length=_SPAKE_BYTES, max_length=_SPAKE_BYTES)]
Proof = Annotated[bytes, Meta(min_length=_PROOF_BYTES, max_length=_PROOF_BYTES)]
Port = Annotated[int, Meta(ge=0, le=65535)]


# Fields may be added to the first two: hosts of other versions must understand them well enough to say so.


class PairingHello(Struct, frozen=True, kw_only=True, tag="hello"):
    """Who is there? `potluck` is the version of the package."""

    protocol: int
    potluck: ShortText


class PoolInfo(Struct, frozen=True, kw_only=True, tag="door"):
    """What a head tells anyone: its pool's id, its name and public key, its versions, the port of its control."""

    pool: ShortText
    name: ShortText
    key: Key
    protocol: int
    potluck: ShortText
    control_port: Port


class PakeStart(Struct, frozen=True, kw_only=True, tag="begin", forbid_unknown_fields=True):
    """The host that wants in, and the first message of SPAKE2."""

    kind: CredentialKind
    key: Key
    name: ShortText
    platform: ShortText
    spake: Spake


class PakeReply(Struct, frozen=True, kw_only=True, tag="answer", forbid_unknown_fields=True):
    spake: Spake


class PakeConfirm(Struct, frozen=True, kw_only=True, tag="confirm", forbid_unknown_fields=True):
    proof: Proof


class PakeConfirmed(Struct, frozen=True, kw_only=True, tag="confirmed", forbid_unknown_fields=True):
    proof: Proof


class PairingPending(Struct, frozen=True, tag="waiting", forbid_unknown_fields=True):
    """The head's user has not answered yet."""


class PairingRefused(Struct, frozen=True, kw_only=True, tag="refused", forbid_unknown_fields=True):
    """No pairing. `guesses_left` is how many more there can be with this code."""

    reason: RefusalReason
    guesses_left: int = 0


class PairingResult(Struct, frozen=True, kw_only=True, tag="result", forbid_unknown_fields=True):
    """`body` is an `Outcome` in JSON."""

    body: Annotated[bytes, Meta(max_length=1024)]
    proof: Proof


class PairingOutcome(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the head's user decided; if it is yes, `name` is what the host is called in the pool. "failed" is a roster
    that can't be written."""

    decision: Literal["allowed", "refused", "unanswered", "failed"]
    name: ShortText = ""


JoinerMessage = PairingHello | PakeStart | PakeConfirm
HeadMessage = PoolInfo | PakeReply | PakeConfirmed | PairingPending | PairingRefused | PairingResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A host that knows the secret and wants to be let in, from `address`. `gone` is set when it no longer waits."""

    key: str
    name: str
    platform: str
    address: str
    gone: threading.Event = field(default_factory=threading.Event, compare=False)


class JoinerPake:
    """One exchange of the host that wants in. Its methods are called in the order of the messages."""

    def __init__(
        self, secret: str, info: PoolInfo, *, kind: CredentialKind, key: str, name: str, platform: str
    ) -> None:
        identity = PakeStart(
            kind=kind, key=key, name=name[:MAX_TEXT_CHARACTERS], platform=platform[:MAX_TEXT_CHARACTERS], spake=b""
        )
        self._spake = SPAKE2_A(secret.encode(), idA=_encode(identity), idB=_encode(info))
        self.start = msgspec.structs.replace(identity, spake=self._spake.start())
        self._session = secrets.token_bytes(_PROOF_BYTES)  # Nobody's, until it is agreed on.

    def confirm(self, reply: PakeReply) -> PakeConfirm:
        """Raises BadMessage."""
        self._session = _session_key(self._spake, reply.spake)
        return PakeConfirm(proof=_proof(self._session, "joiner"))

    def verify(self, confirmed: PakeConfirmed) -> bool:
        """Whether the head knows the secret, and saw what this side saw."""
        return hmac.compare_digest(confirmed.proof, _proof(self._session, "head"))

    def outcome(self, result: PairingResult) -> PairingOutcome:
        """Raises BadMessage if it is not what the head said."""
        if not hmac.compare_digest(result.proof, _proof(self._session, "result", result.body)):
            raise BadMessage("the result of the pairing does not come from the head")
        try:
            return msgspec.json.decode(result.body, type=PairingOutcome)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise BadMessage(f"the result of the pairing can't be read: {error}") from error


class HeadPake:
    """One exchange of the head. `answer` answers `begin`. Raises BadMessage."""

    def __init__(self, secret: str, info: PoolInfo, start: PakeStart) -> None:
        identity = msgspec.structs.replace(start, spake=b"")
        spake = SPAKE2_B(secret.encode(), idA=_encode(identity), idB=_encode(info))
        self.reply = PakeReply(spake=spake.start())
        self._session = _session_key(spake, start.spake)

    def verify(self, confirm: PakeConfirm) -> bool:
        """Whether the other host knows the secret, and saw what this side saw."""
        return hmac.compare_digest(confirm.proof, _proof(self._session, "joiner"))

    def confirmed(self) -> PakeConfirmed:
        return PakeConfirmed(proof=_proof(self._session, "head"))

    def result(self, outcome: PairingOutcome) -> PairingResult:
        body = msgspec.json.encode(outcome)
        return PairingResult(body=body, proof=_proof(self._session, "result", body))


def _encode(message: PakeStart | PoolInfo) -> bytes:
    """The same bytes on both sides: fields in the order of the struct."""
    return msgspec.json.encode(message)


def _session_key(spake: SPAKE2_A | SPAKE2_B, message: bytes) -> bytes:
    try:
        session: bytes = spake.finish(message)
    except (SPAKEError, NotOnCurve, ValueError) as error:
        raise BadMessage("the other side's part of the key exchange is none") from error
    return session


def _proof(session: bytes, label: str, data: bytes = b"") -> bytes:
    return hmac.new(session, label.encode() + b"\0" + data, hashlib.sha256).digest()
