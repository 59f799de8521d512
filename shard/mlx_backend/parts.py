"""The modules of a stage that hold weights, and which of the checkpoint's tensors fill them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlx import nn

from shard.affine import BITS, GROUPS, AffineForm
from shard.checkpoint import TensorInfo
from transport.errors import UnsupportedModel

_HINT = "take another quantization of this model, or run it on torch devices only"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A module of the stage and where its tensors are: `prefix` + parameter path, or a name per expert."""

    module: Any  # an mlx.nn.Module; mypy does not see through that package
    prefix: str
    experts: Mapping[str, str]

    def is_stacked(self, path: str) -> bool:
        """Whether a parameter holds all experts, one for each row of its first axis."""
        return path in self.experts

    def sources(self, path: str, num_rows: int) -> tuple[str, ...]:
        """The tensors that a parameter with `num_rows` on its first axis is made of."""
        if self.is_stacked(path):
            return tuple(self.prefix + self.experts[path].format(expert=expert) for expert in range(num_rows))
        return (self.prefix + path,)


def quantized(part: Part, tensors: Mapping[str, TensorInfo], device: str) -> Part:
    """The part with MLX's quantized modules where its projections, experts or embeddings are quantized in the files,
    each as its own tensor is. Nothing is computed: the modules' numbers are for `fill` to give.

    Raises UnsupportedModel for a quantization that MLX has no kernels for.
    """
    forms: dict[str, dict[str, int]] = {}
    for path, module in part.module.named_modules():
        if not hasattr(module, "to_quantized"):
            continue
        names = part.sources(f"{path}.weight" if path else "weight", module.weight.shape[0])
        form = _form([tensors[name] for name in names if name in tensors], device)
        if form is not None:
            forms[path] = {"bits": form.bits, "group_size": form.group}
    if "" in forms:
        return replace(part, module=part.module.to_quantized(**forms[""]))
    nn.quantize(part.module, class_predicate=lambda path, _: forms.get(path, False))  # type: ignore[attr-defined]
    return part


def _form(tensors: list[TensorInfo], device: str) -> AffineForm | None:
    """How all of these tensors are quantized, None for dense ones."""
    by_form = {_shown(tensor.affine): tensor for tensor in tensors}
    if len(by_form) > 1:
        raise UnsupportedModel(
            f"{device} holds the experts of a layer as one array, and these are quantized differently: "
            + ", ".join(f"{tensor.name} ({form})" for form, tensor in by_form.items()),
            hint=_HINT,
        )
    for form, tensor in by_form.items():
        affine = tensor.affine
        if affine is not None and (affine.bits not in BITS or affine.group not in GROUPS):
            raise UnsupportedModel(
                f"{device} can't run {tensor.name} as {form}: MLX has kernels for {_listed(BITS)} bits in groups of "
                f"{_listed(GROUPS)}",
                hint=_HINT,
            )
        return affine
    return None


def _shown(form: AffineForm | None) -> str:
    return "dense" if form is None else f"{form.bits} bits in groups of {form.group}"


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}"
