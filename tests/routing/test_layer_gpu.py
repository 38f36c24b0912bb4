"""On a GPU: a routed model's logits and gradients against a float64 truth, beside the unrouted one's in its dtype."""

from __future__ import annotations

import math

import pytest
import torch

from qwen2tool.routing.attention import safe_attention
from qwen2tool.routing.memory import MemoryPlan
from qwen2tool.routing.swap import route, unroute
from tests.routing.models import batch, logits_and_gradients, lora_model, padding
from tests.tolerances import EACH, FACTOR, LOST, relative_error

pytestmark = pytest.mark.gpu

LARGER = {"hidden_size": 512, "intermediate_size": 1000, "num_attention_heads": 8, "num_key_value_heads": 2}
LENGTH = 192


def inputs_for(case, seed):
    ids = batch(3, LENGTH, seed=seed).cuda()
    if case == "plain":
        return {"input_ids": ids}
    if case == "packed":
        positions = torch.cat([torch.arange(n) for n in (64, 100, LENGTH - 164)])[None].cuda()
        return {"input_ids": ids[:1], "position_ids": positions}
    return {"input_ids": ids, "attention_mask": padding(case, 3, LENGTH).cuda()}


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


@pytest.mark.parametrize("keep", ["input", "mlp", "attention", "all"])
@pytest.mark.parametrize("case", ["plain", "left", "right", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_no_larger_than_the_unrouted_model_s(dtype, case, keep):
    ratios = []
    for seed in range(3):
        inputs = inputs_for(case, seed)
        model = lora_model(seed=seed, config=LARGER).cuda()
        truth = logits_and_gradients(model.double(), **inputs)
        model = model.float() if dtype == torch.float32 else half(model, dtype)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32), safe_attention():
            plain = logits_and_gradients(model, **inputs)
        route(model, memory=MemoryPlan((keep,) * 3))
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            found = logits_and_gradients(model, **inputs)
        unroute(model)
        pairs = [(relative_error(found[n], truth[n]), relative_error(plain[n], truth[n])) for n in truth]
        assert all(ours <= min(EACH * theirs, LOST) for ours, theirs in pairs), pairs
        ratios += [ours / theirs for ours, theirs in pairs]
    assert geometric_mean(ratios) < FACTOR, geometric_mean(ratios)


def half(model, dtype):
    """Frozen weights in `dtype`, adapters in fp32, as PEFT has them."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "lora_" in name else dtype)
    return model


def test_two_passes_give_the_same_bits():
    model = half(lora_model(config=LARGER, dropout=0.1).cuda(), torch.bfloat16)
    route(model)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        with torch.autocast("cuda", torch.bfloat16):
            runs.append(logits_and_gradients(model, input_ids=batch(3, LENGTH).cuda()))
    different = [name for name in runs[0] if not torch.equal(runs[0][name], runs[1][name])]
    assert different == []
