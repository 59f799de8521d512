"""transformers' `generate` in bfloat16 as a contestant. python -m bench.transformers_child MODEL THREADS"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.child_loop import reply_pipe, serve
from bench.reference_model import reference_model


class _Clock:
    """A streamer: `generate` hands it the prompt, then every token as it comes."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.at_s.append(time.perf_counter())

    def end(self) -> None:
        pass


class Transformers:
    def __init__(self, model: Path) -> None:
        self._model = reference_model(model, "bfloat16")
        self._model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
        """Greedy, one prompt. Seconds to the first token, and of the others."""
        clock = _Clock()
        ids = torch.tensor(prompts)
        started = time.perf_counter()
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
        _, first, *_ = clock.at_s
        return {
            "first_s": first - started,
            "decode_s": clock.at_s[-1] - first,
            "tokens": output[:, ids.shape[1] :].tolist(),
        }


def main() -> int:
    replies = reply_pipe()
    torch.set_num_threads(int(sys.argv[2]))
    transformers.utils.logging.set_verbosity_error()
    model = Transformers(Path(sys.argv[1]))
    serve({"generate": model.generate}, {"transformers": transformers.__version__}, replies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
