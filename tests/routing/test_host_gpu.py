"""On a GPU: what waits on the host comes back bit for bit, and a model that uses it computes the same bits."""

from __future__ import annotations

import pytest
import torch

from qwen2tool.routing.host import HostStore, pinned
from qwen2tool.routing.memory import MemoryPlan
from qwen2tool.routing.plan import find_stack
from qwen2tool.routing.swap import route, unroute
from tests.routing.models import batch, logits_and_gradients, lora_model

pytestmark = pytest.mark.gpu
LARGER = {"hidden_size": 512, "intermediate_size": 1000, "num_hidden_layers": 5, "num_attention_heads": 8}
LAYERS = 5


def tensors(seed=0, rows=700, dtype=torch.bfloat16):
    """One a layer, each with a number of its own in it, NaN and infinities among them."""
    torch.manual_seed(seed)
    found = [torch.randn(rows, 512, device="cuda").to(dtype) + index for index in range(LAYERS)]
    found[1][0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    return found


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def crowd(rows=700):
    """Work that keeps the GPU busy and its memory changing hands, so that a copy too late or too early would show."""
    x = torch.randn(rows, 512, device="cuda")
    for _ in range(10):
        x = torch.tanh(x @ torch.randn(512, 512, device="cuda"))
    return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_taken_back_as_it_was_put(dtype):
    store, originals = HostStore(), tensors(dtype=dtype)
    for number in range(3):  # buffers are used again by later passes
        store.begin()
        kept = [x + number for x in originals]
        tickets = []
        for index, x in enumerate(kept):
            gone = x.clone()
            tickets.append(store.put(index, "x", gone))
            del gone  # only the store holds it now
            crowd()
        for index in reversed(range(LAYERS)):
            store.fetch_below(index)
            crowd()
            assert same_bits(store.take(tickets[index]), kept[index])


def test_two_of_a_layer_and_other_shapes():
    """Names do not meet; a smaller and a larger pass than the first; rows of another stride."""
    store = HostStore()
    for rows in (300, 10, 700, 1):
        store.begin()
        x, wide = torch.randn(rows, 64, device="cuda"), torch.randn(rows, 200, device="cuda")[:, :123]
        for index in range(2):
            tickets = store.put(index, "x", x + index), store.put(index, "gate_up", wide)
            if index == 0:
                first = tickets
        assert same_bits(store.take(tickets[0]), x + 1)
        store.fetch_below(1)
        assert same_bits(store.take(first[1]), wide.contiguous()) and same_bits(store.take(first[0]), x)


def test_what_is_under_way():
    """Out: what the last three layers put here. Back: what the layer below did, and what is large of the one below."""
    store, x = HostStore(), torch.randn(64, 32, device="cuda")
    for index in range(LAYERS):
        tickets = [store.put(index, name, x + index) for name in ("x", "gate_up")]
        store.let_go(index)
        assert {copied.layer for copied in store._leaving} == set(range(max(index - 2, 0), index + 1))
    store.take(tickets[0])
    coming = {(3, "x"), (3, "gate_up"), (2, "gate_up")}
    for layer, more in ((4, coming), (3, {(2, "x"), (1, "gate_up")}), (2, {(1, "x"), (0, "gate_up")}), (1, {(0, "x")})):
        before = {(ticket.layer, ticket.name) for ticket in store._arriving}
        store.fetch_below(layer)
        assert not store._leaving and {(t.layer, t.name) for t in store._arriving} - before == more
    for ticket in list(store._arriving):
        assert same_bits(store.take(ticket), x + ticket.layer)


def test_a_second_pass_before_the_backward_of_the_first_is_refused():
    store = HostStore()
    x = torch.randn(8, 4, device="cuda")
    first = store.put(0, "x", x)
    store.begin()
    second = store.put(0, "x", x + 1)
    with pytest.raises(RuntimeError, match="a second forward pass came before the backward of the first"):
        store.take(first)
    assert same_bits(store.take(second), x + 1)


def test_passes_that_are_given_up_leave_nothing_on_the_gpu():
    """A backward that ends early fetched the layer below in vain; the next pass must not hold it for ever."""
    store = HostStore()
    x = torch.randn(1 << 20, 4, device="cuda")
    held = []
    for _ in range(4):
        store.begin()
        tickets = [store.put(index, "x", x) for index in range(3)]
        store.fetch_below(2)
        store.take(tickets[2])
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[-1] <= held[1]


def test_a_graph_keeps_its_buffer_when_a_larger_pass_comes():
    """Captured copies go to the address they were captured with: it must stay this store's own."""
    store = HostStore()
    x = torch.randn(1 << 16, device="cuda")
    store.take(store.put(0, "x", x))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        back = store.take(store.put(0, "x", x)) * 1
    store.take(store.put(0, "x", torch.zeros(1 << 20, device="cuda")))
    torch.cuda.synchronize()
    others = [torch.zeros(1 << 16, pin_memory=True) for _ in range(8)]  # whoever is given freed memory
    x.copy_(torch.randn(1 << 16))
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(back, x)
    assert not any(other.any() for other in others)


PLANS = {
    "inputs": MemoryPlan(("input",) * LAYERS, host_inputs=LAYERS - 1),
    "inputs, gate and up": MemoryPlan(("mlp", "input", "mlp", "mlp", "input"), LAYERS - 1, frozenset({0, 2, 3})),
    "gate and up of lifted layers": MemoryPlan(
        ("all", "attention", "all", "all", "all"), LAYERS - 1, frozenset({0, 2})
    ),
}


def half(model):
    """Frozen weights in bf16, adapters in fp32, as PEFT has them."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "lora_" in name else torch.bfloat16)
    return model.cuda()


def results(model, plan, steps=2):
    """Logits and gradients of passes over batches of different sizes."""
    route(model, memory=plan)
    found = []
    for step in range(steps):
        torch.manual_seed(3)
        with torch.autocast("cuda", torch.bfloat16):
            found.append(logits_and_gradients(model, input_ids=batch(3, 192 - 64 * step, seed=step).cuda()))
    unroute(model)
    return found


@pytest.mark.parametrize("name", PLANS)
def test_a_model_gives_the_same_bits_with_the_host_and_without(name):
    plan = PLANS[name]
    model = half(lora_model(config=LARGER, dropout=0.1))
    on_host, on_device = results(model, plan), results(model, MemoryPlan(plan.keep))
    for ours, theirs in zip(on_host, on_device, strict=True):
        assert ours.keys() == theirs.keys() and len(ours) == 1 + LAYERS * 7 * 2
        assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []
    assert not torch.equal(on_host[0]["logits"][:, :128], on_host[1]["logits"]), "the two batches differ"


def test_a_model_refuses_a_backward_whose_inputs_are_gone():
    model = half(lora_model(config=LARGER))
    route(model, memory=PLANS["inputs"])
    with torch.autocast("cuda", torch.bfloat16):
        losses = [model(input_ids=batch(2, 64, seed=s).cuda(), use_cache=False).logits.float().sum() for s in (0, 1)]
    with pytest.raises(RuntimeError, match="a second forward pass came before"):
        losses[0].backward()


def test_evaluation_between_forward_and_backward_takes_nothing_away():
    """Without gradients nothing is put on the host, so a validation pass may come in between."""
    model = half(lora_model(config=LARGER))
    route(model, memory=PLANS["inputs, gate and up"])
    ids = batch(2, 64).cuda()
    gradients = []
    for evaluates in (False, True):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, use_cache=False).logits.float().sum()
            if evaluates:
                with torch.no_grad():
                    model(input_ids=batch(2, 64, seed=9).cuda(), use_cache=False)
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == LAYERS * 7 * 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", PLANS)
def test_a_second_backward_over_a_retained_graph(name):
    """It may be asked for (torch's own tests of gradients do): what is on the host comes back once more."""
    model = half(lora_model(config=LARGER))
    route(model, memory=PLANS[name])
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids=batch(2, 64).cuda(), use_cache=False).logits.float().sum()
    trained = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, trained, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, trained), strict=True))
    assert not find_stack(model)[0]._host._arriving, "and all of it was taken"


