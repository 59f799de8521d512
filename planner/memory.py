"""The memory model says what a model's layers, KV and runtime take on a device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

from devices.hardware.device import Backend, Device
from transport.errors import ConfigError
from transport.messages.ring import DTYPE_BYTES, DType, KVForm, WeightsForm

WINDOW_SLACK_TOKENS = 512
"""What a sliding-window layer holds beyond its window: room to go back, and the block that its buffer grows by."""

_SCALE_BYTES = 4
"""Of a head's keys or values at one position, where they are held in 8 bits: one float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSizes:
    """What the parts of a model take on devices of one backend that compute in `dtype`, with matrices in the form
    `weights`; `layers[i]` is layer i."""

    weights: WeightsForm
    backend: Backend
    dtype: DType
    layers: tuple[int, ...]
    embed: int
    norm: int
    head: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """Counts are in elements. `kv_elements_per_token[i]` and `windows[i]` (tokens; None: full attention) are layer i's.

    `sizes` has an item for each form, backend and dtype that can be planned with; `weights` and `kv` are the forms in
    force. `head_dim` None: not known, and KV in 8 bits can't be planned.
    `head_params` and a size's `head` are the output projection's, also when it is tied to the embedding: then both ends
    of a ring hold a copy, a single stage holds one. `legal_cuts` are the layer indices, without 0 and num_layers, where
    a stage may end.
    """

    name: str
    num_layers: int
    hidden_size: int
    context_tokens: int
    tied_embeddings: bool
    layer_params: tuple[int, ...]
    head_params: int
    sizes: tuple[WeightSizes, ...]
    kv_elements_per_token: tuple[int, ...]
    windows: tuple[int | None, ...]
    legal_cuts: tuple[int, ...]
    weights: WeightsForm = "stored"
    head_dim: int | None = None
    kv: KVForm = "full"

    def part_bytes(self, backend: Backend, dtype: DType) -> WeightSizes:
        """What the parts take on such a device. Raises ConfigError where that is not known."""
        for sizes in self.sizes:
            if sizes.dtype == dtype and sizes.backend == backend and sizes.weights == self.weights:
                return sizes
        raise ConfigError(
            f"it is not known what {self.name} takes with {self.weights} weights on {backend} in {dtype}",
            hint="plan from the model itself instead of a file",
        )

    def weights_bytes(self, first: int, last: int, backend: Backend, dtype: DType) -> int:
        """Memory for the weights of a stage with layers [first, last)."""
        sizes = self.part_bytes(backend, dtype)
        total = _range_sum(sizes.layers, first, last)
        if first == 0:
            total += sizes.embed
        if last == self.num_layers:
            total += sizes.norm
            if not (self.tied_embeddings and first == 0):
                total += sizes.head
        return total

    def work_bytes(self, first: int, last: int, backend: Backend, dtype: DType) -> int:
        """Weights that a decode step reads: the head is a matrix-vector product, the embedding one row."""
        sizes = self.part_bytes(backend, dtype)
        total = _range_sum(sizes.layers, first, last)
        if last == self.num_layers:
            total += sizes.norm + sizes.head
        return total

    def kv_bytes(self, first: int, last: int, context_tokens: int, concurrency: int, dtype: DType) -> int:
        """Memory for the KV of `concurrency` sequences of `context_tokens` each. Raises ConfigError for 8 bits where it
        is not known how long a head's vectors are."""
        held = _range_sum(_held_elements(self.kv_elements_per_token, self.windows, context_tokens), first, last)
        if self.kv == "full":
            return held * concurrency * DTYPE_BYTES[dtype]
        if self.head_dim is None:
            raise ConfigError(
                f"it is not known what {self.name} takes with KV in 8 bits",
                hint="plan from the model itself instead of a file, or leave --kv-cache out",
            )
        return held // self.head_dim * (self.head_dim + _SCALE_BYTES) * concurrency


def _range_sum(values: tuple[int, ...], first: int, last: int) -> int:
    """The sum of values[first:last]. A search asks for every pair, thousands of times."""
    sums = _running_sums(values)
    return sums[last] - sums[first]


@lru_cache(maxsize=64)
def _running_sums(values: tuple[int, ...]) -> tuple[int, ...]:
    return (0, *accumulate(values))


@lru_cache(maxsize=64)
def _held_elements(per_token: tuple[int, ...], windows: tuple[int | None, ...], context_tokens: int) -> tuple[int, ...]:
    """KV elements of one sequence of `context_tokens`, for each layer."""
    return tuple(
        elements * (context_tokens if window is None else min(context_tokens, window + WINDOW_SLACK_TOKENS))
        for elements, window in zip(per_token, windows, strict=True)
    )


FORMS: tuple[WeightsForm, ...] = ("dense", "stored", "8-bit", "4-bit")
"""Each no larger than the one before."""

QUANTIZE_OPTION: dict[WeightsForm, str] = {"dense": "dense", "stored": "stored", "8-bit": "8", "4-bit": "4"}
"""What a form is called after --quantize."""


def smaller_forms(profile: ModelProfile) -> Iterator[ModelProfile]:
    """The model in each form below the one in force, as far as its sizes are known."""
    known = {sizes.weights for sizes in profile.sizes}
    for form in FORMS[FORMS.index(profile.weights) + 1 :]:
        if form in known:
            yield replace(profile, weights=form)


CPU_RESERVE_BYTES = 384 * 2**20
_OTHER_RESERVE_BYTES = 512 * 2**20

HEAD_RESERVE_BYTES = 256 * 2**20
"""On the head's host: the engine (124 MB with a tokenizer of 49,000 tokens, more with a larger one) and the endpoint,
which come after its memory was looked at."""


def runtime_reserve_bytes(device: Device) -> int:
    """For each worker: its interpreter and libraries, and a step's activations. Measured for torch's CPU backend
    (decision 0007); others get more until they are measured too."""
    return CPU_RESERVE_BYTES if (device.backend, device.kind) == ("torch", "cpu") else _OTHER_RESERVE_BYTES


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """What the ring must hold: weights, KV for `concurrency` sequences of `context_tokens`, a reserve each worker."""

    profile: ModelProfile
    context_tokens: int
    concurrency: int

    def weights_bytes(self, device: Device, first: int, last: int) -> int:
        return self.profile.weights_bytes(first, last, device.backend, device.compute_dtype)

    def kv_bytes(self, device: Device, first: int, last: int) -> int:
        return self.profile.kv_bytes(first, last, self.context_tokens, self.concurrency, device.compute_dtype)

    def memory_bytes(self, device: Device, first: int, last: int) -> int:
        """Never shrinks as [first, last) grows."""
        return (
            self.weights_bytes(device, first, last) + self.kv_bytes(device, first, last) + runtime_reserve_bytes(device)
        )


def pool_totals(devices: Iterable[Device]) -> dict[str, int]:
    """The most that the devices of each pool may take together."""
    totals: dict[str, int] = {}
    for device in devices:
        key = device.memory_pool
        totals[key] = min(totals.get(key, device.total_bytes), device.total_bytes)
    return totals


def available_bytes(devices: Sequence[Device]) -> int:
    free: dict[str, int] = defaultdict(int)
    for device in devices:
        free[device.memory_pool] += device.free_bytes
    totals = pool_totals(devices)
    return sum(min(num_bytes, totals[key]) for key, num_bytes in free.items())
