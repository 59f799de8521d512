"""Whether a paired host is still a member: it asks the head's pairing server, and is sure who answers.

    host                          head
      Ask       (nonce)     →
                            ←     Standing  (nonce, proof)

The proof is made with what only the head and the host whose key is asked about can compute: X25519 (RFC 7748) of their
CURVE keys. It says one of three words without showing it: the host tries them all. So nobody else learns from it who is
paired, whoever's key he asks about, and nobody else can answer in the head's place. It is about the pool's
information that the server has just sent, too: the bytes, since a head of a later version may tell more than this one
knows. These messages stay as they are, so that hosts of different versions can prove that to each other.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Annotated, Literal, get_args

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from msgspec import Meta, Struct
from zmq.utils import z85

from devices.pairing.pake import Key, Proof
from devices.pairing.roster import Roster
from transport.errors import BadMessage
from transport.security.curve import KeyPair, is_key

_NONCE_BYTES = 32
_LABEL = b"potluck standing 1\0"

Nonce = Annotated[bytes, Meta(min_length=_NONCE_BYTES, max_length=_NONCE_BYTES)]
MembershipStatus = Literal["member", "revoked", "unknown"]
"""What a head says of a key."""


class StatusRequest(Struct, frozen=True, kw_only=True, tag="ask", forbid_unknown_fields=True):
    """Does the host with this key count?"""

    key: Key
    nonce: Nonce


class StatusReply(Struct, frozen=True, kw_only=True, tag="standing", forbid_unknown_fields=True):
    nonce: Nonce
    proof: Proof


def new_status_request(keys: KeyPair) -> StatusRequest:
    return StatusRequest(key=keys.public, nonce=secrets.token_bytes(_NONCE_BYTES))


def prove_status(request: StatusRequest, info_line: bytes, roster: Roster, keys: KeyPair) -> StatusReply:
    """The head's answer, with its own keys, after it has `told` its facts. Raises BadMessage for a key that is none."""
    member = roster.member(request.key)
    status: MembershipStatus = "unknown" if member is None else "revoked" if member.is_revoked else "member"
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return StatusReply(nonce=nonce, proof=_proof(_shared_secret(keys, request.key), request, nonce, info_line, status))


def verify_status(
    reply: StatusReply, request: StatusRequest, info_line: bytes, head_key: str, keys: KeyPair
) -> MembershipStatus:
    """What the head said of this host. Raises BadMessage if it was not that head, or has not `told` those facts."""
    shared = _shared_secret(keys, head_key)
    statuses: tuple[MembershipStatus, ...] = get_args(MembershipStatus)
    fitting = [
        status
        for status in statuses
        if hmac.compare_digest(reply.proof, _proof(shared, request, reply.nonce, info_line, status))
    ]
    if not fitting:
        raise BadMessage("who answers can't prove that it is the head")
    return fitting[0]


def _proof(shared: bytes, request: StatusRequest, nonce: bytes, info_line: bytes, status: MembershipStatus) -> bytes:
    # Nonces and keys have one length, and no word begins another one.
    said = _LABEL + request.nonce + nonce + request.key.encode() + status.encode() + info_line
    return hmac.new(shared, said, hashlib.sha256).digest()


def _shared_secret(keys: KeyPair, other: str) -> bytes:
    """Raises BadMessage."""
    if not is_key(other):
        raise BadMessage("a key that is none")
    try:
        own = X25519PrivateKey.from_private_bytes(z85.decode(keys.secret))
        return own.exchange(X25519PublicKey.from_public_bytes(z85.decode(other)))
    except ValueError as error:  # One of the few points that would give everyone the same.
        raise BadMessage("a key that is none") from error
