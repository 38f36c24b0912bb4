"""Without a GPU nothing moves, and a plan that would move weights changes nothing."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model

from qwen2tool.routing.memory import MemoryPlan
from qwen2tool.routing.plan import find_stack
from qwen2tool.routing.swap import route, unroute
from qwen2tool.routing.weights import _offsets
from tests.routing.models import batch, fill_adapters, logits_and_gradients
from tests.routing.test_matrix import quantise
from tests.tiny import TARGETS, tiny_model


def four_bit(device="cpu", dtype=torch.float32, dropout=0.0, **config):
    """NF4 with adapters of non-zero B in fp32, in training mode."""
    model = tiny_model(**config).requires_grad_(False).to(device, dtype)
    quantise(model, dtype)
    options = {"r": 8, "lora_dropout": dropout, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**options))
    fill_adapters(model)
    return model.train()


def test_a_cpu_keeps_its_weights():
    model = four_bit()
    route(model, memory=MemoryPlan(("input",) * 3))
    wanted = logits_and_gradients(model, input_ids=batch())
    unroute(model)
    route(model, memory=MemoryPlan(("input",) * 3, host_weights=1))
    stack, _ = find_stack(model)
    stack.settle()
    found = logits_and_gradients(model, input_ids=batch())
    assert not stack._weights.away and len(found) == 1 + 3 * 7 * 2 and wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_where_weights_lie_in_their_block():
    assert _offsets([]) == [0]
    assert _offsets([256, 1, 300]) == [0, 256, 512, 1024], "each at a multiple of 256"
