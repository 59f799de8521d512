"""Which Potluck this is, and what it stands on: for reports of errors, and for two hosts that should be alike."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import zmq

from devices.platform_name import platform_name
from transport.messages import PROTOCOL_VERSION

_LIBRARIES = ("torch", "transformers", "mlx", "mlx-lm", "llvmlite", "numpy", "pyzmq", "huggingface-hub")


def versions() -> dict[str, str | int | bool | None]:
    """By name; None for what is not installed. Imports none of the large libraries.

    Hosts can work together if `protocol` is the same.
    """
    found: dict[str, str | int | bool | None] = {
        "potluck": version("potluck"),
        "protocol": PROTOCOL_VERSION,
        "platform": platform_name(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "libzmq": zmq.zmq_version(),
        "curve": bool(zmq.has("curve")),
    }
    return found | {name: _installed(name) for name in _LIBRARIES}


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
