"""Puts a LeanShard together: which tensors make which projections and norms, and in what order they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from shard.checkpoint import Checkpoint
from shard.stage import ShardSpec
from shard.torch_backend.lean.attention import Attention, AttentionWeights
from shard.torch_backend.lean.config import ExpertFacts, LeanConfig, resolve
from shard.torch_backend.lean.experts import SparseMlp
from shard.torch_backend.lean.layer import FeedForward, GatedMlp, Layer, LayerNorms
from shard.torch_backend.lean.ops import Gated, Norm
from shard.torch_backend.lean.shard import LeanModel, LeanShard
from shard.torch_backend.lean.source import Check, Files, Source, Wanted
from shard.torch_backend.linear import Linear
from shard.weights import TensorNames


def build_lean(
    checkpoint: Checkpoint, spec: ShardSpec, device: torch.device, progress: Callable[[int, int], None]
) -> LeanShard:
    """Layers [first, last) of a model that `support.lean_reason` accepts; as `shard.torch_backend.build.build`."""
    config = resolve(checkpoint.config, spec)
    names = TensorNames(checkpoint.tensors, first=spec.first, tied_embeddings=config.tied_embeddings)
    check = Check(names)
    _Assembly(config, spec, check, device).model()
    files = Files(checkpoint, names, spec, device, check.parts, progress)
    model = _Assembly(config, spec, files, device).model()
    return LeanShard(model, spec, files.weights_bytes)


@dataclass(frozen=True, slots=True)
class _Assembly:
    config: LeanConfig
    spec: ShardSpec
    source: Source
    device: torch.device

    def model(self) -> LeanModel:
        config, spec = self.config, self.spec
        table: Wanted = ("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        embedding = self.source.table(table) if spec.is_first else None
        layers = tuple(self._layer(index) for index in range(spec.last - spec.first))
        norm = self._norm("model.norm", config.hidden_size) if spec.is_last else None
        head = None
        if spec.is_last:
            shares = embedding is not None and config.tied_embeddings
            head = embedding if shares else self.source.linear([("lm_head.weight", table[1])])
        return LeanModel(config=config, embedding=embedding, layers=layers, norm=norm, head=head)

    def _layer(self, index: int) -> Layer:
        config = self.config
        prefix = f"model.layers.{index}."
        weights = self._attention(f"{prefix}self_attn.")
        return Layer(
            norms=LayerNorms(
                before_attention=self._layer_norm(prefix, config.norms.before_attention),
                after_attention=self._layer_norm(prefix, config.norms.after_attention),
                before_mlp=self._layer_norm(prefix, config.norms.before_mlp),
                after_mlp=self._layer_norm(prefix, config.norms.after_mlp),
            ),
            attention=Attention(
                weights,
                config,
                config.layers[index],
                index,
                self.spec.compute_dtype,
                self.spec.kv,
                on_cpu=self.device.type == "cpu",
            ),
            mlp=self._feed_forward(f"{prefix}mlp.", config.experts if config.layers[index].is_sparse else None),
            residual_multiplier=config.residual_multiplier,
        )

    def _attention(self, prefix: str) -> AttentionWeights:
        config = self.config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        if config.fused_in_file:
            sizes = {"qkv_proj": queries + 2 * keys}
        output = {"o_proj": config.hidden_size}
        over_heads, over_all = config.qk_norm == "head", config.qk_norm == "projection"
        return AttentionWeights(
            qkv=self._matrix(prefix, sizes, config.hidden_size),
            qkv_bias=self._bias(prefix, sizes) if config.qkv_bias else None,
            output=self._matrix(prefix, output, queries),
            output_bias=self._bias(prefix, output) if config.output_bias else None,
            qk_norm=self._head_norm(prefix) if over_heads else None,
            q_norm=self._norm(f"{prefix}q_norm", queries) if over_all else None,
            k_norm=self._norm(f"{prefix}k_norm", keys) if over_all else None,
        )

    def _feed_forward(self, prefix: str, experts: ExpertFacts | None) -> FeedForward:
        return self._mlp(prefix) if experts is None else self._sparse_mlp(prefix, experts)

    def _sparse_mlp(self, prefix: str, experts: ExpertFacts) -> SparseMlp:
        hidden, count, width = self.config.hidden_size, experts.num_experts, experts.intermediate_size
        router = self.source.dense([(f"{prefix}gate.weight", (count, hidden))])
        gate_up = self.source.experts((f"{prefix}experts.gate_up_proj", (count, 2 * width, hidden)))
        down = self.source.experts((f"{prefix}experts.down_proj", (count, hidden, width)))
        gate = Gated(self.config.activation, self.device)
        mlps = tuple(
            GatedMlp(gate_up=one, gate_up_bias=None, down=two, down_bias=None, gate=gate)
            for one, two in zip(gate_up, down, strict=True)
        )
        return SparseMlp(router=router, experts=mlps, top_k=experts.top_k, normalize=experts.normalize)

    def _mlp(self, prefix: str) -> GatedMlp:
        config = self.config
        sizes = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        if config.fused_in_file:
            sizes = {"gate_up_proj": 2 * config.intermediate_size}
        down = {"down_proj": config.hidden_size}
        return GatedMlp(
            gate_up=self._matrix(prefix, sizes, config.hidden_size),
            gate_up_bias=self._bias(prefix, sizes) if config.mlp_bias else None,
            down=self._matrix(prefix, down, config.intermediate_size),
            down_bias=self._bias(prefix, down) if config.mlp_bias else None,
            gate=Gated(config.activation, self.device),
        )

    def _matrix(self, prefix: str, sizes: dict[str, int], columns: int) -> Linear:
        return self.source.linear([(f"{prefix}{name}.weight", (rows, columns)) for name, rows in sizes.items()])

    def _bias(self, prefix: str, sizes: dict[str, int]) -> torch.Tensor:
        return self.source.dense([(f"{prefix}{name}.bias", (rows,)) for name, rows in sizes.items()])

    def _layer_norm(self, prefix: str, name: str | None) -> Norm | None:
        return None if name is None else self._norm(prefix + name, self.config.hidden_size)

    def _norm(self, name: str, width: int) -> Norm:
        weight = self.source.dense([(f"{name}.weight", (width,))])
        return Norm(weight + self.config.norm_offset, self.config.norm_eps, width=width)

    def _head_norm(self, prefix: str) -> Norm:
        """Both norms as one, weights [heads + kv_heads, head_dim]."""
        config = self.config
        names = (("q_norm", config.num_heads), ("k_norm", config.num_kv_heads))
        weights = [
            (self.source.dense([(f"{prefix}{name}.weight", (config.head_dim,))]) + config.norm_offset).expand(heads, -1)
            for name, heads in names
        ]
        return Norm(torch.cat(weights), config.norm_eps, width=config.head_dim)
