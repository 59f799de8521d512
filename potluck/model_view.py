"""A model as `potluck show` tells it: to people, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, get_args

from rich.markup import escape
from rich.table import Table

from potluck.config import DEFAULT_CONTEXT_TOKENS
from potluck.planning import profile_of
from potluck.store import StoredModel
from potluck.store.facts import config_of, facts_of
from potluck.store.formats import FormatRow
from potluck.terminal import gib
from shard.stored_bytes import weights_on
from shard.weight_blocks import BITS_ANEW, Backend
from transport.messages import DTYPE_BYTES, DType, WeightsForm

SHOWN_DTYPE: DType = "bfloat16"
"""What a stage computes in unless the plan says otherwise, and what sizes are shown in."""

_KEPT = {"exactly": "kept exactly", "dense": "dense", "not loaded": "not loaded"}


def summary_of(model: StoredModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "source": model.source,
        "path": str(model.path),
        "present": model.is_present,
        "bytes": model.num_bytes,
        "architecture": model.spec.architecture,
        "layers": model.spec.num_layers,
        "format": model.spec.stored_dtype,
    }


def details_of(model: StoredModel, formats: tuple[FormatRow, ...] | None) -> dict[str, Any]:
    """`formats` None: the files can't be read."""
    spec, facts = model.spec, facts_of(model)
    context = min(DEFAULT_CONTEXT_TOKENS, spec.context_tokens)
    parts = spec.part_bytes(
        "torch", SHOWN_DTYPE, weights_on("torch", config_of(model), "stored", stacked_experts=spec.stacked_experts)
    )
    stored = _weights_bytes(model, "stored")
    return summary_of(model) | {
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "context_tokens": spec.context_tokens,
        "tied_embeddings": spec.tied_embeddings,
        "dtype": SHOWN_DTYPE,
        "weights_bytes": stored["torch"],
        "weights_bytes_mlx": stored["mlx"],
        "quantized_bytes": {str(bits): _weights_bytes(model, form) for form, bits in BITS_ANEW.items()},
        "layer_bytes": list(parts.layers),
        "embedding_bytes": parts.embed,
        "head_bytes": parts.head,
        "kv_bytes_per_token": sum(spec.kv_elements_per_token) * DTYPE_BYTES[SHOWN_DTYPE],
        "kv_bytes_per_token_8_bit": profile_of(model, kv="8-bit").kv_bytes(0, spec.num_layers, 1, 1, SHOWN_DTYPE)
        if spec.head_dim is not None
        else None,
        "default_context_tokens": context,
        "kv_bytes_default_context": spec.stage_kv_bytes(0, spec.num_layers, context, SHOWN_DTYPE),
        "sliding_windows": sorted({window for window in spec.windows if window is not None}),
        "sliding_layers": sum(window is not None for window in spec.windows),
        "tokenizer": facts.has_tokenizer,
        "chat_template": facts.has_chat_template,
        "backends": list(facts.backends),
        "torch_path": None if "torch" not in facts.backends else "library" if facts.library_reason else "lean",
        "torch_path_reason": facts.library_reason,
        "files": model.to_json()["files"],
        "formats": None if formats is None else [asdict(row) for row in formats],
        "formats_total": None if formats is None else _totals(formats),
    }


def _weights_bytes(model: StoredModel, weights: WeightsForm) -> dict[str, int]:
    """What the whole model takes on one device of each backend."""
    spec, config = model.spec, config_of(model)
    return {
        backend: spec.stage_weights_bytes(
            0,
            spec.num_layers,
            SHOWN_DTYPE,
            backend=backend,
            weights=weights_on(backend, config, weights, stacked_experts=spec.stacked_experts),
        )
        for backend in get_args(Backend)
    }


