"""What it costs that a model lies in pieces: loading from them beside the plain file; profiles with made-up weights.

python -m bench.pieces [--model FOLDER ...] [--rounds 9] [--backend torch mlx] [--budget 3] [--cold] [--json FILE]
Both ways are taken in turn, round after round, because the machine drifts; ratios are medians over rounds of ratios
within a round. Without a model: SmolLM2 from the store, and 1 GB of random weights. `--cold` empties the system's page
cache before each load (root, Linux). Profiles are of the first model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from bench.hardware import facts
from bench.random_checkpoint import LlamaShape, write_checkpoint
from potluck.store import Store
from shard.checkpoint import Checkpoint
from shard.load import Backend, load_shard
from shard.open import open_checkpoint, open_unread
from shard.piece_list import make_piece_list, model_files
from shard.profile.profile import Profiler
from shard.profile.report import ProfileReport
from shard.profile.settings import ProfileSettings
from shard.shared_model import materialize
from shard.stage import ShardSpec
from transport.pieces.store import PieceStore

_DROP = Path("/proc/sys/vm/drop_caches")
_ONE_GB = LlamaShape(hidden=2048, intermediate=5632, layers=8, heads=32, kv_heads=4, vocab=32_000)
_ALIGNMENT = 64
"""That of torch's memory. NumPy's, 16 bytes into a page, takes twice the time to copy to from the start of a file's
page: processors mistake what is read for what was just written."""
_room = np.ones((1 << 28) + _ALIGNMENT, np.uint8)  # Its pages are there before anything is timed.
_buffer = _room[-_room.ctypes.data % _ALIGNMENT :]


def cut(folder: Path, scratch: Path) -> tuple[PieceStore, dict[str, float]]:
    """The model in `folder` as pieces in `scratch`, and what that took."""
    started = time.perf_counter()
    pieces = make_piece_list(folder, folder.name)
    hashing_s = time.perf_counter() - started
    files, store = model_files(folder), PieceStore(scratch / "pieces")
    for file in pieces.files:
        whole = np.memmap(files.weights[file.name], np.uint8, "r") if file.name in files.weights else None
        for piece in file.pieces:
            data = files.small[file.name] if whole is None else whole
            store.put(bytes(data[piece.offset : piece.offset + piece.num_bytes]), piece.digest)
    materialize(pieces, store, scratch / "skeleton")
    num_bytes = sum(file.num_bytes for file in pieces.files)
    return store, {
        "bytes": num_bytes,
        "pieces": sum(len(file.pieces) for file in pieces.files),
        "hashing_s": hashing_s,
        "hashing_bytes_per_s": num_bytes / hashing_s,
    }


def loading(folder: Path, backends: list[Backend], rounds: int, *, cold: bool) -> dict[str, object]:
    with tempfile.TemporaryDirectory(dir=Path.home()) as scratch:
        store, found = cut(folder, Path(scratch))

        def plain() -> Checkpoint:
            return open_checkpoint(folder)

        def pieced() -> Checkpoint:
            return open_checkpoint(Path(scratch) / "skeleton", pieces=store)

        ways: dict[str, Callable[[Checkpoint], None]] = {"reading": _read}
        ways |= {backend: partial(_load, backend) for backend in backends}
        report: dict[str, object] = {"model": folder.name, **found}
        for name, use in ways.items():
            for opened in (plain, pieced):
                _timed(opened, use, cold=cold)
            pairs = []
            for number in range(rounds):
                order = (plain, pieced) if number % 2 == 0 else (pieced, plain)
                taken = {opened.__name__: _timed(opened, use, cold=cold) for opened in order}
                pairs.append((taken["plain"], taken["pieced"]))
            report[name] = {
                "plain_s": statistics.median(plain[0] for plain, _ in pairs),
                "pieces_s": statistics.median(pieces[0] for _, pieces in pairs),
                "ratio": statistics.median(pieces[0] / plain[0] for plain, pieces in pairs),
                "best_ratio": min(pieces[0] for _, pieces in pairs) / min(plain[0] for plain, _ in pairs),
                "cpu_ratio": statistics.median(pieces[1] / plain[1] for plain, pieces in pairs),
            }
            print(f"{folder.name} {name}: {report[name]}", file=sys.stderr)
        return report


def _timed(opened: Callable[[], Checkpoint], use: Callable[[Checkpoint], None], *, cold: bool) -> tuple[float, float]:
    """Seconds of the clock, and of the processor: where others use the machine too, the latter say more."""
    if cold:
        _DROP.write_text("3")
    started, started_cpu = time.perf_counter(), time.process_time()
    checkpoint = opened()
    use(checkpoint)
    checkpoint.close()
    return time.perf_counter() - started, time.process_time() - started_cpu


def _read(checkpoint: Checkpoint) -> None:
    """Every tensor as it is stored, into one buffer: what the files themselves can give."""
    for name, info in checkpoint.tensors.items():
        if info.affine is not None:
            checkpoint.read_affine(name, 0, int(np.prod(info.shape[:-1])))
            continue
        is_bf16 = info.format == "BF16"
        size = int(np.prod(info.shape)) * (2 if is_bf16 else 4)
        out = _buffer[:size].view(np.uint16 if is_bf16 else np.float32).reshape(info.shape)
        checkpoint.read_into(name, out, "bfloat16" if is_bf16 else "float32")


def _load(backend: Backend, checkpoint: Checkpoint) -> None:
    model = checkpoint.spec
    spec = ShardSpec(
        first=0,
        last=model.num_layers,
        num_layers=model.num_layers,
        device="mlx" if backend == "mlx" else "cpu",
        compute_dtype="bfloat16",
        wire_dtype="bfloat16",
        next_dtype="bfloat16",
        context_tokens=1024,
        kv_capacity_tokens=1024,
    )
    load_shard(checkpoint, spec, backend=backend)


def profiles(folder: Path, backend: Backend, rounds: int, budget_s: float) -> dict[str, object]:
    """What profiles say with the model's weights, again with them, and with made-up ones; the first two tell the
    noise."""
    settings = ProfileSettings(
        backend=backend, device="mlx" if backend == "mlx" else "cpu", dtype="bfloat16", budget_s=budget_s
    )
    found: dict[str, list[dict[str, float]]] = {"real": [], "again": [], "unread": []}
    for number in range(rounds):
        for kind in sorted(found, reverse=number % 2 == 1):
            checkpoint = open_unread(folder) if kind == "unread" else open_checkpoint(folder)
            found[kind].append(_summary(Profiler(checkpoint, settings, tell=lambda what: None).profile()))
            checkpoint.close()
    report: dict[str, object] = {"model": folder.name, "backend": backend}
    for quantity in found["real"][0]:
        times = {kind: [one[quantity] for one in some] for kind, some in found.items()}
        report[quantity] = {
            "real_s": statistics.median(times["real"]),
            "again_over_real": statistics.median(b / a for a, b in zip(times["real"], times["again"], strict=True)),
            "unread_over_real": statistics.median(b / a for a, b in zip(times["real"], times["unread"], strict=True)),
        }
        print(f"{backend} {quantity}: {report[quantity]}", file=sys.stderr)
    return report


def _summary(report: ProfileReport) -> dict[str, float]:
    layer = report.layers[0]
    return {
        "decode_layer_1": layer.decode.seconds[0][0],
        "decode_layer_most": layer.decode.seconds[-1][0],
        "prefill_layer_most": layer.prefill.seconds[-1][0],
        "head_1": report.head.seconds[0][0],
        "steady": report.steady_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.pieces", description=__doc__)
    parser.add_argument("--model", type=Path, nargs="*", default=None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--backend", nargs="*", choices=("torch", "mlx"), default=["torch"])
    parser.add_argument("--budget", type=float, default=3.0, help="seconds a profile; 0: none")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.home()) as scratch:
        folders = options.model
        if folders is None:
            folders = [Store().resolve("smollm2").path, write_checkpoint(_ONE_GB, Path(scratch) / "random")]
        result = {
            "hardware": facts(),
            "cold": options.cold,
            "loading": [loading(folder, options.backend, options.rounds, cold=options.cold) for folder in folders],
            "profiles": [profiles(folders[0], backend, options.rounds, options.budget) for backend in options.backend]
            if options.budget
            else [],
        }
    text = json.dumps(result, indent=1)
    if options.json is not None:
        options.json.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
