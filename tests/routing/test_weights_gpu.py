"""On a GPU: 4-bit weights that wait on the host are the same bits, in passes, in graphs, and once they are back."""

from __future__ import annotations

import pytest
import torch

import qwen2tool.routing.weights
from qwen2tool.routing.memory import MemoryPlan
from qwen2tool.routing.plan import find_stack
from qwen2tool.routing.swap import route, unroute
from qwen2tool.training.fast import settle
from tests.routing.models import batch, logits_and_gradients
from tests.routing.test_weights import four_bit
from tests.training.test_passes_gpu import MIDDLE, SHORT, Run, batch_of

pytestmark = pytest.mark.gpu
LARGER = {"hidden_size": 512, "intermediate_size": 1088, "num_hidden_layers": 5, "num_attention_heads": 8}
LAYERS = 5
PLANS = {
    "all recomputed": MemoryPlan(("input",) * LAYERS, host_weights=3),
    "frugal": MemoryPlan(("input",) * LAYERS, host_weights=3, frugal=True, tails=False),
    "beside inputs, gate and up": MemoryPlan(
        ("mlp", "input", "mlp", "attention", "all"), LAYERS - 1, frozenset({0, 2}), host_weights=3
    ),
}


def model_of(dropout=0.1):
    return four_bit("cuda", torch.bfloat16, dropout, **LARGER)


def packed(model):
    return [p for p in model.parameters() if getattr(p, "quant_state", None) is not None]


def results(model, steps=2):
    found = []
    for step in range(steps):
        torch.manual_seed(3)
        with torch.autocast("cuda", torch.bfloat16):
            found.append(logits_and_gradients(model, input_ids=batch(3, 192 - 64 * step, seed=step).cuda()))
    return found


def different(ours, theirs):
    return [name for a, b in zip(ours, theirs, strict=True) for name in b if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("name", PLANS)
def test_a_model_gives_the_same_bits_with_weights_on_the_host_and_without(name):
    model, plan = model_of(), PLANS[name]
    before = [weight.data.clone() for weight in packed(model)]
    route(model, memory=MemoryPlan(plan.keep))
    on_device = results(model)
    unroute(model)
    route(model, memory=plan)
    on_host = results(model)
    assert [weight.is_cuda for weight in packed(model)] == [True] * 7 + [False] * 21 + [True] * 7
    assert len(on_host[0]) == 1 + LAYERS * 7 * 2 and different(on_host, on_device) == []
    assert not torch.equal(on_host[0]["logits"][:, :128], on_host[1]["logits"]), "the two batches differ"
    unroute(model)
    after = packed(model)
    assert all(weight.is_cuda and torch.equal(weight.data, old) for weight, old in zip(after, before, strict=True))


def test_a_copy_that_came_too_late_would_show(monkeypatch):
    """Without the wait the first layer that is brought reads what its memory held before."""
    model = model_of()
    route(model, memory=MemoryPlan(("input",) * LAYERS))
    right = results(model, 1)
    unroute(model)

    def start(stream, layer, tensor, source, out=False):
        return qwen2tool.routing.weights.Copied(layer, tensor.zero_(), torch.cuda.Event())  # says that it is there

    monkeypatch.setattr(qwen2tool.routing.weights.Copied, "start", start)
    route(model, memory=PLANS["all recomputed"])
    assert different(results(model, 1), right)


def test_replayed_passes_read_them_too():
    model, sequence = model_of(), [SHORT, MIDDLE, SHORT, SHORT, MIDDLE]
    found = []
    for graphs, plan in ((False, MemoryPlan(("input",) * LAYERS)), (True, PLANS["all recomputed"])):
        run = Run(model, graphs=graphs, memory=plan)
        found += [value for seed, lengths in enumerate(sequence) for value in run.step([batch_of(lengths, seed)])]
        assert run.passes.captured == 2 * graphs
    half = len(found) // 2
    assert half == len(sequence) * (2 + LAYERS * 7 * 2)
    assert [index for index in range(half) if not torch.equal(found[index], found[half + index])] == []


def test_a_pass_that_ended_early_leaves_nothing_wrong():
    """A forward that fails in its third layer has fetched the fourth's weights; the next one begins anew."""
    model = model_of()
    route(model, memory=PLANS["all recomputed"])
    first = results(model, 1)
    stack, _ = find_stack(model)
    weight = stack.layers[2].input_layernorm.weight
    norm, weight.data = weight.data, torch.ones(3)
    with pytest.raises((RuntimeError, ValueError)):
        results(model, 1)
    weight.data = norm
    assert different(results(model, 1), first) == []


def test_generation_has_them_back_and_the_next_pass_sends_them_away():
    model = model_of(dropout=0.0)
    ids = batch(2, 24).cuda()
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": True}
    wanted = model.eval().generate(input_ids=ids, **options)
    model.train()
    route(model, memory=PLANS["all recomputed"])
    first = results(model, 1)
    assert torch.equal(model.eval().generate(input_ids=ids, **options), wanted)
    assert all(weight.is_cuda for weight in packed(model))
    model.train()
    assert different(results(model, 1), first) == []
    assert sum(not weight.is_cuda for weight in packed(model)) == 21


def test_scoring_without_gradients():
    model = model_of(dropout=0.0)
    ids = batch(2, 64).cuda()
    outputs = []
    for plan in (MemoryPlan(("input",) * LAYERS), PLANS["all recomputed"]):
        route(model, memory=plan)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            outputs.append(model(input_ids=ids, use_cache=False).logits)
        unroute(model)
    assert torch.equal(*outputs)


def test_a_trainer_that_moves_the_model_is_put_right():
    model = model_of()
    route(model, memory=PLANS["all recomputed"])
    first = results(model, 1)
    model.to("cuda")
    assert all(weight.is_cuda for weight in packed(model))
    assert different(results(model, 1), first) == [], "where they are counts for nothing but memory"
    settle(model)
    assert sum(not weight.is_cuda for weight in packed(model)) == 21
    assert different(results(model, 1), first) == []


def test_a_layer_that_is_not_fused_has_its_own_back():
    """An adapter with a bias, say, loaded after the plan was made."""
    model = model_of(dropout=0.0)
    route(model, memory=MemoryPlan(("input",) * LAYERS))
    stack, _ = find_stack(model)
    stack.layers[2].mlp.act_fn = torch.nn.GELU()
    wanted = results(model, 1)
    unroute(model)
    route(model, memory=PLANS["all recomputed"])
    assert different(results(model, 1), wanted) == []
