"""Does a plan's memory hold? In a lab of two hosts with little more memory than `plan` says, and with too little.

python -m bench.overcommit --random-1b FOLDER [--context 2048] [--above 1.05] [--forced 0.99 0.97 …] --json FILE

fits: both hosts get `--above` times what the plan needs of them. The ring must load, and answer a request of the full
context, with no process killed. too small: a host gets a part of what the whole model needs, and `potluck up` must
refuse it; then a worker that claims to have more is made to load all the same, and, if it survives that, to answer a
request of the full context. The claim is all that is forged: head, worker and request are real. Memory is anonymous
(weights are copied out of their files), limits are control groups without swap. Needs root.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import msgspec

from bench.hardware import facts
from bench.head_process import CommandProcess
from bench.lab import HostSpec, Lab, LabSpec, head_options, join_options, pair_hosts
from bench.lab.pairing import home_of
from bench.prediction import LLAMA_1B, random_model
from devices.device import HOST_MEMORY, Device
from devices.identity import load_keys
from planner.demand import HEAD_RESERVE_BYTES
from planner.plan import StagePlan
from potluck.config import Settings
from potluck.planning import estimated_times, plan_for, register_of
from potluck.store import StoredModel
from transport.endpoints import tcp_endpoint
from transport.errors import PotluckError
from transport.key_file import KEY_FILE

_HEAD, _SECOND = "desk", "second"
_STARTS_WITHIN_S = 60.0
_UP_WITHIN_S = 900.0
_ANSWER_WITHIN_S = 1200.0
_ANSWER_TOKENS = 8
_DEVICE = ("--device", "torch:cpu")
_MIB = 2**20
_PLENTY_BYTES = 2**40


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """A lab host's memory group: its limit, the most it held at once (what it read from files included, which the
    kernel takes back), what was not from files at the end, and how many of its processes were killed."""

    limit_bytes: int
    peak_bytes: int
    anonymous_bytes: int
    killed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`loaded`, and then `answered` a request of the full context; `said` are the last words where one did not."""

    needed_bytes: dict[str, int]
    memory: dict[str, HostMemory]
    refused: str | None = None
    loaded: bool = False
    answered: bool = False
    said: str = ""


class Experiment:
    """One model at one context, in a lab of its own for each question."""

    def __init__(self, model: StoredModel, context_tokens: int) -> None:
        self._model = model
        self._context = context_tokens
        self._options = ("--context", str(context_tokens), "--concurrency", "1", "--threads", "1")

    def stages(self, names: Sequence[str], layers: str) -> tuple[StagePlan, ...]:
        """What `plan` says of devices with plenty of memory."""
        devices = [_device(name, _PLENTY_BYTES) for name in names]
        settings = Settings(context_tokens=self._context, concurrency=1, layers=layers)
        return plan_for(self._model, estimated_times(self._model, devices, _HEAD), settings).stages

    def fits(self, above: float) -> Outcome:
        """Half of the layers on each host, the head's own memory on the first."""
        half = self._model.spec.num_layers // 2
        layers = f"cpu={half},{_SECOND}/cpu={self._model.spec.num_layers - half}"
        head, second = self.stages(["cpu", f"{_SECOND}/cpu"], layers)
        needed = {_HEAD: head.memory_bytes + HEAD_RESERVE_BYTES, _SECOND: second.memory_bytes}
        limits = {name: int(above * num_bytes) for name, num_bytes in needed.items()}
        with ExitStack() as stack:
            lab = stack.enter_context(Lab(_lab_of(limits)))
            started = self._up(stack, lab, "--layers", layers, "--wait-for", "2")
            started.wait_for_file(lab.facts.folder / _HEAD / "run" / "head.json", _STARTS_WITHIN_S)
            door = pair_hosts(lab, _HEAD, [_SECOND])
            _command(stack, lab, _SECOND, ["join", *join_options(lab, _SECOND, door), *_DEVICE])
            return self._outcome(lab, started, needed)

    def refused(self, part: float) -> str | None:
        """What `up` says on a host with `part` of what the whole model needs; None if it would load it."""
        lab_spec = _lab_of({_HEAD: int(part * (self._whole("cpu") + HEAD_RESERVE_BYTES))})
        with ExitStack() as stack:
            lab = stack.enter_context(Lab(lab_spec))
            started = self._up(stack, lab)
            try:
                started.wait_for_facts(_UP_WITHIN_S)
            except RuntimeError as error:
                return str(error)
            return None

    def forced(self, part: float) -> Outcome:
        """The whole model on a host with `part` of the memory that it needs, whose worker claims to have plenty."""
        name = f"{_SECOND}/cpu"
        needed = self._whole(name)
        limits = {_SECOND: int(part * needed)}
        with ExitStack() as stack:
            lab = stack.enter_context(Lab(_lab_of({_HEAD: None, **limits})))
            layers = f"{name}={self._model.spec.num_layers}"
            started = self._up(stack, lab, "--layers", layers, "--wait-for", "2", "--estimate")
            started.wait_for_file(lab.facts.folder / _HEAD / "run" / "head.json", _STARTS_WITHIN_S)
            self._forged_worker(stack, lab, name)
            return self._outcome(lab, started, {_SECOND: needed})

    def _whole(self, name: str) -> int:
        return self.stages([name], f"{name}={self._model.spec.num_layers}")[0].memory_bytes

    def _up(self, stack: ExitStack, lab: Lab, *options: str) -> CommandProcess:
        network = head_options(lab, _HEAD)
        arguments = ["up", self._model.name, *self._options, *network, *_DEVICE, *options, "--json"]
        return _command(stack, lab, _HEAD, arguments)

    def _forged_worker(self, stack: ExitStack, lab: Lab, name: str) -> None:
        register = register_of(_device(name, _PLENTY_BYTES), address=lab.address(_SECOND))
        run_dir = Path(lab.facts.folder) / _SECOND / "run" / "forged"
        run_dir.mkdir(parents=True)
        door = pair_hosts(lab, _HEAD, [_SECOND])
        arguments = ["--control", _control(lab, door), "--run-dir", str(run_dir)]
        arguments += ["--register", msgspec.json.encode(register).decode()]
        head_key = load_keys(home_of(lab, _HEAD) / "identity").public
        home = home_of(lab, _SECOND)
        arguments += ["--keys", str(home / "identity" / KEY_FILE), f"--head-key={head_key}"]
        arguments += ["--pieces", str(home / "pieces"), "--shared", str(home / "shared")]
        command = [sys.executable, "-P", "-m", "shard.worker", *arguments]
        worker = lab.popen(
            _SECOND, command, stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL, environment={"OMP_NUM_THREADS": "1"}
        )
        stack.callback(worker.kill)

    def _outcome(self, lab: Lab, head: CommandProcess, needed: dict[str, int]) -> Outcome:
        loaded = answered = False
        said = ""
        try:
            head.wait_for_facts(_UP_WITHIN_S)
            loaded = True
            said = self._ask(lab)
            answered = not said
        except RuntimeError as error:
            said = str(error)
        memory = {name: _memory_of(lab, name) for name in needed}
        return Outcome(needed_bytes=needed, memory=memory, loaded=loaded, answered=answered, said=said)

    def _ask(self, lab: Lab) -> str:
        """Fill the context to the last word; what went wrong, or nothing."""
        lengths = ("--prompt", str(self._context - _ANSWER_TOKENS), "--output", str(_ANSWER_TOKENS))
        command = [sys.executable, "-P", "-m", "bench.serve", *lengths, "--concurrency", "1", "--rounds", "1"]
        done = lab.run(_HEAD, command, limited=False, timeout_s=_ANSWER_WITHIN_S)
        return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no answer"])[-1]


