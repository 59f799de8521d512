"""The families table: an architecture is one entry, which every reader of models asks.

A new one is an entry here and one of the tests' tiny models, which prove each path that the entry names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from shard.formats.spec import Backend

Activation = Literal["silu", "gelu_pytorch_tanh"]
Slides = Literal["never", "every_layer", "all_but_every_nth", "from_max_window_layers", "layers_without_rope"]
"""Which layers have a sliding window where config.json has no `layer_types`."""


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


_EMPTY: Mapping[str, Any] = MappingProxyType({})
_PLAIN_ROPE = frozenset({"default"})
_SCALED_ROPE = frozenset({"default", "linear", "llama3", "yarn"})


@dataclass(frozen=True, slots=True, kw_only=True)
class NormNames:
    """The norms of a layer as its files name them; None where the family has none in that place."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """How files name a layer's block of experts, and the three projections of each."""

    block: str = "mlp"
    gate_proj: str = "gate_proj"
    up_proj: str = "up_proj"
    down_proj: str = "down_proj"

    def tensor(self, expert: int | str, projection: str) -> str:
        """The name in a layer of an expert's "gate_proj", "up_proj" or "down_proj"."""
        return f"{self.block}.experts.{expert}.{getattr(self, projection)}.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedFacts:
    """`keys`: those of config.json that the fused path knows beyond the ones of every family. `qk_norm`: over each head
    or over the whole projection. `rope_per_kind`: full and sliding layers have rotary embeddings of their own."""

    keys: frozenset[str]
    qk_norm: Literal["head", "projection"] | None = None
    rope_per_kind: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MlxFacts:
    """How the family maps to a module of mlx_lm.models.

    `rope_types` are those that the class computes as transformers does (some classes ignore scaling without a word).
    `defaults` are further keys that a config.json may leave out, with transformers' values.
    `array_masks`: the class can't take the mask "causal". `batched_decode`: its attention takes masks per sequence.
    """

    module: str
    rope_types: frozenset[str] = _PLAIN_ROPE
    defaults: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
    array_masks: bool = False
    batched_decode: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFacts:
    """`attention_biases`: the projections of attention that have one; None: all or none, as the file has it.
    `interleaved_rotary`: the rows of queries and keys are permuted. `large_layers`: with so many layers, llama.cpp
    scales attention by hidden / heads. `default_window`: llama.cpp's own, for files that do not say."""

    architecture: str
    hf_class: str
    attention_biases: frozenset[str] | None = frozenset()
    interleaved_rotary: bool = False
    large_layers: int | None = None
    default_window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One `model_type`. A path that is None or False does not run it; the parity tests prove each that does.

    Defaults are transformers', for keys that config.json leaves out. `default_head_dim` None: hidden_size / heads.
    `default_kv_heads` None: as many as heads. `optional_window`: only `use_sliding_window` makes layers slide.
    `window_pattern`: every n-th layer is full; `pattern_key`: unless config.json has another one.
    `norm_plus_one`: a norm's weights are w + 1, where Hugging Face's files hold w, and GGUF's w + 1.
    `fused_tensors`: the files hold q, k, v as one tensor, and gate and up. `scaled_embedding`: by √hidden_size.
    `qkv_bias`: queries, keys and values have biases without config.json saying so.
    """

    model_type: str
    torch_library: bool = True
    fused: FusedFacts | None = None
    mlx: MlxFacts | None = None
    gguf: GgufFacts | None = None
    default_head_dim: int | None = None
    default_kv_heads: int | None = None
    default_rope_theta: float = 10_000.0
    tied_by_default: bool = False
    slides: Slides = "never"
    default_window: int | None = None
    optional_window: bool = False
    window_pattern: int = 1
    pattern_key: bool = False
    activation: Activation = "silu"
    norms: NormNames = NormNames()
    norm_plus_one: bool = False
    scaled_embedding: bool = False
    caps_attention: bool = False
    caps_logits: bool = False
    qkv_bias: bool = False
    fused_tensors: bool = False
    experts: ExpertNames | None = None

    def head_dim(self, config: Mapping[str, Any]) -> Any:
        """As config.json says or leaves open, unchecked; so are the other two."""
        found = self.default_head_dim if config.get("head_dim") is None else config["head_dim"]
        return config["hidden_size"] // config["num_attention_heads"] if found is None else found

    def kv_heads(self, config: Mapping[str, Any]) -> Any:
        found = config.get("num_key_value_heads", self.default_kv_heads)
        return config["num_attention_heads"] if found is None else found

    def window(self, config: Mapping[str, Any]) -> Any:
        """The window of layers that slide; None where none does."""
        if self.optional_window and not config.get("use_sliding_window"):
            return None
        return config.get("sliding_window", self.default_window)


_OPTIONAL_WINDOW_KEYS = _keys("layer_types sliding_window use_sliding_window")
_GEMMA_KEYS = _keys("""
    attention_bias attn_logit_softcapping final_logit_softcapping hidden_activation layer_types query_pre_attn_scalar
    sliding_window
