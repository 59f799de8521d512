"""A step that appends to sequences' KV: done whole, or as if it had not been."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from shard.stage import Batch
from shard.torch_backend.attention import Run
from shard.torch_backend.kv import KVCache
from shard.torch_backend.memory import step_memory


@contextmanager
def appending(kv: KVCache, batch: Batch, runs: Sequence[Run], device: str) -> Iterator[None]:
    """Around what runs the layers. Where it fails, the sequences of the batch are as before, or hold nothing; out of
    memory is StageFailed."""
    assert all(run.start == run.kv.length for run in runs), "the caller truncates, and refuses what lies beyond"
    try:
        with step_memory(device, sum(run.num_tokens for run in runs), kv.num_bytes):
            yield
    except Exception:
        # Layers that had run hold rows beyond `start`; a sliding one may have dropped what going back needs.
        for entry in batch.entries:
            kv.truncate(entry.sequence, entry.start)
        raise
    for run in runs:
        run.kv.length = run.start + run.num_tokens
