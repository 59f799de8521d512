"""How a GGUF says that a model's rotary embedding was stretched, as Hugging Face's `rope_scaling`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from transport.errors import UnsupportedModel

# Every Llama 3.1 to 3.3: the factors in the file do not say these, but they are recomputed and compared.
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR, _TRAINED_TOKENS = 1.0, 4.0, 8192


def rope_scaling(
    field: Callable[[str], Any], theta: float, head_dim: int, factors: np.ndarray | None
) -> dict[str, Any] | None:
    """`factors` [head_dim / 2] divide the frequencies. Raises UnsupportedModel for what can't be said exactly."""
    kind = field("rope.scaling.type")
    if factors is not None:
        return _llama3(theta, head_dim, factors)
    if kind in (None, "none"):
        return None
    factor = field("rope.scaling.factor")
    if kind == "linear" and isinstance(factor, float) and factor > 0:
        return {"rope_type": "linear", "factor": factor}
    raise UnsupportedModel(
        f"a rotary embedding scaled by {kind!r} can't be read from a GGUF", hint="use the model's Hugging Face folder"
    )


def llama3_factors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """float64 [head_dim / 2], as transformers' `_compute_llama3_parameters` divides the frequencies."""
    inverse = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelength = 2 * math.pi / inverse
    smooth = (_TRAINED_TOKENS / wavelength - _LOW_FREQ_FACTOR) / (_HIGH_FREQ_FACTOR - _LOW_FREQ_FACTOR)
    between = 1 / ((1 - smooth) / factor + smooth)
    low = wavelength > _TRAINED_TOKENS / _LOW_FREQ_FACTOR
    high = wavelength < _TRAINED_TOKENS / _HIGH_FREQ_FACTOR
    return np.where(low, factor, np.where(high, 1.0, between))


def _llama3(theta: float, head_dim: int, factors: np.ndarray) -> dict[str, Any] | None:
    if (factors == 1).all():
        return None
    factor = float(factors.max())
    expected = llama3_factors(theta, head_dim, factor)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise UnsupportedModel(
            "the GGUF's rotary factors (rope_freqs.weight) are not those of Llama 3",
            hint="use the model's Hugging Face folder",
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW_FREQ_FACTOR,
        "high_freq_factor": _HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": _TRAINED_TOKENS,
    }
