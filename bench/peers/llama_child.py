"""llama.cpp as a system under test, by its low-level Python binding. Run by an interpreter that has llama-cpp-python.

python -m bench.peers.llama_child FILE.gguf THREADS           serve
python -m bench.peers.llama_child --quantize IN OUT TYPE      write IN in the type (Q4_0, Q8_0) to OUT
"""

from __future__ import annotations

import ctypes
import sys
import time
from importlib import import_module
from importlib.metadata import version
from typing import Any

from potluck.measure.child_process import reply_pipe, serve_commands

CONTEXT_TOKENS = 2048
_BATCH_TOKENS = 512


class Llama:
    def __init__(self, path: str, threads: int) -> None:
        # Any: the binding is made of ctypes functions, and mypy sees another interpreter's packages.
        self._np: Any = import_module("numpy")
        self._api: Any = import_module("llama_cpp")
        api = self._api
        self.system = api.llama_print_system_info().decode()
        api.llama_backend_init()
        model_options = api.llama_model_default_params()
        model_options.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(path.encode(), model_options)
        if not self._model:
            raise RuntimeError(f"llama.cpp can't load {path}")
        options = api.llama_context_default_params()
        options.n_ctx = CONTEXT_TOKENS
        options.n_threads = options.n_threads_batch = threads
        options.n_batch, options.n_ubatch = CONTEXT_TOKENS, _BATCH_TOKENS
        self._context = api.llama_init_from_model(self._model, options)
        self._vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))

    def generate(self, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
        """Greedy, one prompt. Seconds to the first token, and of the others."""
        (prompt,) = prompts
        self._clear()
        started = time.perf_counter()
        self._decode(prompt)
        tokens = [self._best()]
        first = time.perf_counter()
        for _ in range(num_tokens - 1):
            self._decode(tokens[-1:])
            tokens.append(self._best())
        return {"first_s": first - started, "decode_s": time.perf_counter() - first, "tokens": [tokens]}

    def logits(self, ids: list[int], file: str) -> dict[str, Any]:
        """Write the logits of every position to `file`, float32 [tokens, vocab] in numpy's format."""
        api = self._api
        self._clear()
        batch = api.llama_batch_init(len(ids), 0, 1)
        for position, token in enumerate(ids):
            batch.token[position], batch.pos[position], batch.logits[position] = token, position, 1
            batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
        batch.n_tokens = len(ids)
        if api.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        rows = self._np.empty((len(ids), self._vocab), self._np.float32)
        for position in range(len(ids)):
            rows[position] = self._logits(position)
        api.llama_batch_free(batch)
        self._np.save(file, rows)
        return {}

    def _clear(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _decode(self, ids: list[int]) -> None:
        tokens = (self._api.llama_token * len(ids))(*ids)
        if self._api.llama_decode(self._context, self._api.llama_batch_get_one(tokens, len(ids))) != 0:
            raise RuntimeError("llama_decode failed")

    def _logits(self, row: int) -> Any:
        found = self._api.llama_get_logits_ith(self._context, row)
        return self._np.ctypeslib.as_array(found, shape=(self._vocab,))

    def _best(self) -> int:
        return int(self._logits(-1).argmax())


def quantize(source: str, target: str, kind: str) -> None:
    """All matrices in one type: llama.cpp would keep a tied embedding in Q6_K, which has no fast kernel here."""
    api: Any = import_module("llama_cpp")
    options = api.llama_model_quantize_default_params()
    options.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.allow_requantize = options.pure = True
    if api.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options)) != 0:
        raise RuntimeError(f"llama.cpp could not write {source} as {kind}")


def main() -> int:
    if sys.argv[1] == "--quantize":
        quantize(*sys.argv[2:])
        return 0
    replies = reply_pipe()
    llama = Llama(sys.argv[1], int(sys.argv[2]))
    ready = {"llama-cpp-python": version("llama-cpp-python"), "system": llama.system}
    serve_commands({"generate": llama.generate, "logits": llama.logits}, ready, replies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
