"""What the memory plan is told of a model: bytes by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qwen2tool.routing.sizes import measure
from tests.routing.models import lora_model
from tests.routing.test_matrix import quantise
from tests.tiny import TARGETS, tiny_model

HIDDEN = 64


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 4)])
def test_inputs_of_layers_are_counted_in_the_dtype_of_the_stream(dtype, size):
    """fp16 holds the stream between layers in fp32, so what every layer keeps has 4 bytes a number."""
    assert measure(lora_model(), 100, 50, dtype).input == 100 * HIDDEN * size


def test_what_layers_are_made_of():
    plain = measure(lora_model(), 100, 50, torch.bfloat16)
    assert (plain.packed, plain.masked, plain.heads) == (False, False, 4)
    assert measure(lora_model(dropout=0.1), 100, 50, torch.bfloat16) == replace(plain, masked=True)
    base = tiny_model().requires_grad_(False)
    quantise(base, torch.float32)
    quantised = measure(get_peft_model(base, LoraConfig(r=4, target_modules=list(TARGETS))), 100, 50, torch.bfloat16)
    assert quantised.adapted == plain.adapted == {"qkv", "o", "gate_up", "down"}
    few = measure(lora_model(target_modules=["k_proj", "up_proj"]), 100, 50, torch.bfloat16)
    assert few.adapted == {"qkv", "gate_up"}
    assert quantised.packed and not quantised.masked and quantised.static < plain.static
