"""Weights that wait on the host, on a CPU that stands in for both sides: what is brought when, and whose bytes it is.

Copies are made at once and without streams, places begin as zeros, and every weight counts as on the device until it
lies in its block: the rest is as on a GPU, where tests/routing/test_weights_gpu.py has the real thing.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model

import qwen2tool.routing.weights as weights
from qwen2tool.routing import host
from qwen2tool.routing.host import Copied
from qwen2tool.routing.memory import MemoryPlan
from qwen2tool.routing.plan import find_stack
from qwen2tool.routing.swap import restore, route, unroute
from tests.routing.models import batch, fill_adapters, logits_and_gradients
from tests.routing.test_matrix import quantise
from tests.tiny import TARGETS, tiny_model
from tests.tolerances import relative_error

LAYERS = 5
AWAY = MemoryPlan(("input",) * LAYERS, host_weights=3)
HERE = MemoryPlan(("input",) * LAYERS)


def four_bit(device="cpu", dtype=torch.float32, dropout=0.0, config=None, **changes):
    """NF4 with adapters of non-zero B in fp32, in training mode; `changes` go to LoraConfig."""
    model = tiny_model(**({"num_hidden_layers": LAYERS} | (config or {}))).requires_grad_(False).to(device, dtype)
    quantise(model, dtype)
    options = {
        "r": 8,
        "lora_alpha": 20,
        "lora_dropout": dropout,
        "target_modules": list(TARGETS),
        "task_type": "CAUSAL_LM",
    }
    model = get_peft_model(model, LoraConfig(**options | changes))
    fill_adapters(model)
    return model.train()


def packed(model):
    return [p for p in model.parameters() if getattr(p, "quant_state", None) is not None]


class Journal(list):
    """What was fetched ("fetch", layer) and waited for ("wait", layer), in order."""

    def waiting(self):
        """Layers fetched and not waited for."""
        open_ = [layer for what, layer in self if what == "fetch"]
        for what, layer in self:
            if what == "wait":
                open_.remove(layer)
        return open_


@pytest.fixture
def journal(monkeypatch):
    found = Journal()

    def start(stream, layer, tensor, source, out=False):
        found.append(("fetch", layer))
        tensor.copy_(source)
        return Copied(layer, tensor, None)

    monkeypatch.setattr(Copied, "start", start)
    monkeypatch.setattr(Copied, "wait", lambda copied: found.append(("wait", copied.layer)))
    monkeypatch.setattr(weights, "_on_device", lambda weight: True)
    monkeypatch.setattr(host, "pinned", lambda size: torch.zeros(size, dtype=torch.uint8))
    return found


def away(model):
    """Layers whose seven weights lie in a block."""
    stack, _ = find_stack(model)
    store = stack.host_weights
    return [i for i, layer in enumerate(stack.layers) if all(store._waits(i, w) for w in weights._quantised(layer))]


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def results(model, seed=3):
    torch.manual_seed(seed)
    return logits_and_gradients(model, input_ids=batch())


@pytest.mark.parametrize("plan", [AWAY, MemoryPlan(("input", "mlp", "attention", "all", "input"), host_weights=3)])
def test_the_same_function_from_the_host(plan, journal):
    model = four_bit(dropout=0.1)
    before = [weight.data.clone() for weight in packed(model)]
    route(model, memory=MemoryPlan(plan.keep))
    wanted = results(model)
    assert not journal and len(wanted) == 1 + LAYERS * 7 * 2
    unroute(model)
    route(model, memory=plan)
    assert away(model) == [1, 2, 3]
    assert same(results(model), wanted)
    forward = [("fetch", 1), ("wait", 1), ("fetch", 2), ("wait", 2), ("fetch", 3), ("wait", 3)]
    backward = [("fetch", 3), ("wait", 3), ("fetch", 2), ("wait", 2), ("fetch", 1), ("wait", 1)]
    assert journal == forward + backward, "each on its way before its layer, and waited for by it"
    unroute(model)
    assert all(weight.untyped_storage().nbytes() == weight.numel() for weight in packed(model)), "in no block any more"
    assert all(torch.equal(weight.data, old) for weight, old in zip(packed(model), before, strict=True))


def test_a_weight_that_is_not_brought_would_show(journal, monkeypatch):
    model = four_bit()
    route(model, memory=HERE)
    wanted = results(model)
    unroute(model)
    monkeypatch.setattr(Copied, "start", lambda stream, layer, tensor, source, out=False: Copied(layer, tensor, None))
    route(model, memory=AWAY)
    found = results(model)
    assert not torch.equal(found["logits"], wanted["logits"])


def test_adapters_on_upper_layers_alone_leave_nothing_under_way(journal):
    """No gradient goes below them: a fetch for a backward that never comes would break a capture."""
    model = four_bit(layers_to_transform=[3, 4])
    route(model, memory=HERE)
    wanted = results(model)
    unroute(model)
    route(model, memory=AWAY)
    assert same(results(model), wanted) and len(wanted) == 1 + 2 * 7 * 2
    assert journal.waiting() == [] and journal.count(("fetch", 3)) == 2 and journal.count(("fetch", 2)) == 1


@pytest.mark.parametrize("between", ["restore", "generate", "unroute", "scoring"])
def test_a_backward_goes_on_after_what_came_in_between(between, journal):
    model = four_bit()
    route(model, memory=AWAY)
    wanted = results(model)
    stack, _ = find_stack(model)
    model.zero_grad()
    logits = model(input_ids=batch(), use_cache=False).logits
    if between == "restore":
        stack.restore()
    elif between == "generate":
        model.generate(input_ids=batch(2, 5), max_new_tokens=2, do_sample=False, use_cache=True)
    elif between == "unroute":
        unroute(model)
    else:
        with torch.no_grad():
            model(input_ids=batch(2, 9), use_cache=False)
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(11))).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert same(found | {"logits": logits.detach()}, wanted)


def test_they_come_back_for_generation_and_go_with_the_next_settling(journal):
    model = four_bit()
    route(model, memory=AWAY)
    wanted = results(model)
    model.generate(input_ids=batch(2, 5), max_new_tokens=2, do_sample=False, use_cache=True)
    assert away(model) == []
    del journal[:]
    assert same(results(model), wanted) and not journal, "a pass moves nothing by itself: it may be a capture"
    stack, _ = find_stack(model)
    stack.settle()
    assert away(model) == [1, 2, 3] and same(results(model), wanted) and journal


def test_peft_adds_and_merges_once_they_are_restored(journal):
    model = four_bit()
    plain = copy.deepcopy(model)
    route(model, memory=AWAY)
    results(model)
    restore(model)
    assert away(model) == []
    for one in (model, plain):
        one.merge_adapter()
    assert all(torch.equal(ours.data, theirs.data) for ours, theirs in zip(packed(model), packed(plain), strict=True))
    for one in (model, plain):
        one.unmerge_adapter()
        torch.manual_seed(1)
        one.add_adapter("second", LoraConfig(r=4, target_modules=list(TARGETS)))
        one.set_adapter("second")
        fill_adapters(one)
    found, wanted = results(model), results(plain)
    assert found.keys() == wanted.keys() and len(found) == 1 + LAYERS * 7 * 2
    assert max(relative_error(found[name], wanted[name]) for name in wanted) < 1e-4
    restore(plain)  # which is not routed


def test_a_part_of_a_layer_that_is_back_returns_to_its_own_place(journal):
    """Laid out anew over those alone, gate, up and down would lie where q, k, v and o are."""
    model = four_bit()
    route(model, memory=AWAY)
    wanted = results(model)
    stack, _ = find_stack(model)
    block = stack.host_weights._homes[2].block.clone()
    for weight in weights._quantised(stack.layers[2].mlp):
        weight.data = weight.data.clone()
    assert away(model) == [1, 3] and same(results(model), wanted), "half of it from the block, half from where it is"
    stack.settle()
    assert away(model) == [1, 2, 3] and torch.equal(stack.host_weights._homes[2].block, block)
    assert same(results(model), wanted)


def test_a_pass_that_ended_early_is_not_relied_on(journal):
    model = four_bit()
    route(model, memory=AWAY)
    wanted = results(model)
    stack, _ = find_stack(model)
    norm = stack.layers[2].input_layernorm.weight
    right, norm.data = norm.data, torch.ones(3)
    with pytest.raises((RuntimeError, ValueError)):
        results(model)
    norm.data = right
    assert journal.waiting() == [3]
    for place in stack.host_weights._places:
        place.fill_(7)  # by whom ever
    assert same(results(model), wanted)


def test_a_copy_is_a_model_of_its_own(journal):
    model = four_bit()
    route(model, memory=AWAY)
    wanted = results(model)
    twin = copy.deepcopy(model)
    assert away(model) == [] == away(twin), "put back for it"
    for tensor in packed(model):
        tensor.data = torch.zeros_like(tensor.data)
    assert same(results(twin), wanted)
    find_stack(twin)[0].settle()
    assert away(twin) == [1, 2, 3] and same(results(twin), wanted)


def test_what_belongs_to_a_device_is_not_pickled(journal):
    """Streams, events and pinned memory: whoever loads a routed model begins with none."""
    model = four_bit()
    route(model, memory=AWAY)
    results(model)
    stack, _ = find_stack(model)
    assert stack.host_weights._homes
    loaded = pickle.loads(pickle.dumps(stack.host_weights))
    assert not loaded._homes and not pickle.loads(pickle.dumps(stack._host))._buffers


def test_weights_are_put_back_before_a_model_is_pickled(journal):
    model = four_bit()
    route(model, memory=AWAY)
    wanted = results(model)
    assert away(model) == [1, 2, 3]
    loaded = pickle.loads(pickle.dumps(model))
    assert away(model) == [] == away(loaded) and same(results(loaded), wanted)


def test_a_cpu_keeps_its_weights():
    """Without the stand-in nothing moves, and a plan that would move weights changes nothing."""
    model = four_bit()
    route(model, memory=HERE)
    wanted = results(model)
    unroute(model)
    route(model, memory=AWAY)
    assert away(model) == [] and same(results(model), wanted) and len(wanted) == 1 + LAYERS * 7 * 2
