"""Matrix-vector products on MLX's default device. Imported only in a probe's own process."""

from __future__ import annotations

import mlx.core as mx

from devices.hardware.measure import MATRIX_BYTES, TOTAL_BYTES
from transport.messages.ring import DType

_COLUMNS = 4096


class MlxBenchmark:
    """See `Bench`. MLX's CPU build is slow and inexact in 16 bits, so it computes in float32 there."""

    def __init__(self) -> None:
        metal = mx.default_device() == mx.Device(mx.gpu, 0)
        self.compute_dtype: DType = "bfloat16" if metal else "float32"
        self.uses_host_memory = True
        limit = mx.device_info().get("max_recommended_working_set_size") if metal else None
        self.limit_bytes = None if limit is None else int(limit)
        self.gpu = ""
        dtype = mx.bfloat16 if metal else mx.float32
        shape = (MATRIX_BYTES // (dtype.size * _COLUMNS), _COLUMNS)
        self._matrices = [mx.full(shape, 0.01, dtype) for _ in range(TOTAL_BYTES // MATRIX_BYTES)]
        self._vector = mx.ones((1, _COLUMNS), dtype)
        mx.eval(self._matrices, self._vector)

    def run(self) -> int:
        mx.eval([self._vector @ matrix.T for matrix in self._matrices])
        return sum(matrix.nbytes for matrix in self._matrices)
