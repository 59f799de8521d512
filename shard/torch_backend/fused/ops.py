"""The small operations of a fused layer, each in one place so that a faster kernel can take it over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from shard.formats.families import Activation

if TYPE_CHECKING:
    from shard.torch_backend.cpu.norm_and_gate import CpuGatedActivation, CpuRmsNorm


class RmsNorm:
    """The weights of a root-mean-square norm, float32, with what `rms_norm` needs of them worked out."""

    __slots__ = ("floor", "native", "scaled", "weight")

    def __init__(self, weight: torch.Tensor, eps: float, *, width: int) -> None:
        """weight [width], or [groups, width] for groups of features that are normed apart."""
        self.weight = weight
        self.scaled = weight * width**0.5
        self.floor = torch.tensor((width * eps) ** 0.5, device=weight.device)
        self.native: CpuRmsNorm | None = None
        if weight.device.type == "cpu" and weight.ndim == 1 and weight.numel():
            from shard.torch_backend.cpu.norm_and_gate import CpuRmsNorm, is_whole_vectors

            if is_whole_vectors(width):
                self.native = CpuRmsNorm(weight, eps)


def rms_norm(x: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
    """x [..., width] → x · w / √(mean(x²) + eps), computed in float32, in x's dtype (Zhang and Sennrich 2019).

    As x · (w · √width) / hypot(‖x‖, √(width · eps)): four operations, where torch's own takes six.
    """
    if norm.native is not None and x.dtype == torch.float32 and x.is_contiguous():
        return norm.native(x)
    wide = x if x.dtype == torch.float32 else x.float()
    length = torch.linalg.vector_norm(wide, 2, -1, True).hypot_(norm.floor)
    normed = torch.mul(wide, norm.scaled).div_(length)
    return normed if x.dtype == torch.float32 else normed.to(x.dtype)


def rms_norm_of_sum(x: torch.Tensor, added: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
    """x += added, in place, then `rms_norm`; both [tokens, width]."""
    if norm.native is not None and x.dtype == added.dtype == torch.float32:
        return norm.native(x, added.contiguous())
    x.add_(added)
    return rms_norm(x, norm)


def apply_rope_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Turn x [tokens, heads, head_dim] in place by its positions' angles: the pairs (i, i + rotary_dim / 2) of the
    first rotary_dim features. cos [tokens, 1, 2, rotary_dim / 2], sin likewise with the first half negative."""
    tokens, heads, head_dim = x.shape
    half = cos.shape[-1]
    turned = x if 2 * half == head_dim else x[..., : 2 * half]
    pairs = turned.view(tokens, heads, 2, half)
    exchanged = pairs.flip(2)
    pairs.mul_(cos).addcmul_(exchanged, sin)


def decode_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """One token of one sequence, which sees all it is given: query [1, kv_heads, heads / kv_heads, head_dim] over keys
    and values [1, kv_heads, positions, head_dim] → as query, not necessarily contiguous."""
    return functional.scaled_dot_product_attention(query, keys, values, scale=scale)


class GatedActivation:
    """gate_up [tokens, 2 · width] → activation(gate) · up [tokens, width]."""

    def __init__(self, activation: Activation, device: torch.device) -> None:
        self._activation = activation
        self.native: CpuGatedActivation | None = None
        if device.type == "cpu":
            from shard.torch_backend.cpu.norm_and_gate import CpuGatedActivation

            self.native = CpuGatedActivation("silu" if activation == "silu" else "gelu")

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        native = self.native
        if native is not None and native.supports(gate_up):
            return native(gate_up)
        return gated_activation(gate_up, self._activation)


def gated_activation(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """gate_up [tokens, 2 · width] → activation(gate) · up [tokens, width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        return functional.silu(gate).mul_(up)
    return functional.gelu(gate, approximate="tanh").mul_(up)


def softcapped(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """cap · tanh(logits / cap), in place."""
    return logits.div_(cap).tanh_().mul_(cap)
