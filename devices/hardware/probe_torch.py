"""Matrix-vector products on a torch device. Imported only in a probe's own process."""

from __future__ import annotations

import torch

from devices.hardware.measure import MATRIX_BYTES, TOTAL_BYTES
from transport.errors import ConfigError
from transport.messages.ring import DType

_TORCH_DTYPE = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_COLUMNS = 4096
_GPU_FACTOR = 4  # A GPU's launches would be measured instead of its memory with matrices that it reads in 10 µs.


class TorchBenchmark:
    """See `Bench`."""

    def __init__(self, kind: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._device = _open_device(kind)
        self.compute_dtype: DType = _default_dtype(self._device)
        self.uses_host_memory = self._device.type != "cuda"
        self.limit_bytes, self.gpu = _limits(self._device)
        factor = _GPU_FACTOR if self._device.type == "cuda" else 1
        dtype = _TORCH_DTYPE[self.compute_dtype]
        shape = (factor * MATRIX_BYTES // (2 * _COLUMNS), _COLUMNS)
        # Written, not only allocated: untouched pages would all be one page of zeros, read from the cache.
        self._matrices = [
            torch.full(shape, 0.01, dtype=dtype, device=self._device) for _ in range(TOTAL_BYTES // MATRIX_BYTES)
        ]
        self._vector = torch.ones((1, _COLUMNS), dtype=dtype, device=self._device)

    @torch.inference_mode()
    def run(self) -> int:
        for matrix in self._matrices:
            torch.nn.functional.linear(self._vector, matrix)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()
        return sum(matrix.nbytes for matrix in self._matrices)


def _open_device(kind: str) -> torch.device:
    try:
        device = torch.device(kind)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"torch can't use {kind}: {first_line}", hint="check its driver and torch's build") from error
    return device


def _default_dtype(device: torch.device) -> DType:
    """bfloat16, or float16 on GPUs that only emulate it."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "float16"
    return "bfloat16"


def _limits(device: torch.device) -> tuple[int | None, str]:
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return free_bytes, f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    if device.type == "mps":
        return torch.mps.recommended_max_memory(), ""
    return None, ""