def _command(stack: ExitStack, lab: Lab, host: str, arguments: Sequence[str]) -> CommandProcess:
    process = CommandProcess(arguments, lambda command, **options: lab.popen(host, command, **options))
    stack.callback(process.stop)
    return process


def _control(lab: Lab, door: str) -> str:
    """Where workers of other hosts register; the door says so."""
    host, _, port = door.partition(":")
    ask = f"from devices.pair_client import ask_door; print(ask_door({host!r}, {port}).control_port)"
    done = lab.run(_SECOND, [sys.executable, "-c", ask], limited=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["the head's door does not answer"])[-1])
    return tcp_endpoint(host, int(done.stdout))


def _lab_of(limits: dict[str, int | None] | dict[str, int]) -> LabSpec:
    return LabSpec(
        hosts=tuple(
            HostSpec(name=name, memory_bytes=None if limit is None else limit // _MIB * _MIB)
            for name, limit in limits.items()
        )
    )


def _device(name: str, free_bytes: int) -> Device:
    host = name.partition("/")[0] if "/" in name else _HEAD
    return Device(
        name=name,
        backend="torch",
        kind="cpu",
        host=host,
        threads=1,
        free_bytes=free_bytes,
        total_bytes=free_bytes,
        bandwidth_bytes_per_s=1e10,
        compute_dtype="bfloat16",
        memory_pool=f"{host}{HOST_MEMORY}",
    )


def _memory_of(lab: Lab, host: str) -> HostMemory:
    """Of its control group, v1 or v2."""
    for group in map(Path, lab.facts.hosts[host].groups):
        if (group / "memory.max_usage_in_bytes").exists():
            names = ("memory.limit_in_bytes", "memory.max_usage_in_bytes", "total_rss", "memory.oom_control")
        elif (group / "memory.peak").exists():
            names = ("memory.max", "memory.peak", "anon", "memory.events")
        else:
            continue
        limit, peak, anonymous, kills = names
        return HostMemory(
            limit_bytes=int((group / limit).read_text()),
            peak_bytes=int((group / peak).read_text()),
            anonymous_bytes=int(_counts(group / "memory.stat")[anonymous]),
            killed=int(_counts(group / kills)["oom_kill"]),
        )
    raise RuntimeError(f"{host} has no memory group")


def _counts(file: Path) -> dict[str, str]:
    return dict(line.split() for line in file.read_text().splitlines())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random-1b", type=Path, required=True, help="a random Llama-3.2-1B, written to this folder")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--above", type=float, default=1.05, help="memory of the hosts, in parts of what is needed")
    parser.add_argument("--forced", type=float, nargs="*", default=[0.99, 0.97, 0.95])
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    try:
        model = random_model(LLAMA_1B, options.random_1b)
        experiment = Experiment(model, options.context)
        result: dict[str, Any] = {**facts(), "model": model.name, "context_tokens": options.context}
        result["fits"] = {"above": options.above, **asdict(experiment.fits(options.above))}
        _report(options.json, result, "fits")
        result["too_small"] = []
        for part in options.forced:
            refused = experiment.refused(part)
            result["too_small"].append({"part": part, **asdict(experiment.forced(part)), "refused": refused})
            _report(options.json, result, "too_small")
    except (PotluckError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _report(file: Path, result: dict[str, Any], key: str) -> None:
    found = result[key][-1] if isinstance(result[key], list) else result[key]
    print(key, json.dumps(found), file=sys.stderr, flush=True)
    file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
