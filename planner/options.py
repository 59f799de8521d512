"""Options say what a user asks of the planner: strategy, layers by hand, and the load that the ring is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from transport.errors import ConfigError

Strategy = Literal["auto", "latency", "throughput", "proportional", "memory", "even"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)

LayerCounts = tuple[tuple[str, int], ...]


def parse_layers(text: str) -> LayerCounts:
    """Layers by hand: "mac=20,gpu=12", in ring order. Raises ConfigError."""
    counts: list[tuple[str, int]] = []
    for part in text.split(","):
        name, _, count = part.strip().rpartition("=")
        if not name or not count.isdecimal() or int(count) < 1:
            raise ConfigError(f"{part.strip()!r} says no number of layers", hint='write --layers as "mac=20,gpu=12"')
        counts.append((name, int(count)))
    names = [name for name, _ in counts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice} is named twice in {text!r}", hint="a device has one run of layers")
    return tuple(counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`concurrency` chats at once, each a prompt and an answer, KV memory for `context_tokens` of each.

    A prompt is taken to go in chunks of `chunk_tokens`, or of `busy_chunk_tokens` while others decode, and decodes in a
    group for each stage. The engine chooses both by the times that it sees (decision 0011): about so where hops are
    short.
    """

    prompt_tokens: int = 256
    output_tokens: int = 256
    concurrency: int = 1
    context_tokens: int = 4096
    chunk_tokens: int = 256
    busy_chunk_tokens: int = 64

    @property
    def decode_context_tokens(self) -> int:
        """KV that a decode step reads, on average over an answer."""
        return min(self.prompt_tokens + self.output_tokens // 2, self.context_tokens)

    def chunks(self, *, busy: bool) -> tuple[tuple[int, int], ...]:
        """(tokens, tokens before them) of each chunk of the prompt."""
        size = self.busy_chunk_tokens if busy else self.chunk_tokens
        starts = range(0, self.prompt_tokens, size)
        return tuple((min(size, self.prompt_tokens - start), start) for start in starts)

    def group_size(self, num_stages: int) -> int:
        """Sequences of one decode step, with a step in flight for each stage."""
        return -(-self.concurrency // num_stages)

    def num_groups(self, num_stages: int) -> int:
        """Decode steps that are in flight at once."""
        return -(-self.concurrency // self.group_size(num_stages))
