"""How fast is one stage beside its peers? The whole model on one thread: ours, transformers', llama.cpp's.

python -m bench.stage.speed [--model smollm2] [--rounds 7] [--threads 1] [--llama-python PYTHON] [--json FILE]
A process per contestant, all loaded first and then run in turns, round after round, because the machine drifts; ratios
are medians over rounds of ratios within a round. Decode is 128 tokens after a prompt of 128, greedy. transformers has
the file's weights dequantized to bfloat16; llama.cpp the same .gguf, and Q4_0 and Q8_0 made of it. Without an
interpreter that has llama-cpp-python, llama.cpp is left out.

The rest of a token is a step less the time inside of the linear kernels' calls, which are timed in runs of their own.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.targets import REQUANTIZED, SAME_FILE, Round, agreement, judge_targets, medians
from potluck.measure.child_process import ROOT, SystemUnderTest, llama_python
from potluck.measure.result import hardware_facts
from potluck.store.store import Store
from potluck.system.paths import home_dir
from shard.pieces.open import open_checkpoint

_BATCHES = (1, 2, 4, 8)
_PROMPT, _LONG_PROMPT = 128, 512


def measure(
    model: Path, *, rounds: int, threads: int, num_tokens: int, llama: Path | None, scratch: Path
) -> dict[str, object]:
    vocab = open_checkpoint(model).spec.vocab_size
    with ExitStack() as stack:
        contestants = [stack.enter_context(one) for one in _contestants(model, threads, llama, scratch)]
        by_name = {contestant.name: contestant for contestant in contestants}
        for contestant in contestants:
            contestant.call("generate", prompts=_prompts(vocab, 1, _LONG_PROMPT, seed=-1), num_tokens=4)  # warm
        found: list[Round] = []
        texts: list[dict[str, list[int]]] = []
        for number in range(rounds):
            order = contestants if number % 2 == 0 else contestants[::-1]
            prompt = _prompts(vocab, 1, _PROMPT, seed=number)
            values: Round = {}
            tokens: dict[str, list[int]] = {}
            for contestant in order:
                answer = contestant.call("generate", prompts=prompt, num_tokens=num_tokens)
                values[f"{contestant.name} decode"] = (num_tokens - 1) / answer["decode_s"]
                values[f"{contestant.name} first 128"] = answer["first_s"]
                (tokens[contestant.name],) = answer["tokens"]
            long_prompt = _prompts(vocab, 1, _LONG_PROMPT, seed=number)
            for contestant in order:
                answer = contestant.call("generate", prompts=long_prompt, num_tokens=1)
                values[f"{contestant.name} first 512"] = answer["first_s"]
            values |= _of_ours(by_name["potluck"], vocab, num_tokens, number)
            found.append(values)
            texts.append(tokens)
            print(f"round {number + 1} of {rounds}: {values['potluck decode']:.0f} tokens/s", file=sys.stderr)
    return {
        "model": model.name,
        "threads": threads,
        "rounds": rounds,
        "prompt_tokens": [_PROMPT, _LONG_PROMPT],
        "output_tokens": num_tokens,
        "contestants": {contestant.name: contestant.ready for contestant in contestants},
        "targets": judge_targets(found),
        "medians": medians(found),
        "tokens_in_common_with_potluck": {
            name: [agreement(tokens["potluck"], tokens[name]) for tokens in texts] for name in by_name
        },
        "by_round": [{name: round(value, 5) for name, value in values.items()} for values in found],
    }


def _of_ours(potluck: SystemUnderTest, vocab: int, num_tokens: int, number: int) -> Round:
    """What only our stage is asked: batches, and where a step's time goes."""
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


def _contestants(model: Path, threads: int, llama: Path | None, scratch: Path) -> Iterator[SystemUnderTest]:
    arguments = [str(model), str(threads)]
    yield SystemUnderTest("potluck", "bench.stage.potluck_child", arguments, threads=threads)
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
    """Random ids, the same for every contestant; other ones in each round."""
    generator = random.Random(seed)
    return [[generator.randrange(10, vocab) for _ in range(length)] for _ in range(count)]


def main(arguments: Sequence[str] | None = None) -> int:
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
    print(json.dumps(result, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
