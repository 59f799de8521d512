"""What do quantized kernels cost in quality? Next-token distributions against float32 on the very numbers of the file.

python -m bench.stage.quality [--model smollm2] [--tokens 2048] [--llama-python PYTHON] [--json FILE]
The text (bench/texts) goes through each way in windows of 512 tokens. Reference: transformers in float32 on the
dequantized weights, so that what is measured is the kernels' rounding, not the quantization. Every way: perplexity of
the text, mean and 99th percentile over positions of the Kullback-Leibler divergence from the reference, in nats.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from bench.peers.transformers_child import reference_model
from bench.stage.speed import gguf_of
from potluck.measure.child_process import SystemUnderTest, llama_python
from potluck.measure.result import hardware_facts, write_result
from potluck.measure.ring import load_whole
from potluck.store.store import Store
from potluck.system.paths import home_dir
from shard.stage import Batch, ShardBackend
from transport.messages.ring import Entry, SequenceId


@dataclass(frozen=True, slots=True)
class ReferenceWindow:
    """The reference over one window: log-probabilities float64 [tokens, vocab], and the ids that it is of."""

    logprobs: torch.Tensor
    ids: tuple[int, ...]

    @classmethod
    def of(cls, logits: np.ndarray, ids: Sequence[int]) -> ReferenceWindow:
        return cls(_logprobs(logits), tuple(ids))


@dataclass(slots=True)
class Divergence:
    """Of one way to compute: each position's Kullback-Leibler divergence from the reference, in nats, and the negative
    log-likelihoods of the text's next tokens, its own and the reference's."""

    kl: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    expected_nll: list[float] = field(default_factory=list)
    same_best: list[bool] = field(default_factory=list)

    def add(self, expected: ReferenceWindow, logits: np.ndarray) -> None:
        """`logits` [tokens, vocab] of the window, or of the first tokens of it."""
        count = len(logits)
        got, wanted = _logprobs(logits), expected.logprobs[:count]
        self.kl += (wanted.exp() * (wanted - got)).sum(dim=1).tolist()
        self.same_best += (got.argmax(dim=1) == wanted.argmax(dim=1)).tolist()
        following = expected.ids[1 : count + 1]
        rows = torch.arange(len(following))
        targets = torch.tensor(following, dtype=torch.long)
        self.nll += (-got[rows, targets]).tolist()
        self.expected_nll += (-wanted[rows, targets]).tolist()

    def summary(self) -> dict[str, float]:
        own, reference = _perplexity(self.nll), _perplexity(self.expected_nll)
        return {
            "tokens": len(self.kl),
            "perplexity": round(own, 5),
            "perplexity_above_reference": round(own - reference, 5),
            "kl_mean": float(f"{np.mean(self.kl):.4g}"),
            "kl_p99": float(f"{np.percentile(self.kl, 99):.4g}"),
            "same_best_token": round(float(np.mean(self.same_best)), 4),
        }


def _perplexity(nll: Sequence[float]) -> float:
    return math.exp(sum(nll) / len(nll))


def _logprobs(logits: np.ndarray) -> torch.Tensor:
    return torch.log_softmax(torch.from_numpy(logits).double(), dim=-1)


LogitsFunction = Callable[[list[int]], np.ndarray]
_ONE = SequenceId(1)


def prefill(shard: ShardBackend) -> LogitsFunction:
    """The window in one step, as a prompt."""

    def logits(ids: list[int]) -> np.ndarray:
        found = shard.forward(Batch(entries=(Entry(_ONE, 0, tuple(ids), len(ids)),), hidden=None))
        shard.kv.release(_ONE)
        return found

    return logits


def token_by_token(shard: ShardBackend) -> LogitsFunction:
    """The window by decode steps."""

    def logits(ids: list[int]) -> np.ndarray:
        rows = [
            shard.forward(Batch(entries=(Entry(_ONE, start, (token,), 1),), hidden=None))
            for start, token in enumerate(ids)
        ]
        shard.kv.release(_ONE)
        return np.concatenate(rows)

    return logits


def library(model: Any) -> LogitsFunction:
    """transformers' model."""

    @torch.inference_mode()
    def logits(ids: list[int]) -> np.ndarray:
        found: np.ndarray = model(torch.tensor([ids])).logits[0].float().numpy()
        return found

    return logits


