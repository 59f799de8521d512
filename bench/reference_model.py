"""transformers' model with the weights of a checkpoint of ours, dequantized: what quantized stages are held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from shard.open import open_checkpoint
from shard.torch_backend.dtypes import TORCH_DTYPES, to_numpy
from transport.messages import DType


def reference_model(folder: Path, dtype: DType) -> Any:
    """Any: the library's model classes are untyped."""
    checkpoint = open_checkpoint(folder)
    config = transformers.AutoConfig.for_model(**checkpoint.config)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=TORCH_DTYPES[dtype]).eval()
    for name, parameter in model.named_parameters():
        checkpoint.read_into(name, to_numpy(parameter.data), dtype)
    checkpoint.close()
    return model
