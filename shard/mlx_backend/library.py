"""mlx-lm's model classes, without the rest of mlx-lm."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from transport.errors import UnsupportedModel


def model_module(name: str) -> ModuleType:
    """The module mlx_lm.models.`name`. Raises UnsupportedModel where mlx-lm is not installed.

    `import mlx_lm` runs its command-line tools: transformers and torch come along (3 s, 200 MB that the planner would
    have to reserve in every MLX worker), and the process's limit of open files is lowered. The model classes need
    none of it, so their package is imported under an empty parent, which is taken away again afterwards.
    """
    path = f"mlx_lm.models.{name}"
    if path in sys.modules:
        return sys.modules[path]
    if "mlx_lm" in sys.modules:
        return importlib.import_module(path)
    found = importlib.util.find_spec("mlx_lm")
    if found is None or found.submodule_search_locations is None:
        raise UnsupportedModel(
            "mlx-lm is not installed", hint="pip install 'potluck[mlx]', or run this model on torch devices only"
        )
    parent = ModuleType("mlx_lm")
    parent.__path__ = list(found.submodule_search_locations)
    sys.modules["mlx_lm"] = parent
    try:
        return importlib.import_module(path)
    finally:
        del sys.modules["mlx_lm"]