def test_nothing_is_fetched_for_layers_that_are_not_trained():
    """Frozen after a pass in which they were: what they put on the host then is still there."""
    model = half(lora_model(config=LARGER))
    route(model, memory=PLANS["inputs, gate and up"])
    for frozen in (0, 3):
        for name, parameter in model.named_parameters():
            if any(f"layers.{index}." in name for index in range(frozen)):
                parameter.requires_grad_(False)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=batch(2, 64).cuda(), use_cache=False).logits.float().sum()
        loss.backward()
        stack, _ = find_stack(model)
        assert not stack._host._arriving and len(stack._host._tickets) == LAYERS - 1


def test_after_a_refusal_of_the_driver_all_goes_on(monkeypatch):
    """It would be reported once more by the next launch, whosever that is."""
    real = torch.cuda.cudart()
    refusals = []

    class Refuses:
        @staticmethod
        def cudaHostRegister(address, size, flags):
            refusals.append(int(real.cudaHostRegister(address, size, 1 << 20)))
            return refusals[-1]

    monkeypatch.setattr(torch.cuda, "cudart", Refuses)
    memory = pinned(1 << 20)
    assert refusals and refusals[0] != 0 and memory.is_pinned()
    assert float(torch.ones(3, device="cuda").sum()) == 3


def test_memory_goes_when_its_copy_is_done():
    """Without a word from us: the driver lets go of memory after what was started before."""
    x, done = torch.randn(1 << 20, device="cuda"), torch.cuda.Event()
    memory = pinned(x.nbytes).view(torch.float32)
    torch.cuda._sleep(500_000_000)  # a quarter of a second
    memory.copy_(x, non_blocking=True)
    done.record()
    assert not done.query(), "the control: it is under way"
    del memory
    assert done.query()
