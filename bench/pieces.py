"""What it costs that a model lies in pieces: loading from them beside the plain file, and made-up weights.

python -m bench.pieces [--model FOLDER ...] [--rounds 9] [--backend torch mlx] [--steps 200] [--cold] [--json FILE]
Both ways are taken in turn, round after round, because the machine drifts; ratios are medians over rounds of ratios
within a round. Without a model: SmolLM2 from the store, and 1 GB of random weights. `--cold` has everything put out of
the system's caches before each load (Linux; root), and tells how long the disk itself takes for as many bytes, 8 MiB
after 8 MiB. Steps with made-up weights are of the first model.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.hardware import facts
from bench.random_checkpoint import LlamaShape, write_checkpoint
from potluck.store import Store
from shard.checkpoint import Checkpoint
from shard.load import Backend, load_shard
from shard.open import open_checkpoint, open_unread
from shard.piece_list import make_piece_list, model_files
from shard.profile.kinds import Span
from shard.profile.stage import TimedStage
from shard.shared_model import materialize
from shard.stage import ShardSpec
from transport.pieces.store import PieceStore

_ONE_GB = LlamaShape(hidden=2048, intermediate=5632, layers=8, heads=32, kv_heads=4, vocab=32_000)
_ALIGNMENT = 64
"""That of torch's memory. NumPy's, 16 bytes into a page, takes twice the time to copy to from the start of a file's
page: processors mistake what is read for what was just written."""
_DIRECT_BYTES = 8 << 20
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
            data = files.whole[file.name] if whole is None else whole
            store.put(bytes(data[piece.offset : piece.offset + piece.num_bytes]), piece.digest)
    materialize(pieces, store, scratch / "skeleton")
    num_bytes = sum(file.num_bytes for file in pieces.files)
    return store, {
        "bytes": num_bytes,
        "pieces": sum(len(file.pieces) for file in pieces.files),
        "hashing_s": hashing_s,
        "hashing_bytes_per_s": num_bytes / hashing_s,
    }


def loading(folder: Path, backends: list[Backend], rounds: int, *, cold: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=Path.home()) as scratch:
        store, found = cut(folder, Path(scratch))

        def plain() -> Checkpoint:
            return open_checkpoint(folder)

        def pieced() -> Checkpoint:
            return open_checkpoint(Path(scratch) / "skeleton", pieces=store)

        ways: dict[str, Callable[[Checkpoint], None]] = {"reading": _read}
        ways |= {backend: partial(_load, backend) for backend in backends}
        weights = list(model_files(folder).weights.values())
        report: dict[str, Any] = {"model": folder.name, **found}
        for name, use in ways.items():
            for opened in (plain, pieced):
                _timed(opened, use)
            pairs, disk_s = [], []
            for number in range(rounds):
                order = (plain, pieced) if number % 2 == 0 else (pieced, plain)
                taken = {}
                for opened in order:
                    if cold:
                        empty_caches()
                    taken[opened.__name__] = _timed(opened, use)
                pairs.append((taken["plain"], taken["pieced"]))
                if cold:
                    disk_s.append(disk_seconds(weights))
            report[name] = {
                "plain_s": statistics.median(plain[0] for plain, _ in pairs),
                "pieces_s": statistics.median(pieces[0] for _, pieces in pairs),
                "ratio": statistics.median(pieces[0] / plain[0] for plain, pieces in pairs),
                "best_ratio": min(pieces[0] for _, pieces in pairs) / min(plain[0] for plain, _ in pairs),
                "cpu_ratio": statistics.median(pieces[1] / plain[1] for plain, pieces in pairs),
            }
            if disk_s:
                report[name] |= {
                    "disk_s": statistics.median(disk_s),
                    "plain_over_disk": statistics.median(
                        plain[0] / disk for (plain, _), disk in zip(pairs, disk_s, strict=True)
                    ),
                    "pieces_over_disk": statistics.median(
                        pieces[0] / disk for (_, pieces), disk in zip(pairs, disk_s, strict=True)
                    ),
                }
            print(f"{folder.name} {name}: {report[name]}", file=sys.stderr)
        return report


def empty_caches() -> None:
    """Contents of files, and where they lie: as after a start."""
    os.sync()  # Pages that are still to be written would stay.
    Path("/proc/sys/vm/drop_caches").write_text("3")


def disk_seconds(paths: Sequence[Path]) -> float:
    """To read them past the system's cache, one request of 8 MiB after the other."""
    started = time.perf_counter()
    with mmap.mmap(-1, _DIRECT_BYTES) as block:  # The memory has to begin with a page.
        for path in paths:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            offset = 0
            while count := os.preadv(fd, [block], offset):
                offset += count
            os.close(fd)
    return time.perf_counter() - started


def _timed(opened: Callable[[], Checkpoint], use: Callable[[Checkpoint], None]) -> tuple[float, float]:
    """Seconds of the clock, and of the processor: where others use the machine too, the latter say more."""
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


def steps(folder: Path, backend: Backend, rounds: int) -> dict[str, object]:
    """Steps of a few layers, in turn: with the model's weights, with the same loaded again, and with made-up ones. The
    first two tell the noise."""
    last = open_checkpoint(folder).spec.num_layers
    spans = {"layers": Span(first=1, last=min(5, last - 1)), "head": Span(first=last - 1, last=last)}
    report: dict[str, object] = {"model": folder.name, "backend": backend}
    for name, span in spans.items():
        stages = [
            TimedStage(
                opened(folder), span, backend=backend, device="mlx" if backend == "mlx" else "cpu", dtype="bfloat16"
            )
            for opened in (open_checkpoint, open_checkpoint, open_unread)
        ]
        for rows, tokens in ((1, 1), (8, 1), (1, 64)):
            held = [stage.open(rows) for stage in stages]
            taken: list[list[float]] = [[], [], []]
            for number in range(-3, rounds):
                for index in np.random.default_rng(number + 3).permutation(3).tolist():
                    seconds = stages[index].step(held[index], tokens)
                    if number >= 0:
                        taken[index].append(seconds)
            for stage, sequences in zip(stages, held, strict=True):
                stage.release(sequences)
            real, again, unread = (np.array(some) for some in taken)
            found = {
                "real_s": float(np.median(real)),
                "again": _ratios(real, again),
                "unread": _ratios(real, unread),
            }
            report[f"{name}, {rows} x {tokens}"] = found
            print(f"{backend} {name}, {rows} x {tokens}: {found}", file=sys.stderr)
    return report


def _ratios(real: np.ndarray, other: np.ndarray) -> dict[str, float]:
    return {
        "of_medians": float(np.median(other) / np.median(real)),
        "of_fastest_tenth": float(np.quantile(other, 0.1) / np.quantile(real, 0.1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.pieces", description=__doc__)
    parser.add_argument("--model", type=Path, nargs="*", default=None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--backend", nargs="*", choices=("torch", "mlx"), default=["torch"])
    parser.add_argument("--steps", type=int, default=200, help="steps of each kind with made-up weights; 0: none")
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
            "made_up": [steps(folders[0], backend, options.steps) for backend in options.backend]
            if options.steps
            else [],
        }
    text = json.dumps(result, indent=1)
    if options.json is not None:
        options.json.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
