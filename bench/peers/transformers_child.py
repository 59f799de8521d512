"""transformers' model with a checkpoint's dequantized weights, as reference and as a system under test."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from potluck.measure.child_process import reply_pipe, serve_commands
from shard.pieces.open import open_checkpoint
from shard.torch_backend.tensors import TORCH_DTYPES, to_numpy
from transport.messages.ring import DType


def reference_model(folder: Path, dtype: DType) -> Any:
    """Any: the library's model classes are untyped."""
    checkpoint = open_checkpoint(folder)
    config = transformers.AutoConfig.for_model(**checkpoint.config)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=TORCH_DTYPES[dtype]).eval()
    for name, parameter in model.named_parameters():
        checkpoint.read_into(name, to_numpy(parameter.data), dtype)
    checkpoint.close()
    return model


class _TokenClock:
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
        clock = _TokenClock()
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
    serve_commands({"generate": model.generate}, {"transformers": transformers.__version__}, replies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
