"""`potluck version` shows the versions of Potluck and of the libraries it uses."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version

import zmq

from devices.pairing.identity import platform_name
from potluck.cli.options import JsonOption
from potluck.cli.terminal import stdout
from transport.messages.ring import PROTOCOL_VERSION


def version_command(json_output: JsonOption = False) -> None:
    """Show which version this is, and those of Python and the libraries that it uses."""
    found = installed_versions()
    if json_output:
        stdout.file.write(json.dumps(found) + "\n")
        return
    width = max(map(len, found))
    for name, value in found.items():
        stdout.print(f"{name:<{width}}  {_version_text(value)}", markup=False, highlight=False, soft_wrap=True)


def _version_text(value: str | int | bool | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not installed" if value is None else str(value)


_LIBRARIES = ("torch", "transformers", "mlx", "mlx-lm", "llvmlite", "numpy", "pyzmq", "huggingface-hub")


def installed_versions() -> dict[str, str | int | bool | None]:
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
