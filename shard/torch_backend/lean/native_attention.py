"""Attention by the CPU's native kernels, where they know the model's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from shard.torch_backend.dtypes import TORCH_DTYPES
from shard.torch_backend.lean.config import LayerFacts, LeanConfig
from shard.torch_backend.lean.ops import Norm
from shard.torch_backend.lean.step import LeanStep, Piece
from transport.errors import UnsupportedModel
from transport.messages import DType, KVForm

if TYPE_CHECKING:
    from shard.torch_backend.cpu.chunk_attention import ChunkAttention, ChunkPlaces, ChunkSeat
    from shard.torch_backend.cpu.layer_ops import AttentionSeats, DecodeAttention, Seat
    from shard.torch_backend.cpu.program import Program


class NativeDecode:
    """One layer's attention for the rows [0, num_decode) of a step."""

    def __init__(self, attention: DecodeAttention, facts: LayerFacts, index: int, like: torch.Tensor) -> None:
        self._attention = attention
        self._facts = facts
        self._index = index
        self._like = like

    def __call__(self, qkv: torch.Tensor, step: LeanStep) -> torch.Tensor:
        """qkv [rows, (heads + 2 · kv_heads) · head_dim] float32, before norms of heads and rotary embedding →
        [num_decode, heads · head_dim] float32."""
        seats, angles = self.places(step)
        return self._attention(qkv, seats, angles, torch.get_num_threads())

    def places(self, step: LeanStep) -> tuple[Sequence[Seat], Sequence[tuple[int, int]]]:
        """Of the decode rows: room in their KV, and where their angles are."""
        window, like, index = self._facts.window, self._like, self._index
        seats = [run.kv.layer(index, window).seat(run.start, like) for run in step.ragged.runs[: step.num_decode]]
        return seats, step.places_of_angles(self._facts.rope)

    def into(self, program: Program, qkv: torch.Tensor, threads: int) -> tuple[torch.Tensor, AttentionSeats]:
        """As `DecodeAttention.into`."""
        return self._attention.into(program, qkv, threads)


class NativeChunk:
    """One layer's attention for rows of prompts."""

    def __init__(self, attention: ChunkAttention, facts: LayerFacts, index: int, like: torch.Tensor) -> None:
        self._attention = attention
        self._facts = facts
        self._index = index
        self._like = like

    def __call__(self, qkv: torch.Tensor, step: LeanStep, piece: Piece) -> torch.Tensor:
        """qkv [piece rows, (heads + 2 · kv_heads) · head_dim] float32, before norms of heads and rotary embedding →
        [piece rows, heads · head_dim] float32."""
        seats, angles = self.places(step, piece)
        return self._attention(qkv, seats, angles, torch.get_num_threads())

    def places(self, step: LeanStep, piece: Piece) -> tuple[Sequence[ChunkSeat], tuple[int, int]]:
        """Of the piece's runs: room in their KV; and where the angles of its first row are."""
        window, like, index = self._facts.window, self._like, self._index
        seats: list[ChunkSeat] = []
        for run in piece.runs:
            seat = run.kv.layer(index, window).run_seat(run.start, run.num_tokens, like)
            seats.append((run.offset - piece.first, run.num_tokens, *seat, run.start))
        return seats, step.place_of_angles(self._facts.rope, piece.first)

    def into(self, program: Program, qkv: torch.Tensor, threads: int) -> tuple[torch.Tensor, ChunkPlaces]:
        """As `ChunkAttention.into`."""
        return self._attention.into(program, qkv, threads)


def native_attention(
    config: LeanConfig, facts: LayerFacts, index: int, compute_dtype: DType, kv: KVForm, qk_norm: Norm | None
) -> tuple[NativeDecode | None, NativeChunk | None]:
    """None where the kernels have no such attention: heads of an odd size, float16 on an old processor. Raises
    UnsupportedModel there if KV is to be held in 8 bits, which nothing else can."""
    from shard.torch_backend.cpu.chunk_attention import ChunkAttention, best_products
    from shard.torch_backend.cpu.compile import host_has_halves
    from shard.torch_backend.cpu.heads import AttendShape
    from shard.torch_backend.cpu.layer_ops import DecodeAttention

    rotary = 0 if facts.rope is None else 2 * config.ropes[facts.rope].inverse_frequencies.shape[0]
    shape = AttendShape(
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rotary=rotary,
        kv_dtype=compute_dtype if kv == "full" else "int8",
        scale=config.attention_scale,
        eps=None if qk_norm is None else config.norm_eps,
        softcap=config.attention_softcap,
    )
    products = best_products(shape, exact=compute_dtype == "float32")
    if kv == "8-bit" and (products is None or not shape.is_supported()):
        raise UnsupportedModel(
            f"KV can't be held in 8 bits: the CPU has no such attention for heads of {config.head_dim} features",
            hint="leave --kv-cache out",
        )
    if not shape.is_supported() or (shape.kv_dtype == "float16" and not host_has_halves()):
        return None, None
    norms: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if qk_norm is not None:
        norms = (qk_norm.weight[0].contiguous(), qk_norm.weight[config.num_heads].contiguous())
    like = torch.empty((config.num_kv_heads, 1, config.head_dim), dtype=TORCH_DTYPES[compute_dtype])
    if kv == "8-bit":
        like = torch.empty((config.num_kv_heads, 1, shape.kv_row_bytes), dtype=torch.int8)
    decode = NativeDecode(DecodeAttention(shape, *norms), facts, index, like)
    if products is None:
        return decode, None
    return decode, NativeChunk(ChunkAttention(shape, products, facts.window, *norms), facts, index, like)
