"""Puts a fused shard together: a check that all tensors exist, then the files, by the same code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from shard.formats.checkpoint import Checkpoint
from shard.formats.families import family_of
from shard.stage import StageSpec
from shard.torch_backend.fused.attention import Attention, AttentionWeights
from shard.torch_backend.fused.config import ExpertFacts, FusedConfig, resolve
from shard.torch_backend.fused.layer import FeedForward, GatedMlp, Layer, LayerNorms, SparseMlp
from shard.torch_backend.fused.ops import GatedActivation, RmsNorm
from shard.torch_backend.fused.shard import FusedModel, FusedShard
from shard.torch_backend.linear import DenseLinear, EmbeddingTable, Linear, load_embedding_table, load_linear
from shard.torch_backend.memory import translate_load_oom
from shard.torch_backend.tensors import TensorNames, TensorPart, total_file_bytes

# A parameter as transformers names it, with layers counted from the stage's first, and its shape.
ParameterShape = tuple[str, tuple[int, ...]]


class WeightSource(Protocol):
    """Raises BadCheckpoint for a tensor that is missing or has another shape, DoesNotFit out of memory."""

    def linear(self, wanted: Sequence[ParameterShape]) -> Linear:
        """Matrices [rows_i, columns] of one input, their rows one after another."""

    def embedding_table(self, wanted: ParameterShape) -> EmbeddingTable:
        """A matrix that is read by rows too."""

    def experts(self, wanted: ParameterShape) -> list[Linear]:
        """A parameter [experts, rows, columns] whose experts are tensors of their own: a projection for each."""

    def dense(self, wanted: Sequence[ParameterShape]) -> torch.Tensor:
        """Vectors or small matrices, their rows one after another, float32 whatever the file has."""


class WeightCheck:
    """Finds every tensor, reads none. The stage that it makes is good for nothing."""

    def __init__(self, names: TensorNames) -> None:
        self._names = names
        self.parts: list[TensorPart] = []

    def linear(self, wanted: Sequence[ParameterShape]) -> Linear:
        self._find(wanted)
        return DenseLinear(torch.empty(0))

    def embedding_table(self, wanted: ParameterShape) -> EmbeddingTable:
        self._find([wanted])
        return DenseLinear(torch.empty(0))

    def experts(self, wanted: ParameterShape) -> list[Linear]:
        self._find([wanted])
        return [DenseLinear(torch.empty(0))] * wanted[1][0]

    def dense(self, wanted: Sequence[ParameterShape]) -> torch.Tensor:
        self._find(wanted)
        return torch.empty(0)

    def _find(self, wanted: Sequence[ParameterShape]) -> None:
        for name, shape in wanted:
            self.parts.extend(self._names.parts(name, shape))


class WeightReader:
    """Reads from the checkpoint, one tensor at a time. `weights_bytes` is what it has put into memory."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: TensorNames,
        spec: StageSpec,
        device: torch.device,
        parts: Sequence[TensorPart],
        progress: Callable[[int, int], None],
    ) -> None:
        self._checkpoint = checkpoint
        self._names = names
        self._spec = spec
        self._device = device
        self._progress = progress
        self._total_bytes = total_file_bytes(checkpoint.tensors, parts)
        self._read_bytes = 0
        self.weights_bytes = 0
        progress(0, self._total_bytes)

    def linear(self, wanted: Sequence[ParameterShape]) -> Linear:
        return self._load([part.name for part in self._parts(wanted)])

    def embedding_table(self, wanted: ParameterShape) -> EmbeddingTable:
        (part,) = self._parts([wanted])
        with translate_load_oom(part.name, self._spec.device):
            made = load_embedding_table(self._checkpoint, part.name, self._spec.compute_dtype, self._device, self._read)
        self.weights_bytes += made.num_bytes
        return made

    def experts(self, wanted: ParameterShape) -> list[Linear]:
        of_expert: dict[int | slice, list[str]] = {}
        for part in self._parts([wanted]):
            of_expert.setdefault(part.index[0], []).append(part.name)
        return [self._load(names) for names in of_expert.values()]

    def dense(self, wanted: Sequence[ParameterShape]) -> torch.Tensor:
        parts = self._parts(wanted)
        arrays = []
        for part in parts:
            array = np.empty(part.shape, dtype=np.float32)
            self._checkpoint.read_into(part.name, array, "float32")
            arrays.append(torch.from_numpy(array))
        with translate_load_oom(wanted[0][0], self._spec.device):
            made = torch.cat(arrays).to(self._device)
        self.weights_bytes += made.nbytes
        self._read(total_file_bytes(self._checkpoint.tensors, parts))
        return made

    def _load(self, names: Sequence[str]) -> Linear:
        with translate_load_oom(names[0], self._spec.device):
            made = load_linear(self._checkpoint, names, self._spec.compute_dtype, self._device, self._read)
        self.weights_bytes += made.num_bytes
        return made

    def _parts(self, wanted: Sequence[ParameterShape]) -> list[TensorPart]:
        return [part for name, shape in wanted for part in self._names.parts(name, shape)]

    def _read(self, num_bytes: int) -> None:
        self._read_bytes += num_bytes
        self._progress(self._read_bytes, self._total_bytes)


