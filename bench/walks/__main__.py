"""How many files of the project do a token, a plan and a pairing run through, in all processes together?

python -m bench.walks --models FOLDER [--tree FOLDER] [--files]
A file counts if at least one function of it runs: a token from the request on a warm ring to the last byte of its
stream, a plan where nothing has been measured, a pairing from `potluck invite` to the host's acceptance.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

_COMMAND = (sys.executable, "-P", "-c", "from potluck.entry import main; main()")
_DEVICES = ("--device", "torch:cpu", "--device", "mlx", "--threads", "2")
_TIMEOUT_S = 120.0
_TICKS_PER_S = 100  # As in sitecustomize.py.
_BODY = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Name fruits."}],
    "max_tokens": 16,
    "stream": True,
}


class _Walker:
    """Runs commands of the tree in a home of their own, and watches each process of them."""

    def __init__(self, tree: Path, folder: Path, models: Path | None = None) -> None:
        self._folder, self._out, home = folder, folder / "walk", folder / "home"
        for each in (self._out, home):
            each.mkdir(parents=True)
        if models is not None:
            (home / "models").symlink_to(models)
        (folder / "config.toml").write_text("discovery = false\n")
        self._unwatched = {
            **os.environ,
            "PYTHONPATH": str(tree),
            "POTLUCK_HOME": str(home),
            "POTLUCK_RUNTIME": str(folder / "run"),
            "POTLUCK_CONFIG": str(folder / "config.toml"),
            "OMP_NUM_THREADS": "1",
        }
        self._watched = self._unwatched | {
            "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{tree}",
            "POTLUCK_WALK_TREE": str(tree),
            "POTLUCK_WALK_OUT": str(self._out),
        }

    def run(self, *arguments: str, is_watched: bool = True) -> Any:
        """The JSON that a command prints. Raises subprocess.CalledProcessError."""
        environment = self._watched if is_watched else self._unwatched
        command = [*_COMMAND, *arguments, "--json"]
        return json.loads(subprocess.check_output(command, env=environment, text=True, timeout=_TIMEOUT_S))

    @contextmanager
    def serving(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        with (self._folder / "stderr").open("w") as log:
            command = [*_COMMAND, *arguments]
            process = subprocess.Popen(command, env=self._watched, stdout=subprocess.PIPE, stderr=log, text=True)
            try:
                yield process
            finally:
                process.terminate()
                process.wait(60)

    def files(self, since_s: float = 0.0, until_s: float = float("inf")) -> set[str]:
        """In which a function ran between two times of the monotonic clock, in any process."""
        time.sleep(0.5)  # The processes write ten times a second.
        first, last = since_s * _TICKS_PER_S - 1, until_s * _TICKS_PER_S
        processes = [json.loads(path.read_text()) for path in self._out.glob("*.json")]
        return {
            file for ran in processes for file, ticks in ran.items() if any(first <= tick <= last for tick in ticks)
        }


def _token(tree: Path, folder: Path, models: Path) -> set[str]:
    walker = _Walker(tree, folder, models)
    up = ("up", "smollm2", "--no-lan", "--port", "0", "--json", "--estimate", "--use-all")
    with walker.serving(*up, *_DEVICES) as head:
        assert head.stdout is not None
        url = json.loads(head.stdout.readline())["url"]
        for _ in range(2):  # The first warms up.
            since_s = time.monotonic()
            response = httpx.post(f"{url}/v1/chat/completions", json=_BODY, timeout=_TIMEOUT_S)
            until_s = time.monotonic()
            response.raise_for_status()
            time.sleep(1.0)
        return walker.files(since_s, until_s)


def _plan(tree: Path, folder: Path, models: Path) -> set[str]:
    walker = _Walker(tree, folder, models)
    walker.run("plan", "smollm2", *_DEVICES)
    return walker.files()


def _pairing(tree: Path, folder: Path, models: Path) -> set[str]:
    """On two loopback addresses."""
    head, other = _Walker(tree, folder / "alpha", models), _Walker(tree, folder / "beta")
    device = ("--device", "torch:cpu", "--threads", "1", "--no-discovery")
    up = ("up", "smollm2", "--port", "0", "--lan-port", "0", "--json", "--estimate", "--yes", *device)
    with head.serving(*up, "--lan-host", "127.0.0.1", "--host-name", "alpha") as process:
        assert process.stdout is not None
        process.stdout.readline()
        since_s = time.monotonic()
        invite = head.run("invite")["invite"]
        with other.serving("join", invite, *device, "--lan-host", "127.0.0.2", "--host-name", "beta"):
            while not any(
                row["name"] == "beta" and row["connected"] for row in head.run("devices", is_watched=False)["devices"]
            ):
                if time.monotonic() > since_s + _TIMEOUT_S:
                    raise RuntimeError(f"the other host was not accepted within {_TIMEOUT_S:.0f} s")
                time.sleep(0.2)
            until_s = time.monotonic()
            return head.files(since_s, until_s) | other.files(since_s, until_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[2], help="the checkout to count in")
    parser.add_argument("--models", type=Path, required=True, help="the folder `models` of a POTLUCK_HOME with smollm2")
    parser.add_argument("--files", action="store_true", help="name the files too")
    options = parser.parse_args()
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="walk-", ignore_cleanup_errors=True) as folder:
        for name, walk in {"token": _token, "plan": _plan, "pairing": _pairing}.items():
            files = walk(options.tree.resolve(), Path(folder, name), options.models.resolve())
            report[name] = {"files": len(files)} | ({"names": sorted(files)} if options.files else {})
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
