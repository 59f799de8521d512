"""What do quantized kernels cost in quality? Next-token distributions against float32 on the very numbers of the file.

python -m bench.quality [--model smollm2] [--tokens 2048] [--llama-python PYTHON] [--json FILE]
The text (bench/texts) goes through each way in windows of 512 tokens. Reference: transformers in float32 on the
dequantized weights, so that what is measured is the kernels' rounding, not the quantization. Every way: perplexity of
the text, mean and 99th percentile over positions of the Kullback-Leibler divergence from the reference, in nats. Then
the relative rms error of one layer's projections, on the activations of the text's first window.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.contestant import Contestant, llama_python
from bench.distributions import Divergence, Expected
from bench.hardware import facts
from bench.kernel_error import kernel_errors
from bench.quality_ways import Way, library, llama, load_whole, prefill, token_by_token
from bench.reference_model import reference_model
from bench.stage_speed import gguf_of
from potluck.paths import home_dir
from potluck.store import Store
from shard.open import open_checkpoint

TEXT = Path(__file__).parent / "texts" / "prose-and-code.txt"
WINDOW_TOKENS = 512
PREFILL, DECODE, LLAMA = "potluck bfloat16, prefill", "potluck bfloat16, token by token", "llama.cpp, prefill"
_DECODE_OVER_DENSE = 1.5


def measure(
    model: Path, *, num_tokens: int, mlx_tokens: int, llama_python: Path | None, threads: int
) -> dict[str, object]:
    torch.set_num_threads(threads)
    windows = windows_of(text_ids(model), num_tokens, WINDOW_TOKENS)
    reference = reference_model(model, "float32")
    expected = [Expected.of(library(reference)(ids), ids) for ids in windows]
    exact = Divergence()
    for window in expected:
        exact.add(window, window.logprobs.numpy())
    ways: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        for name, way, limit in _ways(model, mlx_tokens, llama_python, threads, stack):
            found = Divergence()
            for window in expected if limit is None else expected[:1]:
                found.add(window, way(list(window.ids[:limit])))
            ways[name] = found.summary()
            print(f"{name}: {ways[name]}", file=sys.stderr)
    errors = kernel_errors(model, reference, windows[0], open_checkpoint(model).spec.num_layers // 2)
    return {
        "model": model.name,
        "windows": [len(ids) for ids in windows],
        "reference_perplexity": exact.summary()["perplexity"],
        "ways": ways,
        "claims": claims(ways, errors),
        "kernel_errors": errors,
    }


def _ways(
    model: Path, mlx_tokens: int, python: Path | None, threads: int, stack: ExitStack
) -> Iterator[tuple[str, Way, int | None]]:
    """Name, way, and how many tokens of the first window it gets; None: all windows."""
    stored = load_whole(model, "bfloat16")
    yield PREFILL, prefill(stored), None
    yield DECODE, token_by_token(stored), None
    yield "potluck float32, prefill", prefill(load_whole(model, "float32")), None
    yield "potluck dense bfloat16, prefill", prefill(load_whole(model, "bfloat16", weights="dense")), None
    yield "transformers bfloat16, prefill", library(reference_model(model, "bfloat16")), None
    file = gguf_of(model)
    if python is not None and file is not None:
        child = Contestant("llama.cpp", "bench.llama_child", [str(file), str(threads)], threads=threads, python=python)
        yield LLAMA, llama(stack.enter_context(child)), None
    else:
        print("llama.cpp is left out: see --llama-python", file=sys.stderr)
    if mlx_tokens:
        yield "potluck MLX float32, prefill", prefill(load_whole(model, "float32", backend="mlx")), mlx_tokens


def claims(ways: dict[str, dict[str, float]], errors: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prefill in 8 bits costs no more than llama.cpp's, and the decode kernel about what dense bfloat16 does."""
    rows: list[dict[str, Any]] = []
    if LLAMA in ways:
        for fact in ("kl_mean", "kl_p99", "perplexity_above_reference"):
            ours, theirs = ways[PREFILL][fact], ways[LLAMA][fact]
            rows.append({"what": f"{fact} of prefill", "potluck": ours, "llama.cpp": theirs, "met": ours <= theirs})
    if errors:
        worst = max(error["decode_over_dense"] for error in errors)
        rows.append(
            {
                "what": "error of the decode kernel over that of dense bfloat16, worst projection",
                "value": worst,
                "at most": _DECODE_OVER_DENSE,
                "met": worst <= _DECODE_OVER_DENSE,
            }
        )
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
    result = {**facts(), **found}
    print(json.dumps(result, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
