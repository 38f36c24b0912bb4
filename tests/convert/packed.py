"""bitsandbytes folders as transformers saves them, and the weights that transformers computes with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, Qwen2ForCausalLM

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
PACKINGS: dict[str, dict[str, Any]] = {
    "nf4 double": NF4,
    "nf4": {**NF4, "bnb_4bit_use_double_quant": False},
    "fp4 double": {**NF4, "bnb_4bit_quant_type": "fp4"},
    "stored as bf16": {**NF4, "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
}


def load(folder: Path, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Any:
    """A Qwen2 of transformers, packed as `settings` of BitsAndBytesConfig say, or as the folder says."""
    how = {"quantization_config": BitsAndBytesConfig(**settings)} if settings else {}
    return Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype, **how)


def save_packed(source: Path, target: Path, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Path:
    """`source` packed by transformers at `target`."""
    load(source, dtype, **settings).save_pretrained(target)
    return target


def dequantised(model: Any) -> dict[str, torch.Tensor]:
    """Name -> weights, biases and norms of a packed model as bitsandbytes dequantises them."""
    import bitsandbytes.functional as bnb

    state = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "Linear4bit":
            state[f"{name}.weight"] = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif kind == "Linear8bitLt":
            scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
            state[f"{name}.weight"] = bnb.int8_vectorwise_dequant(module.weight.data, scales)
    return state
