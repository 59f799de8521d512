"""The classes of transformers' configs, without its layers."""

from __future__ import annotations

import sys
from typing import Any


def config_classes() -> Any:
    """By architecture. `Any`: transformers is untyped.

    Beside every config it imports a check that an activation is one that its layers have, and with the layers come
    torch's compiler and its distributed tensors: more than two seconds of a worker's start. Where it finds no torch it
    leaves the check out by itself, which no architecture that is supported here has.
    """
    import transformers
    from transformers.utils import import_utils

    if "transformers.utils.type_validators" not in sys.modules:
        finds_torch = import_utils.is_torch_available
        import_utils.is_torch_available = lambda: False
        try:
            import transformers.utils.type_validators
        finally:
            import_utils.is_torch_available = finds_torch
    return transformers.CONFIG_MAPPING