def rows_of(model: StoredModel) -> list[tuple[str, str]]:
    """`show` for people: label and value."""
    facts = details_of(model, None)
    layers = facts["layer_bytes"]
    each = gib(layers[0]) if len(set(layers)) == 1 else f"{gib(min(layers))} to {gib(max(layers))}"
    windows = ", ".join(f"{window:,}" for window in facts["sliding_windows"])
    sliding = f", {facts['sliding_layers']} with a sliding window of {windows} tokens" if windows else ""
    tied = ", the same as the embedding" if facts["tied_embeddings"] else ""
    context = facts["default_context_tokens"]
    return [
        ("name", model.name),
        ("source", model.source),
        ("folder", str(model.path) if model.is_present else f"{model.path} (missing: potluck pull {model.source})"),
        ("architecture", facts["architecture"]),
        ("layers", f"{facts['layers']}{sliding}"),
        ("hidden size", f"{facts['hidden_size']:,}"),
        ("vocabulary", f"{facts['vocab_size']:,}"),
        ("context", f"{facts['context_tokens']:,} tokens"),
        ("stored as", f"{facts['format']}, {gib(model.num_bytes)}"),
        ("weights", f"{_on_both(facts['weights_bytes'], facts['weights_bytes_mlx'])}, what is dense as {SHOWN_DTYPE}"),
        *_quantized_rows(facts),
        ("  each layer", f"{each} on torch"),
        ("  embedding", gib(facts["embedding_bytes"])),
        ("  head", f"{gib(facts['head_bytes'])}{tied}"),
        ("KV cache", f"{facts['kv_bytes_per_token'] / 1024:,.1f} KiB a token{_in_8_bits(facts)}"),
        ("", f"{gib(facts['kv_bytes_default_context'])} for {context:,} tokens"),
        ("tokenizer", "yes" if facts["tokenizer"] else "no"),
        ("chat template", "yes" if facts["chat_template"] else "no"),
        ("backends", ", ".join(facts["backends"]) or "none runs this architecture yet"),
        *_path_rows(facts),
        *(
            (
                "file" if index == 0 else "",
                f"{file.name}  {file.num_bytes:,} bytes  sha256 {file.sha256 or 'not known'}",
            )
            for index, file in enumerate(model.files)
        ),
    ]


def _on_both(torch_bytes: int, mlx_bytes: int) -> str:
    return f"{gib(torch_bytes)} on torch, {gib(mlx_bytes)} on MLX"


def _in_8_bits(facts: dict[str, Any]) -> str:
    taken = facts["kv_bytes_per_token_8_bit"]
    return "" if taken is None else f"; {taken / 1024:,.1f} with --kv-cache 8-bit"


def _quantized_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What --quantize would make of it, where that is less."""
    return [
        (f"  --quantize {bits}", _on_both(taken["torch"], taken["mlx"]))
        for bits, taken in sorted(facts["quantized_bytes"].items(), reverse=True)
        if (taken["torch"], taken["mlx"]) != (facts["weights_bytes"], facts["weights_bytes_mlx"])
    ]


def _path_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    if facts["torch_path"] is None:
        return []
    reason = facts["torch_path_reason"]
    return [("torch path", f"library, all dense: {reason}" if reason else "lean")]


def _totals(formats: tuple[FormatRow, ...]) -> dict[str, int]:
    names = ("num_tensors", "file_bytes", "torch_bytes", "mlx_bytes")
    return {name: sum(getattr(row, name) for row in formats) for name in names}


def format_table(formats: tuple[FormatRow, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("format", "tensors", "in the file", "on torch", "on MLX", "kept"):
        table.add_column(heading, justify="left" if heading in ("format", "kept") else "right", no_wrap=True)
    for row in formats:
        kept = f"quantized anew, {row.bits} bits" if row.kept == "anew" else _KEPT[row.kept]
        sizes = map(gib, (row.file_bytes, row.torch_bytes, row.mlx_bytes))
        table.add_row(escape(row.format), str(row.num_tensors), *sizes, kept)
    total = _totals(formats)
    sizes = map(gib, (total["file_bytes"], total["torch_bytes"], total["mlx_bytes"]))
    table.add_row("all", str(total["num_tensors"]), *sizes, "", style="bold")
    return table