""")
_GEMMA_NORMS = NormNames(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
_NO_BIASES: Mapping[str, Any] = MappingProxyType({"attention_bias": False, "mlp_bias": False})
_MLX_LLAMA = MlxFacts(module="llama", rope_types=_SCALED_ROPE, defaults=_NO_BIASES)

_ALL = (
    Family(
        model_type="gemma2",
        fused=FusedFacts(keys=_GEMMA_KEYS),
        mlx=MlxFacts(module="gemma2", array_masks=True, batched_decode=False),
        gguf=GgufFacts(architecture="gemma2", hf_class="Gemma2ForCausalLM", large_layers=46, default_window=4096),
        default_head_dim=256,
        default_kv_heads=4,
        tied_by_default=True,
        slides="all_but_every_nth",
        window_pattern=2,
        default_window=4096,
        activation="gelu_pytorch_tanh",
        norms=_GEMMA_NORMS,
        norm_plus_one=True,
        scaled_embedding=True,
        caps_attention=True,
        caps_logits=True,
    ),
    Family(
        model_type="gemma3_text",
        fused=FusedFacts(
            keys=_GEMMA_KEYS | _keys("_sliding_window_pattern rope_local_base_freq sliding_window_pattern"),
            qk_norm="head",
            rope_per_kind=True,
        ),
        mlx=MlxFacts(module="gemma3_text", rope_types=frozenset({"default", "linear"})),
        gguf=GgufFacts(architecture="gemma3", hf_class="Gemma3ForCausalLM", large_layers=62),
        default_head_dim=256,
        default_kv_heads=4,
        default_rope_theta=1_000_000.0,
        tied_by_default=True,
        slides="all_but_every_nth",
        window_pattern=6,
        pattern_key=True,
        default_window=4096,
        activation="gelu_pytorch_tanh",
        norms=_GEMMA_NORMS,
        norm_plus_one=True,
        scaled_embedding=True,
        caps_logits=True,
    ),
    Family(
        model_type="gpt_oss",
        default_head_dim=64,
        default_kv_heads=8,
        default_rope_theta=150_000.0,
        slides="all_but_every_nth",
        window_pattern=2,
        default_window=128,
    ),
    Family(
        model_type="granite",
        fused=FusedFacts(
            keys=_keys("""
                attention_bias attention_multiplier embedding_multiplier logits_scaling mlp_bias residual_multiplier
            """)
        ),
    ),
    Family(
        model_type="llama",
        fused=FusedFacts(keys=_keys("attention_bias mlp_bias")),
        mlx=_MLX_LLAMA,
        gguf=GgufFacts(
            architecture="llama", hf_class="LlamaForCausalLM", attention_biases=None, interleaved_rotary=True
        ),
    ),
    Family(
        model_type="mistral",
        fused=FusedFacts(keys=_keys("sliding_window")),
        mlx=_MLX_LLAMA,
        default_kv_heads=8,
        slides="every_layer",
        default_window=4096,
    ),
    Family(
        model_type="mixtral",
        fused=FusedFacts(keys=_keys("num_experts num_experts_per_tok num_local_experts sliding_window")),
        mlx=MlxFacts(module="mixtral"),
        default_kv_heads=8,
        default_rope_theta=1_000_000.0,
        slides="every_layer",
        experts=ExpertNames(block="block_sparse_moe", gate_proj="w1", up_proj="w3", down_proj="w2"),
    ),
    Family(
        model_type="olmo2",
        fused=FusedFacts(keys=_keys("attention_bias"), qk_norm="projection"),
        mlx=MlxFacts(module="olmo2", rope_types=_SCALED_ROPE, defaults=_NO_BIASES),
        norms=NormNames(
            before_attention=None,
            after_attention="post_attention_layernorm",
            before_mlp=None,
            after_mlp="post_feedforward_layernorm",
        ),
    ),
    Family(
        model_type="phi3",
        fused=FusedFacts(keys=_keys("original_max_position_embeddings partial_rotary_factor sliding_window")),
        mlx=MlxFacts(module="phi3", defaults=MappingProxyType({"partial_rotary_factor": 1.0})),
        slides="every_layer",
        fused_tensors=True,
    ),
    Family(
        model_type="qwen2",
        fused=FusedFacts(keys=_OPTIONAL_WINDOW_KEYS),
        mlx=MlxFacts(module="qwen2", rope_types=_SCALED_ROPE),
        gguf=GgufFacts(architecture="qwen2", hf_class="Qwen2ForCausalLM", attention_biases=_keys("q k v")),
        default_kv_heads=32,
        slides="from_max_window_layers",
        default_window=4096,
        optional_window=True,
        qkv_bias=True,
    ),
    Family(
        model_type="qwen3",
        fused=FusedFacts(keys=_OPTIONAL_WINDOW_KEYS | _keys("attention_bias"), qk_norm="head"),
        mlx=MlxFacts(module="qwen3", rope_types=_SCALED_ROPE),
        gguf=GgufFacts(architecture="qwen3", hf_class="Qwen3ForCausalLM"),
        default_head_dim=128,
        default_kv_heads=32,
        slides="from_max_window_layers",
        default_window=4096,
        optional_window=True,
    ),
    Family(
        model_type="qwen3_moe",
        fused=FusedFacts(
            keys=_keys("""
                attention_bias decoder_sparse_step mlp_only_layers moe_intermediate_size norm_topk_prob num_experts
                num_experts_per_tok num_local_experts sliding_window use_sliding_window
            """),
            qk_norm="head",
        ),
        mlx=MlxFacts(module="qwen3_moe", defaults=MappingProxyType({"mlp_only_layers": [], "decoder_sparse_step": 1})),
        default_kv_heads=4,
        slides="every_layer",
        default_window=4096,
        optional_window=True,
        experts=ExpertNames(),
    ),
    Family(
        model_type="smollm3",
        fused=FusedFacts(
            keys=_OPTIONAL_WINDOW_KEYS | _keys("attention_bias mlp_bias no_rope_layer_interval no_rope_layers")
        ),
        mlx=MlxFacts(
            module="smollm3",
            rope_types=_SCALED_ROPE,
            defaults=MappingProxyType({**_NO_BIASES, "no_rope_layers": None, "no_rope_layer_interval": 4}),
        ),
        default_kv_heads=4,
        default_rope_theta=2_000_000.0,
        tied_by_default=True,
        slides="layers_without_rope",
        optional_window=True,
    ),
)
FAMILIES: Mapping[str, Family] = MappingProxyType({family.model_type: family for family in _ALL})
GGUF_FAMILIES: Mapping[str, Family] = MappingProxyType(
    {family.gguf.architecture: family for family in _ALL if family.gguf is not None}
)


def family_of(config: Mapping[str, Any]) -> Family:
    """The entry of a Hugging Face config.json; for an architecture that has none, one that nothing runs."""
    name = str(config.get("text_config", config).get("model_type", "without a model_type"))
    return FAMILIES.get(name) or Family(model_type=name, torch_library=False)


def backends_of(architecture: str) -> tuple[Backend, ...]:
    """The backends that run the architecture, whether or not they are installed here."""
    family = family_of({"model_type": architecture})
    runs: dict[Backend, bool] = {"torch": family.torch_library, "mlx": family.mlx is not None}
    return tuple(backend for backend, does in runs.items() if does)


def architectures_of(backend: Backend) -> str:
    """The architectures that the backend runs, as a hint lists them."""
    return ", ".join(name for name in FAMILIES if backend in backends_of(name))


# Keys of every family that say nothing about the computation of a decode step.
_IGNORED_KEYS = _keys("""
    _attn_implementation _attn_implementation_autoset _name_or_path architectures attention_dropout auto_map
    bad_words_ids begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward
    decoder_start_token_id do_sample dtype early_stopping embd_pdrop eos_token_id experts_implementation finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder is_llama_config label2id
    length_penalty max_length max_window_layers min_length mlx_lm_version model_type no_repeat_ngram_size num_beams
    num_return_sequences output_attentions output_hidden_states output_router_logits output_scores pad_token_id prefix
    pretraining_tp problem_type quantization quantization_config remove_invalid_values repetition_penalty resid_pdrop
    return_dict return_dict_in_generate router_aux_loss_coef router_jitter_noise sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16
    use_cache
