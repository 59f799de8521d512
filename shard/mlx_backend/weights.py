"""Fills the modules of a stage from a checkpoint, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_flatten

from shard.affine import AffineForm
from shard.checkpoint import Checkpoint
from shard.mlx_backend.parameters import AffineParameter, DenseParameter, Parameter
from shard.mlx_backend.parts import Part
from transport.errors import BadCheckpoint, UnsupportedModel
from transport.messages import DType

Progress = Callable[[int, int], None]

# Computed from the config by every class; old checkpoints store them all the same.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slot:
    """Parameter `name` of the part's module at `path` ("" is the module itself), and the tensors it is made of: itself,
    or one for each row of its first axis. `shape` is the numbers'; a quantized one has scales and biases besides."""

    part: Part
    path: str
    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    stacked: bool
    form: AffineForm | None

    def parameter(self, dtype: DType) -> Parameter:
        if self.form is None:
            return DenseParameter(self.name, self.shape, dtype)
        return AffineParameter(self.shape, self.form, dtype)


def fill(parts: list[Part], checkpoint: Checkpoint, dtype: DType, progress: Progress) -> int:
    """Give every parameter its values in `dtype`, evaluated, and return the bytes they take.

    Weights of a module that is quantized stay so. `progress(read_bytes, total_bytes)` counts the files' bytes.
    Raises BadCheckpoint for a tensor that is missing or misshapen, UnsupportedModel for one without a place.
    """
    slots = [slot for part in parts for slot in _slots(part)]
    _check(slots, parts, checkpoint)
    total_bytes = sum(checkpoint.tensors[name].file_bytes for slot in slots for name in slot.sources)
    read_bytes = weights_bytes = 0

    def note(num_bytes: int) -> None:
        nonlocal read_bytes
        read_bytes += num_bytes
        progress(read_bytes, total_bytes)

    for slot in slots:
        parameter = slot.parameter(dtype)
        for index, name in enumerate(slot.sources):
            parameter.read(checkpoint, name, (index,) if slot.stacked else (), note)
        arrays = parameter.arrays()
        weights_bytes += sum(array.nbytes for array in arrays.values())
        slot.part.module.load_weights([(_joined(slot.path, key), array) for key, array in arrays.items()], strict=False)
    # Metal's allocator keeps freed buffers for reuse; what loading needed is of no use to decoding.
    mx.clear_cache()
    return weights_bytes


def _slots(part: Part) -> Iterator[_Slot]:
    forms = {
        path: AffineForm(bits=module.bits, group=module.group_size)
        for path, module in part.module.named_modules()
        if hasattr(module, "group_size")
    }
    parameters: dict[str, mx.array] = dict(tree_flatten(part.module.parameters()))
    for path, parameter in parameters.items():
        owner, _, name = path.rpartition(".")
        shape = tuple(parameter.shape)
        form = forms.get(owner)
        if form is not None and name in ("scales", "biases"):
            continue
        if form is not None and name == "weight":
            shape = (*shape[:-1], shape[-1] * 32 // form.bits)
        yield _Slot(
            part=part,
            path=owner,
            name=name,
            shape=shape,
            sources=part.sources(path, shape[0]),
            stacked=part.is_stacked(path),
            form=form if name == "weight" else None,
        )


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _check(slots: list[_Slot], parts: list[Part], checkpoint: Checkpoint) -> None:
    """All that can be known before reading: names and shapes, and that no tensor of these parts is left over."""
    hint = "the files are incomplete or of another model; pull it again"
    wanted: set[str] = set()
    for slot in slots:
        shape = slot.shape[1:] if slot.stacked else slot.shape
        for name in slot.sources:
            assert name not in wanted
            wanted.add(name)
            info = checkpoint.tensors.get(name)
            if info is None:
                raise BadCheckpoint(f"tensor {name} is missing", hint=hint)
            if tuple(info.shape) != shape:
                raise BadCheckpoint(f"tensor {name} has shape {tuple(info.shape)}; the config says {shape}", hint=hint)
    prefixes = tuple(part.prefix for part in parts)
    unused = (
        name
        for name in checkpoint.tensors
        if name.startswith(prefixes) and name not in wanted and not name.endswith(_IGNORED_SUFFIX)
    )
    if (leftover := next(unused, None)) is not None:
        raise UnsupportedModel(
            f"tensor {leftover} has no place in mlx-lm's model class: the output would be wrong",
            hint="run this model on torch devices only",
        )