def llama(child: SystemUnderTest) -> LogitsFunction:
    """llama.cpp in a process of its own, the window as one prompt."""

    def logits(ids: list[int]) -> np.ndarray:
        with tempfile.TemporaryDirectory(prefix="potluck-quality-") as folder:
            file = Path(folder) / "logits.npy"
            child.call("logits", ids=ids, file=str(file))
            found: np.ndarray = np.load(file)
        return found

    return logits


TEXT = Path(__file__).parents[1] / "texts" / "prose-and-code.txt"
WINDOW_TOKENS = 512
PREFILL, DECODE, LLAMA = "potluck bfloat16, prefill", "potluck bfloat16, token by token", "llama.cpp, prefill"


def measure(
    model: Path, *, num_tokens: int, mlx_tokens: int, llama_python: Path | None, threads: int
) -> dict[str, object]:
    torch.set_num_threads(threads)
    windows = windows_of(text_ids(model), num_tokens, WINDOW_TOKENS)
    reference = reference_model(model, "float32")
    expected = [ReferenceWindow.of(library(reference)(ids), ids) for ids in windows]
    exact = Divergence()
    for window in expected:
        exact.add(window, window.logprobs.numpy())
    ways: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        for name, way, limit in _logits_functions(model, mlx_tokens, llama_python, threads, stack):
            found = Divergence()
            for window in expected if limit is None else expected[:1]:
                found.add(window, way(list(window.ids[:limit])))
            ways[name] = found.summary()
            print(f"{name}: {ways[name]}", file=sys.stderr)
    return {
        "model": model.name,
        "windows": [len(ids) for ids in windows],
        "reference_perplexity": exact.summary()["perplexity"],
        "ways": ways,
        "claims": claims(ways),
    }


def _logits_functions(
    model: Path, mlx_tokens: int, python: Path | None, threads: int, stack: ExitStack
) -> Iterator[tuple[str, LogitsFunction, int | None]]:
    """Name, way, and how many tokens of the first window it gets; None: all windows."""
    stored = load_whole(model, "bfloat16")
    yield PREFILL, prefill(stored), None
    yield DECODE, token_by_token(stored), None
    yield "potluck float32, prefill", prefill(load_whole(model, "float32")), None
    yield "potluck dense bfloat16, prefill", prefill(load_whole(model, "bfloat16", weights="dense")), None
    yield "transformers bfloat16, prefill", library(reference_model(model, "bfloat16")), None
    file = gguf_of(model)
    if python is not None and file is not None:
        child = SystemUnderTest(
            "llama.cpp", "bench.peers.llama_child", [str(file), str(threads)], threads=threads, python=python
        )
        yield LLAMA, llama(stack.enter_context(child)), None
    else:
        print("llama.cpp is left out: see --llama-python", file=sys.stderr)
    if mlx_tokens:
        yield "potluck MLX float32, prefill", prefill(load_whole(model, "float32", backend="mlx")), mlx_tokens


def claims(ways: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Prefill in 8 bits costs no more than llama.cpp's."""
    rows: list[dict[str, Any]] = []
    if LLAMA in ways:
        for fact in ("kl_mean", "kl_p99", "perplexity_above_reference"):
            ours, theirs = ways[PREFILL][fact], ways[LLAMA][fact]
            rows.append({"what": f"{fact} of prefill", "potluck": ours, "llama.cpp": theirs, "met": ours <= theirs})
    return rows


def text_ids(model: Path) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before every text, and the bench's text in its ids."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
    return list(tokenizer("")["input_ids"]), list(tokenizer.encode(TEXT.read_text(), add_special_tokens=False))


def windows_of(ids: tuple[list[int], list[int]], num_tokens: int, window: int) -> list[list[int]]:
    """The first `num_tokens` ids in windows, each begun as a text is; a last one too short to say much is left out."""
    before, text = ids
    step = window - len(before)
    text = text[:num_tokens]
    cut = [before + text[start : start + step] for start in range(0, len(text), step)]
    return [one for one in cut if len(one) >= window // 2 or len(cut) == 1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a model of the store")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--mlx-tokens", type=int, default=128, help="of the first window, on MLX; 0: without MLX")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-python", default="", help="one with llama-cpp-python (default: .venv-peers)")
    parser.add_argument("--json", type=Path, default=None, help="also write the result to this file")
    options = parser.parse_args(arguments)
    found = measure(
        Store(home_dir()).pull(options.model, lambda _: None).path,
        num_tokens=options.tokens,
        mlx_tokens=options.mlx_tokens,
        llama_python=llama_python(options.llama_python),
        threads=options.threads,
    )
    result = {**hardware_facts(), **found}
    write_result(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
