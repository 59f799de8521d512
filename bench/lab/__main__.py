"""Run a lab from a terminal.

python -m bench.lab up FILE [-- COMMAND ...]       until the command ends, or without one until Ctrl-C
python -m bench.lab exec [--free] HOST -- COMMAND  in a host; --free: on its network without its limits
python -m bench.lab down                           remove what crashed labs left
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from bench.lab.lab import Lab, launch_command, remove_leftovers, running_lab
from bench.lab.spec import LabError, load_spec
from transport.errors import PotluckError

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_END_WITHIN_S = 10.0


def up(file: Path, command: Sequence[str], store: Path | None) -> int:
    """The command's exit code; 130 when interrupted."""
    for number in _ENDING:
        signal.signal(number, _interrupt)
    try:
        with Lab(load_spec(file), store=store) as lab:
            for name, host in lab.facts.hosts.items():
                print(f"{name}: {host.address}", file=sys.stderr)
            if not command:
                print(f"POTLUCK_LAB={lab.facts.file}; Ctrl-C takes it down.", file=sys.stderr)
                threading.Event().wait()
            return _run(command, lab.environment())
    except KeyboardInterrupt:
        return 130


def _run(command: Sequence[str], environment: dict[str, str]) -> int:
    try:
        child = subprocess.Popen(command, env=environment)
    except OSError as error:
        raise LabError(f"{command[0]} can't be run: {error.strerror}") from error
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.terminate()
        try:
            child.wait(_END_WITHIN_S)
        except subprocess.TimeoutExpired:
            child.kill()
        raise


def execute(host: str, command: Sequence[str], *, limited: bool) -> None:
    """Becomes the command."""
    argv, environment = launch_command(running_lab(), host, command, limited=limited)
    os.execvpe(argv[0], argv, environment)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # Once: taking down must not be cut in half.
    for ending in _ENDING:
        signal.signal(ending, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="action", required=True)
    up_parser = commands.add_parser("up", help="build the lab of FILE and run a command with it")
    up_parser.add_argument("file", type=Path)
    up_parser.add_argument("--store", type=Path, default=None, help="the POTLUCK_HOME whose models the hosts share")
    exec_parser = commands.add_parser("exec", help="run a command in a host")
    exec_parser.add_argument("--free", action="store_true", help="on the host's network, without its limits")
    exec_parser.add_argument("host")
    commands.add_parser("down", help="remove what crashed labs left")
    own, command = _split(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(own)
    try:
        match options.action:
            case "up":
                return up(options.file, command, options.store)
            case "exec":
                if not command:
                    parser.error("exec needs -- and a command")
                execute(options.host, command, limited=not options.free)
            case _:
                for lab in remove_leftovers():
                    print(f"removed {lab}", file=sys.stderr)
    except PotluckError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What is before and after the first "--"."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


if __name__ == "__main__":
    sys.exit(main())
