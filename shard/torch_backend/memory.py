"""Out-of-memory conditions of torch, translated where they enter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from transport.errors import DoesNotFit, StageFailed

# The CPU and Metal allocators raise a plain RuntimeError that only its text tells apart.
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def loading_memory(what: str, device: str) -> Iterator[None]:
    """Out of memory while loading is DoesNotFit."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise DoesNotFit(
            f"{device} has no memory left for {what}",
            hint="give this device fewer layers, lower --context, or add another device",
        ) from error


@contextmanager
def step_memory(device: str, num_tokens: int, kv_bytes: Callable[[], int]) -> Iterator[None]:
    """Out of memory while running a step is StageFailed."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        held_mib = kv_bytes() / 2**20
        raise StageFailed(
            f"{device} ran out of memory in a step of {num_tokens} tokens, with {held_mib:.0f} MiB of KV held",
            hint="lower --context or the number of parallel requests, or give this device fewer layers",
        ) from error
