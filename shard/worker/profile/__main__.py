"""Profiles a model on one device: `python -P -m shard.worker.profile --model FOLDER --backend torch --device cpu`.

Prints one JSON object. With `--serve` it is a child: a line of JSON for all that happens ("doing", then "report" or
"error"), and it waits for commands on standard input ("steady SECONDS") until that ends, with its parent.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any, get_args

import msgspec

from shard.worker.profile.report import BUDGET_S
from transport.errors import PotluckError, StageFailed
from transport.messages.ring import WeightsForm
from transport.process.child import EXIT_ORPHANED, lines_from_parent, thread_environment

_STDIN = 0
_COMMAND_POLL_S = 0.02
"""Devices that are to work at the same time start within a moment."""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    os.environ.update(thread_environment(options.threads, os.environ))
    commands: queue.SimpleQueue[str] = queue.SimpleQueue()
    if options.serve:
        threading.Thread(target=_read_commands, args=(commands,), name="commands", daemon=True).start()
    try:
        _run(options, commands)
    except PotluckError as error:
        return _send_error(error, options.serve)
    except Exception as error:  # noqa: BLE001 - the root of the process: whatever it was, its parent must hear of it
        return _send_error(StageFailed(f"{type(error).__name__}: {error}"), options.serve)
    return 0


def _run(options: argparse.Namespace, commands: queue.SimpleQueue[str]) -> None:
    from shard.pieces.open import open_checkpoint, open_with_dummy_weights
    from shard.worker.profile.profiler import Profiler
    from shard.worker.profile.report import ProfileSettings

    settings = ProfileSettings(
        backend=options.backend,
        device=options.device,
        dtype=options.dtype,
        budget_s=options.budget,
        memory_bytes=options.memory,
        weights=options.weights,
        dummy_weights=options.dummy_weights,
    )
    checkpoint = (open_with_dummy_weights if settings.dummy_weights else open_checkpoint)(options.model)
    on_progress = (lambda what: _send(doing=what)) if options.serve else (lambda what: None)
    profiler = Profiler(checkpoint, settings, on_progress=on_progress)
    report = msgspec.to_builtins(profiler.profile())
    if not options.serve:
        print(json.dumps(report))
        return
    _send(report=report)
    while True:
        match commands.get().split():
            case ["steady", seconds]:
                _send(steady_s=profiler.measure_under_load(float(seconds)))
            case words:
                raise StageFailed(f"a profile does not know the command {' '.join(words)!r}")


def _read_commands(commands: queue.SimpleQueue[str]) -> None:
    for line in lines_from_parent(_STDIN, poll_s=_COMMAND_POLL_S):
        commands.put(line)
    os._exit(EXIT_ORPHANED)  # The parent is gone, or wants no more.


def _send(**fact: Any) -> None:
    print(json.dumps(fact), flush=True)


def _send_error(error: PotluckError, serve: bool) -> int:
    if serve:
        _send(error={"code": error.code, "message": error.message, "hint": error.hint})
    print(error, file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shard.worker.profile", description="Measure a model's layers on one device.")
    parser.add_argument("--model", type=Path, required=True, help="the model's folder")
    parser.add_argument("--backend", choices=("torch", "mlx"), required=True)
    parser.add_argument("--device", required=True, help="cpu, cuda:0, mps or mlx")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--weights", choices=get_args(WeightsForm), default="stored", help="how matrices are held")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds to measure for, after loading")
    parser.add_argument("--memory", type=int, default=None, help="most bytes of weights to hold at once")
    parser.add_argument("--dummy-weights", action="store_true", help="make up the weights: only the rest is read")
    parser.add_argument("--serve", action="store_true", help="speak lines of JSON with a parent")
    return parser


if __name__ == "__main__":
    sys.exit(main())
