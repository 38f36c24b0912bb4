"""What the memory plan is told of a model: bytes by hand."""

from __future__ import annotations

import pytest
import torch

from qwen2tool.routing.sizes import measure
from tests.routing.models import lora_model

HIDDEN = 64


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 4)])
def test_inputs_of_layers_are_counted_in_the_dtype_of_the_stream(dtype, size):
    """fp16 holds the stream between layers in fp32, so what every layer keeps has 4 bytes a number."""
    assert measure(lora_model(), 100, 50, dtype).input == 100 * HIDDEN * size
