"""CURVE secures every socket that leaves the host: key pairs, their file, and who may connect to which socket.

CurveZMQ: https://rfc.zeromq.org/spec/26/; the handler that decides, ZAP: https://rfc.zeromq.org/spec/27/. A CURVE
server without such a handler lets any key in, so each socket has a domain of its own, enforced: no handler, no
connection.
"""

from __future__ import annotations

import itertools
import logging
import re
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from transport.errors import BadMessage, ConfigError
from transport.process.files import write_atomic

Prepare = Callable[["zmq.Socket[bytes]"], None]
"""Sets more options on a socket before it binds or connects."""

Authorizer = Callable[[str], bool]
"""Whether the public key may connect, and whether what comes from it still counts. Called from several threads."""

log = logging.getLogger("potluck.curve")

KEY_CHARACTERS = 40
_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPair:
    """A CURVE key pair in Z85, 40 characters each."""

    public: str
    secret: str = field(repr=False)


def new_key_pair() -> KeyPair:
    public, secret = zmq.curve_keypair()
    return KeyPair(public=public.decode(), secret=secret.decode())


def is_key(text: str) -> bool:
    """Whether it can be a public key: 32 bytes in Z85."""
    if _KEY.fullmatch(text) is None:
        return False
    try:
        z85.decode(text)
    except struct.error:  # Five characters that stand for more than four bytes hold.
        return False
    return True


def allow_only(key: str) -> Authorizer:
    """Admits that key alone. Raises BadMessage for something that is no key: it came from the head."""
    if not is_key(key):
        raise BadMessage(f"{key!r} is not a public key")
    return lambda candidate: candidate == key


def peer_key(frame: zmq.Frame) -> str:
    """The public key whose connection the frame came by. Empty for a connection without CURVE."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""


def descriptor_of(frame: zmq.Frame) -> int:
    """libzmq's, of the TCP connection that the frame came by; -1 if there is none."""
    try:
        return int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:
        return -1


def address_of(frame: zmq.Frame) -> str:
    """From where the frame's TCP connection comes; empty if there is none."""
    try:
        return str(frame.get("Peer-Address"))
    except zmq.ZMQError:
        return ""


def is_authenticated(routing_id: bytes) -> bool:
    """Whether the socket itself named the connection, as it does for all that have not chosen a name. A chosen one
    could be that of another member, who is away for a moment."""
    return routing_id[:1] == b"\0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """How a socket that others connect to is kept: `prepare` before it binds, `is_authorized` for every message's key,
    and `release` once it is closed."""

    prepare: Prepare
    is_authorized: Authorizer
    release: Callable[[], None] = lambda: None


class Curve:
    """The CURVE keys of this process, and the ZAP handler of one context. Close it before the context."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: KeyPair) -> None:
        self.keys = keys
        self._context = context
        self._authenticator: ThreadAuthenticator | None = None
        self._domains = _Domains()
        self._lock = threading.Lock()

    def guard(self, is_authorized: Authorizer) -> Guard:
        """For a socket that only keys which `is_authorized` accepts can connect to."""
        domain = f"potluck-{next(_numbers)}"
        self._handler().configure_curve_callback(domain, _ZapCallback(is_authorized))
        domains = self._domains

        def prepare(sock: zmq.Socket[bytes]) -> None:
            sock.setsockopt(zmq.CURVE_SERVER, 1)
            sock.setsockopt(zmq.CURVE_PUBLICKEY, self.keys.public.encode())
            sock.setsockopt(zmq.CURVE_SECRETKEY, self.keys.secret.encode())
            sock.setsockopt(zmq.ZAP_DOMAIN, domain.encode())
            sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

        return Guard(prepare=prepare, is_authorized=is_authorized, release=lambda: domains.release(domain))

    def client_auth(self, server_key: str) -> Prepare:
        """For a socket that connects to whoever has `server_key`, and to nobody else. Raises BadMessage."""
        if not is_key(server_key):
            raise BadMessage(f"{server_key!r} is not a public key")

        def prepare(sock: zmq.Socket[bytes]) -> None:
            sock.setsockopt(zmq.CURVE_SERVERKEY, server_key.encode())
            sock.setsockopt(zmq.CURVE_PUBLICKEY, self.keys.public.encode())
            sock.setsockopt(zmq.CURVE_SECRETKEY, self.keys.secret.encode())

        return prepare

    def close(self) -> None:
        with self._lock:
            handler, self._authenticator = self._authenticator, None
        if handler is not None:
            handler.stop()

    def _handler(self) -> ThreadAuthenticator:
        """Started with the first guard: a context may have only one, and most never need it."""
        with self._lock:
            if self._authenticator is None:
                self._authenticator = ThreadAuthenticator(self._context)
                self._authenticator.credentials_providers = self._domains
                self._authenticator.start()
            return self._authenticator


class _Domains(dict[str, "_ZapCallback"]):
    """Of pyzmq's handler: whom to ask about which socket's connections. Its thread looks a domain up twice, so that one
    that is forgotten meanwhile must not be missing: nobody is admitted there."""

    def __missing__(self, domain: str) -> _ZapCallback:
        return _ZapCallback(lambda key: False)

    def release(self, domain: str) -> None:
        self.pop(domain, None)


class _ZapCallback:
    """What pyzmq's handler asks about a key that wants to connect."""

    def __init__(self, is_authorized: Authorizer) -> None:
        self._is_authorized = is_authorized

    def callback(self, domain: str, key: bytes) -> bool:
        try:
            return self._is_authorized(key.decode("ascii", "replace"))
        except Exception:  # The thread that asks would end, and nobody could ever connect again.
            log.exception("whether a key is authorized can't be determined: it is not")
            return False


KEY_FILE = "keys.json"


def read_keys(path: Path) -> KeyPair:
    """Raises ConfigError if it can't be read or holds no keys."""
    try:
        keys = msgspec.json.decode(path.read_bytes(), type=KeyPair)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"this host's keys in {path} can't be read: {error}",
            hint="put the file back; without it, delete it and pair this host anew",
        ) from error
    if not is_key(keys.public) or not is_key(keys.secret):
        raise ConfigError(f"{path} holds no keys", hint="put the file back; or delete it and pair this host anew")
    return keys


def write_keys(path: Path, keys: KeyPair) -> None:
    """For this user alone, at once. Raises OSError."""
    write_atomic(path, msgspec.json.encode(keys))