def build_fused(
    checkpoint: Checkpoint, spec: StageSpec, device: torch.device, progress: Callable[[int, int], None]
) -> FusedShard:
    """Layers [first, last) of a model that `support.why_not_fused` accepts; as `shard.torch_backend.build.build`."""
    config, experts = resolve(checkpoint.config, spec), family_of(checkpoint.config).experts
    names = TensorNames(
        checkpoint.tensors,
        first=spec.first,
        tied_embeddings=config.tied_embeddings,
        experts=experts,
    )
    check = WeightCheck(names)
    _Assembly(config, spec, check, device).model()
    files = WeightReader(checkpoint, names, spec, device, check.parts, progress)
    model = _Assembly(config, spec, files, device).model()
    return FusedShard(model, spec, files.weights_bytes)


@dataclass(frozen=True, slots=True)
class _Assembly:
    config: FusedConfig
    spec: StageSpec
    source: WeightSource
    device: torch.device

    def model(self) -> FusedModel:
        config, spec = self.config, self.spec
        table: ParameterShape = ("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        embedding = self.source.embedding_table(table) if spec.is_first else None
        layers = tuple(self._layer(index) for index in range(spec.last - spec.first))
        norm = self._norm("model.norm", config.hidden_size) if spec.is_last else None
        lm_head = None
        if spec.is_last:
            shares = embedding is not None and config.tied_embeddings
            lm_head = embedding if shares else self.source.linear([("lm_head.weight", table[1])])
        return FusedModel(config=config, embedding=embedding, layers=layers, norm=norm, lm_head=lm_head)

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
        if config.fused_tensors:
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
        gate = GatedActivation(self.config.activation, self.device)
        mlps = tuple(
            GatedMlp(gate_up=one, gate_up_bias=None, down=two, down_bias=None, gate=gate)
            for one, two in zip(gate_up, down, strict=True)
        )
        return SparseMlp(router=router, experts=mlps, top_k=experts.top_k, normalize=experts.normalize)

    def _mlp(self, prefix: str) -> GatedMlp:
        config = self.config
        sizes = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        if config.fused_tensors:
            sizes = {"gate_up_proj": 2 * config.intermediate_size}
        down = {"down_proj": config.hidden_size}
        return GatedMlp(
            gate_up=self._matrix(prefix, sizes, config.hidden_size),
            gate_up_bias=self._bias(prefix, sizes) if config.mlp_bias else None,
            down=self._matrix(prefix, down, config.intermediate_size),
            down_bias=self._bias(prefix, down) if config.mlp_bias else None,
            gate=GatedActivation(config.activation, self.device),
        )

    def _matrix(self, prefix: str, sizes: dict[str, int], columns: int) -> Linear:
        return self.source.linear([(f"{prefix}{name}.weight", (rows, columns)) for name, rows in sizes.items()])

    def _bias(self, prefix: str, sizes: dict[str, int]) -> torch.Tensor:
        return self.source.dense([(f"{prefix}{name}.bias", (rows,)) for name, rows in sizes.items()])

    def _layer_norm(self, prefix: str, name: str | None) -> RmsNorm | None:
        return None if name is None else self._norm(prefix + name, self.config.hidden_size)

    def _norm(self, name: str, width: int) -> RmsNorm:
        weight = self.source.dense([(f"{name}.weight", (width,))])
        return RmsNorm(weight + self.config.norm_offset, self.config.norm_eps, width=width)

    def _head_norm(self, prefix: str) -> RmsNorm:
        """Both norms as one, weights [heads + kv_heads, head_dim]."""
        config = self.config
        names = (("q_norm", config.num_heads), ("k_norm", config.num_kv_heads))
        weights = [
            (self.source.dense([(f"{prefix}{name}.weight", (config.head_dim,))]) + config.norm_offset).expand(heads, -1)
            for name, heads in names
        ]
        return RmsNorm(torch.cat(weights), config.norm_eps, width=config.head_dim)
