"""Which quantization a config.json declares, and the logical tensors that stored ones make up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from shard.formats.affine import AFFINE_BITS, AFFINE_GROUPS, AffineForm, AffineRows
from shard.formats.checkpoint import TensorInfo
from shard.formats.safetensors import FLOATS, PlacedTensor, SafetensorsFiles
from transport.errors import BadCheckpoint, UnsupportedModel

_KEYS = ("quantization", "quantization_config")
_HINT = "take its GGUF, MLX, AWQ or GPTQ form, or the unquantized model"
_MLX_FIELDS = ("group_size", "bits", "mode", "quant_method")
_GPTQ_BITS = (4, 8)
# What to take instead where the general hint would be no help.
_HINTS = {"mxfp4": "take its bf16 form", "compressed-tensors": f"it may hold int4, int8 or fp8 weights: {_HINT}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MlxQuantization:
    """Modules that have scales are of `default`, but for those of `overrides`, by path; None is a dense one."""

    default: AffineForm
    overrides: Mapping[str, AffineForm | None]

    def form_of(self, module: str) -> AffineForm | None:
        return self.overrides.get(module, self.default)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedQuantization:
    """`group` None: a whole row shares one scale. `zero_offset` is what the stored zeros lack. `act_order`: the rows'
    groups may be in another order, which g_idx says."""

    method: Literal["AWQ", "GPTQ"]
    bits: int
    group: int | None
    zero_offset: int = 0
    act_order: bool = False


Quantization = MlxQuantization | PackedQuantization


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """None for a dense model. Raises UnsupportedModel for a method or a variant that can't be read, by name."""
    found = next((config[key] for key in _KEYS if config.get(key)), None)
    if found is None:
        return None
    if not isinstance(found, dict):
        raise BadCheckpoint(f"config.json has a quantization that is {found!r}", hint="download it again")
    method = found.get("quant_method")
    if method == "awq":
        return _awq(found)
    if method == "gptq":
        return _gptq(found)
    if method in (None, "mlx") and "bits" in found and "group_size" in found:
        return _mlx(found)
    name = method or found.get("quant_algo") or "a method that config.json does not name"
    raise UnsupportedModel(f"the model is quantized with {name}", hint=_HINTS.get(str(name), _HINT))


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` as the unquantized model has it."""
    return {key: value for key, value in config.items() if key not in _KEYS}


def _mlx(found: Mapping[str, Any]) -> MlxQuantization:
    overrides: dict[str, AffineForm | None] = {}
    for module, value in found.items():
        if isinstance(value, dict):
            overrides[module] = _mlx_form({**value, "mode": value.get("mode", found.get("mode"))}, module)
        elif value is False:
            overrides[module] = None
        elif module not in _MLX_FIELDS and value is not True:
            raise UnsupportedModel(f"config.json's quantization has {module} = {value!r}, not known here", hint=_HINT)
    return MlxQuantization(default=_mlx_form(found, "config.json"), overrides=overrides)


def _mlx_form(found: Mapping[str, Any], where: str) -> AffineForm:
    mode, bits, group = found.get("mode") or "affine", _int_or_zero(found, "bits"), _int_or_zero(found, "group_size")
    if mode != "affine":
        raise UnsupportedModel(f"the model is quantized with MLX's mode {mode}", hint="take its affine MLX form")
    if bits not in AFFINE_BITS or group not in AFFINE_GROUPS:
        raise UnsupportedModel(
            f"{where} has weights of {found.get('bits')!r} bits in groups of {found.get('group_size')!r}",
            hint=f"bits {', '.join(map(str, AFFINE_BITS))} in groups of {', '.join(map(str, AFFINE_GROUPS))} can be "
            "read",
        )
    return AffineForm(bits=bits, group=group)


def _awq(found: Mapping[str, Any]) -> PackedQuantization:
    version = str(found.get("version", "gemm")).lower()
    if version != "gemm":
        raise UnsupportedModel(f"the model is quantized with AWQ's version {version}", hint="take one of version gemm")
    if _int_or_zero(found, "bits") != 4:
        raise UnsupportedModel(f"the model is quantized with AWQ to {found.get('bits')!r} bits", hint=_HINT)
    return PackedQuantization(method="AWQ", bits=4, group=_packed_group(found, "AWQ"))


def _gptq(found: Mapping[str, Any]) -> PackedQuantization:
    bits, form = _int_or_zero(found, "bits"), found.get("checkpoint_format", "gptq")
    if bits not in _GPTQ_BITS:
        raise UnsupportedModel(f"the model is quantized with GPTQ to {found.get('bits')!r} bits", hint=_HINT)
    if form not in ("gptq", "gptq_v2"):
        raise UnsupportedModel(f"the model is quantized with GPTQ, repacked as {form}", hint=_HINT)
    if found.get("dynamic"):
        raise UnsupportedModel("the model is quantized with GPTQ, its layers differently (dynamic)", hint=_HINT)
    return PackedQuantization(
        method="GPTQ",
        bits=bits,
        group=_packed_group(found, "GPTQ"),
        zero_offset=1 if form == "gptq" else 0,
        act_order=bool(found.get("desc_act")),
    )


def _packed_group(found: Mapping[str, Any], method: str) -> int | None:
    group = _int_or_zero(found, "group_size")
    if group == -1:
        return None
    if group < 32 or group % 32:
        raise UnsupportedModel(
            f"the model is quantized with {method} in groups of {found.get('group_size')!r}",
            hint=f"multiples of 32 can be read; {_HINT}",
        )
    return group


def _int_or_zero(found: Mapping[str, Any], key: str) -> int:
    """0, which no quantization has, for anything but a whole number."""
    value = found.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


SCALE_FORMATS = tuple(FLOATS)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseTensor:
    """The elements of `stored` from `first_element` on, as many as the shape has."""

    info: TensorInfo
    stored: PlacedTensor
    first_element: int = 0

    @classmethod
    def whole(cls, stored: PlacedTensor) -> DenseTensor:
        info = TensorInfo(name=stored.name, shape=stored.shape, format=stored.format, file_bytes=stored.file_bytes)
        return cls(info=info, stored=stored)


class QuantizedTensor(Protocol):
    """A tensor whose `info.affine` is not None."""

    @property
    def info(self) -> TensorInfo: ...

    def read(self, files: SafetensorsFiles, first: int, num_rows: int) -> AffineRows:
        """Rows [first, first + num_rows). Several threads may read at once. Raises BadCheckpoint."""


LogicalTensor = DenseTensor | QuantizedTensor


def sibling(files: SafetensorsFiles, of: PlacedTensor, name: str, formats: tuple[str, ...]) -> PlacedTensor:
    """The tensor `name` that belongs to the packed weights `of`. Raises BadCheckpoint if it lacks or is of a format
    that is not among `formats`."""
    tensor = files.placed.get(name)
    if tensor is None:
        raise BadCheckpoint(
            f"{of.name} in {of.path} is packed, but the files hold no {name}",
            hint="a file is missing; pull the model again",
        )
    if tensor.format not in formats:
        raise BadCheckpoint(
            f"{name} in {tensor.path} is stored as {tensor.format}, where {' or '.join(formats)} belongs",
            hint="take another quantization of the model",
        )
    return tensor


def shape_error(tensor: PlacedTensor, expected: str) -> BadCheckpoint:
    return BadCheckpoint(
        f"{tensor.name} in {tensor.path} has the shape {tensor.shape}, {expected}",
        hint="config.json and the weights do not belong together: pull the model again",
    )
