"""How fast is one stage beside its peers? The whole model on one thread: ours, transformers', llama.cpp's.

python -m bench.stage.speed [--model smollm2] [--rounds 7] [--threads 1] [--llama-python PYTHON] [--json FILE]
A process for each, all loaded first and then run in turns, round after round, because the machine drifts; ratios are
medians over rounds of ratios within a round. Decode is 128 tokens after a prompt of 128, greedy. transformers has
the file's weights dequantized to bfloat16; llama.cpp the same .gguf, and Q4_0 and Q8_0 made of it. Without an
interpreter that has llama-cpp-python, llama.cpp is left out.

The rest of a token is a step less the time inside of the linear kernels' calls, which are timed in runs of their own.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.targets import REQUANTIZED, SAME_FILE, STAGE_TARGETS, Round, agreement, alternated, run_rounds
from potluck.measure.child_process import ROOT, SystemUnderTest, llama_python, reply_pipe, serve_commands
from potluck.measure.result import hardware_facts, write_result
from potluck.measure.ring import CONTEXT_TOKENS, load_whole
from potluck.store.store import Store
from potluck.system.paths import home_dir
from shard.pieces.open import open_checkpoint
from shard.stage import StageInput, TokenOutput
from shard.torch_backend.cpu.linear import CpuAffineLinear
from shard.torch_backend.cpu.matmul_kernel import matrix_kernels
from shard.torch_backend.cpu.program import Program
from shard.worker.local_stage import LocalStage
from transport.messages.ring import Entry, Op, Open, Release, Sampling, SequenceId

_CHILD = "--child"
_BATCHES = (1, 2, 4, 8)
_PROMPT, _LONG_PROMPT = 128, 512


def measure(
    model: Path, *, rounds: int, threads: int, num_tokens: int, llama: Path | None, scratch: Path
) -> dict[str, object]:
    vocab = open_checkpoint(model).spec.vocab_size
    with ExitStack() as stack:
        systems = [stack.enter_context(one) for one in _systems(model, threads, llama, scratch)]
        by_name = {system.name: system for system in systems}
        for system in systems:
            system.call("generate", prompts=_prompts(vocab, 1, _LONG_PROMPT, seed=-1), num_tokens=4)  # warm
        texts: list[dict[str, list[int]]] = []

        def measure_round(number: int) -> Round:
            order = alternated(systems, number)
            prompt = _prompts(vocab, 1, _PROMPT, seed=number)
            values: Round = {}
            tokens: dict[str, list[int]] = {}
            for system in order:
                answer = system.call("generate", prompts=prompt, num_tokens=num_tokens)
                values[f"{system.name} decode"] = (num_tokens - 1) / answer["decode_s"]
                values[f"{system.name} first 128"] = answer["first_s"]
                (tokens[system.name],) = answer["tokens"]
            long_prompt = _prompts(vocab, 1, _LONG_PROMPT, seed=number)
            for system in order:
                values[f"{system.name} first 512"] = system.call("generate", prompts=long_prompt, num_tokens=1)[
                    "first_s"
                ]
            values |= _of_ours(by_name["potluck"], vocab, num_tokens, number)
            texts.append(tokens)
            return values

        found = run_rounds(measure_round, rounds, "stage", STAGE_TARGETS)
    return {
        "model": model.name,
        "threads": threads,
        "prompt_tokens": [_PROMPT, _LONG_PROMPT],
        "output_tokens": num_tokens,
        "systems": {system.name: system.ready for system in systems},
        **found,
        "tokens_in_common_with_potluck": {
            name: [agreement(tokens["potluck"], tokens[name]) for tokens in texts] for name in by_name
        },
    }


def _of_ours(potluck: SystemUnderTest, vocab: int, num_tokens: int, number: int) -> Round:
    """Of our stage alone: batches, and where a step's time goes."""
    values: Round = {}
    for batch in _BATCHES:
        prompts = _prompts(vocab, batch, _PROMPT, seed=number)
        answer = potluck.call("generate", prompts=prompts, num_tokens=num_tokens // 2)
        values[f"potluck batch {batch}"] = batch * (num_tokens // 2 - 1) / answer["decode_s"]
    (prompt,) = _prompts(vocab, 1, _PROMPT, seed=number)
    plain = potluck.call("decode_steps", prompt=prompt, num_tokens=num_tokens, timed=False)
    timed = potluck.call("decode_steps", prompt=prompt, num_tokens=num_tokens, timed=True)
    values["potluck step ms"] = plain["step_s"] * 1e3
    values["potluck linear ms"] = timed["linear_s"] * 1e3
    values["potluck timer ms"] = (timed["step_s"] - plain["step_s"]) * 1e3
    values["potluck rest ms"] = values["potluck step ms"] - values["potluck linear ms"]
    values["potluck linear calls"] = timed["calls"]
    return values


def _systems(model: Path, threads: int, llama: Path | None, scratch: Path) -> Iterator[SystemUnderTest]:
    arguments = [str(model), str(threads)]
    yield SystemUnderTest("potluck", "bench.stage.speed", [_CHILD, *arguments], threads=threads)
    yield SystemUnderTest("transformers", "bench.peers.transformers_child", arguments, threads=threads)
    file = gguf_of(model)
    if llama is None or file is None:
        print("llama.cpp is left out: see --llama-python", file=sys.stderr)
        return
    files = {SAME_FILE: file}
    for name in REQUANTIZED:
        files[name] = scratch / f"{name.rpartition(' ')[2]}.gguf"
        requantize(llama, file, files[name])
    for name, path in files.items():
        yield SystemUnderTest(name, "bench.peers.llama_child", [str(path), str(threads)], threads=threads, python=llama)


def gguf_of(model: Path) -> Path | None:
    """The one .gguf of a model's folder, if it is one."""
    files = list(model.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def requantize(llama: Path, source: Path, target: Path) -> None:
    """Have llama.cpp write `source` in the type that `target` is named for."""
    command = [str(llama), "-P", "-m", "bench.peers.llama_child", "--quantize", str(source), str(target), target.stem]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"llama.cpp could not make {target.stem}: {done.stderr[-500:]}")


def _prompts(vocab: int, count: int, length: int, *, seed: int) -> list[list[int]]:
    """Random ids, the same for every system; other ones in each round."""
    generator = random.Random(seed)
    return [[generator.randrange(10, vocab) for _ in range(length)] for _ in range(count)]


_GREEDY = Sampling(temperature=0.0)


class PotluckProbe:
    """The child: our stage with the whole model."""

    def __init__(self, model: Path) -> None:
        shard = load_whole(model, "bfloat16", kv_tokens=16 * CONTEXT_TOKENS)
        self.facts = {"weights_bytes": shard.weights_bytes, "path": getattr(shard, "path", "library")}
        self._stage = LocalStage(shard)

    def generate(self, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
        """Greedy, all prompts together, in one step and then a token of each a step. Seconds to the first tokens, and
        of the others."""
        started = time.perf_counter()
        tokens = [[token] for token in self._prefill(prompts)]
        first = time.perf_counter()
        for done in range(num_tokens - 1):
            for row, token in enumerate(self._decode(prompts, tokens, done)):
                tokens[row].append(token)
        decode_s = time.perf_counter() - first
        self._release(prompts)
        return {"first_s": first - started, "decode_s": decode_s, "tokens": tokens}

    def decode_steps(self, prompt: list[int], num_tokens: int, timed: bool) -> dict[str, Any]:
        """Median seconds of a step, and if `timed` of its linear kernels' calls, and how many these are."""
        tokens = [[token] for token in self._prefill([prompt])]
        steps_s, linear_s = [], []
        with _timed_linears() if timed else _untimed() as spent_s:
            for done in range(num_tokens - 1):
                started = time.perf_counter()
                tokens[0] += self._decode([prompt], tokens, done)
                steps_s.append(time.perf_counter() - started)
                linear_s.append(sum(spent_s))
                calls = len(spent_s)
                spent_s.clear()
        self._release([prompt])
        return {"step_s": statistics.median(steps_s), "linear_s": statistics.median(linear_s), "calls": calls}

    def _prefill(self, prompts: list[list[int]]) -> list[int]:
        ops = tuple(Open(SequenceId(row), tuple(prompt), _GREEDY) for row, prompt in enumerate(prompts))
        entries = tuple(Entry(SequenceId(row), 0, tuple(prompt), 1) for row, prompt in enumerate(prompts))
        return self._run(ops, entries)

    def _decode(self, prompts: list[list[int]], tokens: list[list[int]], done: int) -> list[int]:
        entries = tuple(
            Entry(SequenceId(row), len(prompt) + done, (tokens[row][-1],), 1) for row, prompt in enumerate(prompts)
        )
        return self._run((), entries)

    def _release(self, prompts: list[list[int]]) -> None:
        self._stage.forward(
            StageInput(ops=tuple(Release(SequenceId(row)) for row in range(len(prompts))), entries=(), hidden=None)
        )

    def _run(self, ops: tuple[Op, ...], entries: tuple[Entry, ...]) -> list[int]:
        output = self._stage.forward(StageInput(ops=ops, entries=entries, hidden=None))
        assert isinstance(output, TokenOutput)
        return [result.tokens[0].token_id for result in output.results]


@contextmanager
def _timed_linears() -> Iterator[list[float]]:
    """Note the seconds of every call of a linear kernel, also of those that are part of a program: its calls are then
    made one by one from here. On one thread."""
    spent_s: list[float] = []
    call, run = CpuAffineLinear.__call__, Program.run

    def timed(self: CpuAffineLinear, x: torch.Tensor, num_decode: int) -> torch.Tensor:
        started = time.perf_counter()
        y = call(self, x, num_decode)
        spent_s.append(time.perf_counter() - started)
        return y

    def run_timed(self: Program) -> None:
        linear = {kernel.address for kernel in matrix_kernels().compiled}
        for function, fields, _ in self.calls:
            native = _function_at(function)
            started = time.perf_counter()
            native(fields)
            if function in linear:
                spent_s.append(time.perf_counter() - started)

    CpuAffineLinear.__call__, Program.run = timed, run_timed  # type: ignore[method-assign]
    try:
        yield spent_s
    finally:
        CpuAffineLinear.__call__, Program.run = call, run  # type: ignore[method-assign]


@cache
def _function_at(address: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


@contextmanager
def _untimed() -> Iterator[list[float]]:
    yield []


def serve_probe(model: str, threads: str) -> None:
    replies = reply_pipe()
    torch.set_num_threads(int(threads))
    probe = PotluckProbe(Path(model))
    serve_commands({"generate": probe.generate, "decode_steps": probe.decode_steps}, probe.facts, replies)


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == [_CHILD]:
        serve_probe(*arguments[1:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a model of the store")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128, help="decoded after each prompt of 128")
    parser.add_argument(
        "--llama-python", default="", help="an interpreter with llama-cpp-python (default: .venv-peers)"
    )
    parser.add_argument("--json", type=Path, default=None, help="also write the result to this file")
    options = parser.parse_args(arguments)
    model = Store(home_dir()).pull(options.model, lambda _: None).path
    with tempfile.TemporaryDirectory(prefix="potluck-stage-") as scratch:
        found: dict[str, Any] = measure(
            model,
            rounds=options.rounds,
            threads=options.threads,
            num_tokens=options.tokens,
            llama=llama_python(options.llama_python),
            scratch=Path(scratch),
        )
    result = {**hardware_facts(), **found}
    write_result(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
