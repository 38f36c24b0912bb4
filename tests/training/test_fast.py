"""How graphs and memory get along: captured passes keep what they used, those of all shapes in one pool."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qwen2tool.routing import host
from qwen2tool.routing.memory import WORKSPACES, plan_memory
from qwen2tool.training import fast
from qwen2tool.training.batches import parts
from qwen2tool.training.fast import GROWTH, PACKED, compact, put_on_fast_path, share_memory
from tests.routing.models import fill_adapters
from tests.routing.test_matrix import quantise
from tests.routing.test_memory import LARGE
from tests.tiny import TARGETS, tiny_model

OPTIONS = {"recompute": "auto", "host": True}
BUDGETS = [3.5, 4.5, 6, 7, 8.5, 9, 9.5, 10, 12, 20, 40, 60, 80, 140, 300]


PACKED_7B = replace(LARGE, packed=True, layer_packed=101_187_584)


def lasting(sizes, plan):
    """What is no part of a pass, written out."""
    moved = sizes.embedding if plan.host_embedding else 0
    moved += max(plan.host_weights - 2, 0) * sizes.layer_packed
    return sizes.static + WORKSPACES - moved + plan.layers_unpacked * sizes.unpacked


@pytest.mark.parametrize("sizes", [LARGE, PACKED_7B], ids=["16 bit", "nf4"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_budget_holds_one_pass_and_the_pool_of_many_shapes(budget, sizes):
    budget = int(budget * 1e9)
    plan, graphs, reserve = share_memory(sizes, budget, **OPTIONS, graphs=True, many_shapes=True)
    one = plan.estimate - lasting(sizes, plan)
    if not graphs:
        assert plan == plan_memory(sizes, budget) and reserve == 0
    elif reserve:
        assert one <= reserve <= one / PACKED and lasting(sizes, plan) + reserve <= budget
        assert lasting(sizes, plan) + GROWTH * one / PACKED > budget, "with room to grow nothing is taken in advance"
    else:
        assert lasting(sizes, plan) + GROWTH * one <= budget
    alone, captured, nothing = share_memory(sizes, budget, **OPTIONS, graphs=True, many_shapes=False)
    assert captured and alone == plan_memory(sizes, budget) and nothing == 0
    assert share_memory(sizes, budget, **OPTIONS, graphs=False, many_shapes=True) == (alone, False, 0)


def test_a_tight_budget_gives_up_graphs_a_wider_one_reserves_and_a_wide_one_does_not():
    tight = plan_memory(LARGE, 0).estimate
    found = [
        share_memory(LARGE, budget, **OPTIONS, graphs=True, many_shapes=True)[1:]
        for budget in (tight, tight * 11 // 10, 300 * 10**9)
    ]
    assert [(graphs, reserve > 0) for graphs, reserve in found] == [(False, False), (True, True), (True, False)]


def test_weights_on_the_host_do_not_cost_graphs():
    """What lasts is then less than the budget although all the weights together are more."""
    assert PACKED_7B.static > 6_400_000_000
    plan, graphs, reserve = share_memory(PACKED_7B, 6_400_000_000, **OPTIONS, graphs=True, many_shapes=True)
    assert plan.host_weights == 30 and graphs and 0 < reserve <= 6_400_000_000 - lasting(PACKED_7B, plan)


def test_graphs_of_many_shapes_cost_a_twentieth_of_what_passes_have():
    """Half of it, when a warm-up had memory of its own."""
    for budget in (20 * 10**9, 40 * 10**9):
        many, graphs, _ = share_memory(LARGE, budget, **OPTIONS, graphs=True, many_shapes=True)
        assert graphs and many == plan_memory(LARGE, LARGE.static + int((budget - LARGE.static) * 0.95))
        assert many.saved > plan_memory(LARGE, LARGE.static + (budget - LARGE.static) // 2).saved


@pytest.mark.parametrize("largest", [128, 1024, 2048, 3072, 8192, 12288, 24576])
def test_growth_is_the_sum_of_all_sizes(largest):
    assert sum(parts(largest)) <= GROWTH * largest


def test_a_compacted_model_is_the_same_in_other_places(monkeypatch):
    """Parameters, tied and quantised ones too, stay the same objects with the same bits."""
    base = tiny_model(tie_word_embeddings=True).requires_grad_(False)
    quantise(base, torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=list(TARGETS)))
    fill_adapters(model)
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    old = {name: tensor.data for name, tensor in tensors.items()}  # alive, so that nothing can come to lie there
    ids = torch.arange(24).view(2, 12)
    wanted = model(input_ids=ids).logits
    monkeypatch.setattr(host, "pinned", lambda size: torch.zeros(size, dtype=torch.uint8))
    compact(model, torch.device("cpu"))
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(after[name] is tensor for name, tensor in tensors.items()) and len(tensors) > 60
    assert all(torch.equal(after[name], values[name]) for name in values)
    assert all(after[name].data_ptr() != old[name].data_ptr() for name in old)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model(input_ids=ids).logits, wanted)


@pytest.mark.parametrize(("head", "pinned", "moves"), [("cuda", False, 1), ("cuda", True, 0), ("cpu", False, 0)])
def test_a_table_that_is_not_pinned_yet_goes_to_the_host(head, pinned, moves, monkeypatch):
    """On the device, or on the host as a copied model has it; not where the model computes on a CPU."""
    table = SimpleNamespace(is_pinned=lambda: pinned, requires_grad=False)
    weight = SimpleNamespace(is_cuda=head == "cuda")
    model = SimpleNamespace(
        get_input_embeddings=lambda: SimpleNamespace(weight=table),
        get_output_embeddings=lambda: SimpleNamespace(weight=weight),
        config=SimpleNamespace(tie_word_embeddings=False),
    )
    moved = []
    monkeypatch.setattr(fast, "_move", moved.append)
    fast.embedding_to_host(model)
    assert moved == [[table]] * moves


def test_a_cpu_keeps_4_bits():
    """Nothing limits its memory, and 4 bits are there to save it."""
    base = tiny_model().requires_grad_(False)
    quantise(base, torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=list(TARGETS)))
    plans = put_on_fast_path(model, tokens=64, length=16, dtype=torch.float32, shapes="many", cuts=[64, 128])
    assert plans.memory.layers_unpacked == 0 and set(plans.memory.keep) == {"all"} and plans.cut is None