""")
_COMMON_KEYS = _keys("""
    head_dim hidden_act hidden_size intermediate_size max_position_embeddings num_attention_heads num_hidden_layers
    num_key_value_heads rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings vocab_size
""")
# Features that the path does not have: it runs a model whose config.json says that they are off.
_MUST_BE_FALSE = (
    "add_cross_attention",
    "is_encoder_decoder",
    "pruned_heads",
    "rope_interleaved",
    "use_bidirectional_attention",
)
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
_ROPE_TYPES = ("default", "linear", "llama3", "longrope", "su", "yarn")
_ROPE_KEYS = _keys("""
    attention_factor beta_fast beta_slow factor high_freq_factor long_factor long_mscale low_freq_factor mscale
    mscale_all_dim original_max_position_embeddings partial_rotary_factor rope_theta rope_type short_factor short_mscale
    truncate type
""")
_LAYER_KINDS = ("full_attention", "sliding_attention")


def why_not_fused(config: Mapping[str, Any], *, stacked_experts: bool = False) -> str | None:
    """None where the fused path runs a model of this Hugging Face config.json, else why it does not.

    `stacked_experts`: its files hold all experts of a layer in one tensor (`has_stacked_experts`).
    """
    config, family = config.get("text_config", config), family_of(config)
    if family.fused is None:
        return f"the architecture {family.model_type} has no fused path"
    for key in _MUST_BE_FALSE:
        if config.get(key):
            return f"{key} = {config[key]!r} has no fused path"
    known = _IGNORED_KEYS | _COMMON_KEYS | family.fused.keys | set(_MUST_BE_FALSE)
    unknown = sorted(key for key, value in config.items() if value is not None and key not in known)
    if unknown:
        return f"config.json says what the fused path does not know: {', '.join(unknown)}"
    activation = config.get("hidden_activation") or config.get("hidden_act") or family.activation
    if activation not in _ACTIVATIONS:
        return f"the activation {activation} has no fused path"
    if not family.caps_attention and config.get("attn_logit_softcapping") is not None:
        return f"attn_logit_softcapping of a {family.model_type} has no fused path"
    kinds = sorted({str(kind) for kind in config.get("layer_types") or ()} - set(_LAYER_KINDS))
    if kinds:
        return f"layers of the kind {', '.join(kinds)} have no fused path"
    if stacked_experts:
        return "experts stacked in one tensor (mlp.experts.gate_up_proj) have no fused path"
    has_partial_rope = "partial_rotary_factor" in family.fused.keys
    return _why_rope_not_fused(config, has_partial_rope=has_partial_rope)


def has_stacked_experts(names: Iterable[str]) -> bool:
    return any(name.endswith(".mlp.experts.gate_up_proj") for name in names)


def _why_rope_not_fused(config: Mapping[str, Any], *, has_partial_rope: bool) -> str | None:
    for found in (config.get("rope_scaling"), config.get("rope_parameters")):
        if not found:
            continue
        # Gemma 3 has one of these for each kind of layer.
        for rope in found.values() if all(kind in _LAYER_KINDS for kind in found) else (found,):
            reason = _why_one_rope_not_fused(rope or {})
            if reason is not None:
                return reason
            if not has_partial_rope and (rope or {}).get("partial_rotary_factor") not in (None, 1.0):
                return f"a partial rotary embedding of a {config['model_type']} has no fused path"
    return None


def _why_one_rope_not_fused(rope: Mapping[str, Any]) -> str | None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in _ROPE_TYPES:
        return f"rotary embeddings of the type {rope_type} have no fused path"
    unknown = sorted(key for key, value in rope.items() if value is not None and key not in _ROPE_KEYS)
    if unknown:
        return f"the rotary embedding has what the fused path does not know: {', '.join(unknown)}"
    return None
