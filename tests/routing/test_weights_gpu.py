"""On a GPU: 4-bit weights that wait on the host are the same bits, in passes, in graphs, and once they are back."""

from __future__ import annotations

import pytest
import torch

from qwen2tool.routing.host import Copied
from qwen2tool.routing.memory import MemoryPlan
from qwen2tool.routing.plan import find_stack
from qwen2tool.routing.swap import route, send_away, unroute
from qwen2tool.training.fast import settle
from tests.routing.models import batch, logits_and_gradients
from tests.routing.test_weights import four_bit, packed
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


def model_of(dropout=0.1, **changes):
    return four_bit("cuda", torch.bfloat16, dropout, LARGER, **changes)


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


@pytest.mark.parametrize("waits", [True, False])
def test_a_copy_that_comes_late_is_waited_for(waits, monkeypatch):
    """Copies begin some milliseconds late; the control does not wait, and reads other layers' weights."""
    model = model_of()
    route(model, memory=MemoryPlan(("input",) * LAYERS))
    right = results(model, 1)
    unroute(model)
    route(model, memory=PLANS["all recomputed"])
    results(model, 1)  # after which the places hold weights of other layers
    start, wait = Copied.start, Copied.wait

    def late(stream, *arguments):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
        return start(stream, *arguments)

    monkeypatch.setattr(Copied, "start", late)
    monkeypatch.setattr(Copied, "wait", wait if waits else lambda copied: None)
    found = different(results(model, 1), right)
    torch.cuda.synchronize()
    assert found == [] if waits else found


def steps(model, graphs, plan, between=lambda run, number: None, sequence=(SHORT, MIDDLE, SHORT, SHORT, MIDDLE)):
    """Outcomes and gradients of some steps, as a trainer makes them, in one list; how many graphs that took."""
    run = Run(model, graphs=graphs, memory=plan)
    found = []
    for number, lengths in enumerate(sequence):
        between(run, number)
        send_away(run.model)
        found += run.step([batch_of(lengths, number)])
    return found, run.passes.captured


def unequal(ours, theirs):
    return [index for index, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not torch.equal(a, b)]


def generate(run, number):
    """Before the capture of the first shape, and between replays: weights are back on the device then."""
    if number in (2, 4):
        run.model.eval().generate(input_ids=batch(2, 24).cuda(), max_new_tokens=2, do_sample=False, use_cache=True)
        assert all(weight.is_cuda for weight in packed(run.model))
        run.model.train()


def move(run, number):
    """As a trainer does with the whole model, before a capture."""
    if number == 2:
        run.model.to("cuda")


@pytest.mark.parametrize("between", [None, generate, move], ids=["nothing", "generation", "a move"])
def test_replayed_passes_read_them_too(between):
    model = model_of(dropout=0.0 if between is generate else 0.1)
    eager, none = steps(model, False, MemoryPlan(("input",) * LAYERS))
    replayed, graphs = steps(model, True, PLANS["all recomputed"], between or (lambda run, number: None))
    assert (none, graphs) == (0, 2) and len(eager) == 5 * (2 + LAYERS * 7 * 2)
    assert unequal(replayed, eager) == []


def test_adapters_on_upper_layers_alone_can_be_captured():
    """No gradient goes below them: a capture is refused that ends with a copy under way."""
    model = model_of(layers_to_transform=[3, 4])
    eager, _ = steps(model, False, MemoryPlan(("input",) * LAYERS))
    replayed, graphs = steps(model, True, PLANS["all recomputed"])
    assert graphs == 2 and len(eager) == 5 * (2 + 2 * 7 * 2) and unequal(replayed, eager) == []


def test_generation_has_them_back_and_the_next_step_sends_them_away():
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
    send_away(model)
    assert sum(not weight.is_cuda for weight in packed(model)) == 21
    assert different(results(model, 1), first) == []


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
    """Another activation, say, exchanged after the plan was made."""
    model = model_of(dropout=0.0)
    route(model, memory=MemoryPlan(("input",) * LAYERS))
    stack, _ = find_stack(model)
    stack.layers[2].mlp.act_fn = torch.nn.GELU()
    wanted = results(model, 1)
    unroute(model)
    route(model, memory=PLANS["all recomputed"])
    assert different(results(model, 1), wanted) == []
