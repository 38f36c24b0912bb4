"""One gradient buffer goes through all fused layers; what is not theirs is neither overwritten nor written behind."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

import qwen2tool.kernels.lora
import qwen2tool.routing.operands
import qwen2tool.routing.stack
from qwen2tool.routing.examine import examine_stack
from qwen2tool.routing.layer import fused_layer
from qwen2tool.routing.memory import MemoryPlan
from qwen2tool.routing.operands import Call, Handed, with_room
from qwen2tool.routing.plan import find_stack
from qwen2tool.routing.sequences import flatten
from qwen2tool.routing.swap import route, unroute
from tests.routing.models import batch, fill_adapters, logits_and_gradients, lora_model
from tests.routing.test_layer import EXACT, wide_norms, worst  # noqa: F401  (the last but one is a fixture)
from tests.routing.test_matrix import quantise
from tests.tiny import TARGETS, tiny_model
from tests.tolerances import relative_error

pytestmark = pytest.mark.usefixtures("wide_norms")
WIDE = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Fewer columns than the 51 tokens of a batch: every group then has the extended form."""


@pytest.fixture
def copies(monkeypatch):
    """How often a gradient was copied to rows with room."""
    counted = []
    real = qwen2tool.kernels.lora.copy_rows

    def counting(x, out):
        counted.append(x.shape)
        return real(x, out)

    monkeypatch.setattr(qwen2tool.kernels.lora, "copy_rows", counting)
    return counted


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0),
        ({"rank_pattern": {"o_proj": 3}}, 0),  # rounded up to the same room
        ({"rank_pattern": {"o_proj": 9}}, 2),  # o leaves room of another width than down of the layer below needs
        ({"dropout": 0.1}, 0),  # the masked product reads dy as it is
    ],
)
def test_the_gradient_is_copied_where_it_must_be(changes, expected, copies):
    model = lora_model(config=WIDE, **changes)
    route(model)
    logits_and_gradients(model, input_ids=batch())
    assert len(copies) == expected


@pytest.mark.parametrize("rank", [4, 9])
def test_handed_on_or_copied_it_is_the_same_gradient(rank, monkeypatch):
    model = lora_model(config=WIDE, rank_pattern={"o_proj": rank}).double()
    plain = logits_and_gradients(model, input_ids=batch())
    found = []
    for refused in (False, True):
        if refused:
            monkeypatch.setattr(Handed, "take", lambda self, dy, layer: None)
        routed = copy.deepcopy(model)
        route(routed)
        gradients = logits_and_gradients(routed, input_ids=batch())
        found.append({name: relative_error(gradients[name], plain[name]) for name in plain})
    assert worst(found[0])[1] < EXACT and worst(found[1])[1] < EXACT


def one_layer():
    """(the layer over rows of 51 tokens, which calls it with a fresh input that wants a gradient)."""
    model = lora_model(config=WIDE).double()
    stack, _ = find_stack(model)
    layers = examine_stack(stack)
    flat = flatten(3, 17, torch.device("cpu"), None, None)
    angles = stack.rotary_emb(torch.empty(0, dtype=torch.float32), flat.positions[None])
    cos, sin = (table[0, :, : table.shape[-1] // 2].contiguous().double() for table in angles)
    call = Call(flat.sequences, cos, sin, torch.float64)
    x = torch.randn(51, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    return layers, call, x


@pytest.mark.parametrize("room", [0, 16])
def test_a_gradient_of_somebody_else_s_stays_as_it_was(room):
    """Contiguous, or a slice of a wider one, as torch.cat's backward makes them: its neighbours are not room."""
    layers, call, x = one_layer()
    assert layers[1].down.width == 8, "which would fit into the 16"
    wide = torch.randn(51, 32 + room, dtype=torch.float64)
    before = wide.clone()
    torch.autograd.grad(fused_layer(x, layers[1], call), x, wide[:, :32])
    assert torch.equal(wide, before)


def test_a_sum_of_two_gradients_is_not_taken_for_the_one_handed_on():
    """y of a layer is read by the layer above and by somebody else; both gradients reach it."""
    layers, call, x = one_layer()
    parameters = [tensor for spec in layers[:2] for tensor in spec.parameters if tensor.requires_grad]
    results = []
    for other in (0.0, 1.0):
        y = fused_layer(x, layers[0], call)
        z = fused_layer(y, layers[1], call)
        results.append(torch.autograd.grad(z.square().sum() + other * y.pow(3).sum(), [x, *parameters]))
    alone = fused_layer(x, layers[0], call)
    added = torch.autograd.grad(alone.pow(3).sum(), [x, *parameters], allow_unused=True)
    for whole, part, extra in zip(results[1], results[0], added, strict=True):
        expected = part if extra is None else part + extra
        assert relative_error(whole, expected) < EXACT
    assert relative_error(results[1][0], results[0][0]) > 1e-2


def test_only_the_layer_below_takes_it():
    handed, rows = Handed(), with_room(torch.zeros(4, 6), 8)
    given = handed.give(rows, 3)
    assert given.shape == (4, 6) and given.stride() == (14, 1)
    assert handed.take(given, 1) is None
    assert handed.take(given, 2) is None, "what was not taken in its turn is forgotten"
    handed.give(rows, 3)
    assert handed.take(given.clone(), 2) is None
    handed.give(rows, 3)
    assert handed.take(given[:, :5], 2) is None
    handed.give(rows, 3)
    assert handed.take(given, 2) is rows and handed.take(given, 2) is None
    handed.give(rows, 0)
    assert handed.take(given, -1) is None


def test_a_second_backward_through_the_same_graph():
    model = lora_model(config=WIDE).double()
    route(model, memory=MemoryPlan(("input", "all", "input")))
    loss = model(input_ids=batch(), use_cache=False).logits.square().sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


KEPT = MemoryPlan(("input", "all", "input"), layers_unpacked=2)


@pytest.fixture
def unpackings(monkeypatch):
    """Which groups were unpacked, by their stream."""
    seen = []
    real = qwen2tool.routing.operands.unpack
    monkeypatch.setattr(
        qwen2tool.routing.operands, "unpack", lambda group, *a, **o: seen.append(group.stream) or real(group, *a, **o)
    )
    return seen


def addresses(model):
    """Of kept weights, by their group's stream: what captured graphs hold on to."""
    return {stream: matrix.data_ptr() for stream, (_, _, matrix) in find_stack(model)[0]._unpacked._kept.items()}


def test_kept_weights_give_the_same_bits_in_every_pass(unpackings):
    """Over steps that change the adapters, which stand in the same operands."""
    runs = []
    for memory in (KEPT, replace(KEPT, layers_unpacked=0)):
        model = lora_model(config=WIDE)
        route(model, memory=memory)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        found = []
        for seed in range(3):
            found.append(logits_and_gradients(model, input_ids=batch(seed=seed)))
            optimizer.step()
        runs.append(found)
    for kept, fresh in zip(*runs, strict=True):
        assert [name for name in fresh if not torch.equal(kept[name], fresh[name])] == []
    assert relative_error(runs[0][1]["logits"], runs[0][0]["logits"]) > 1e-2
    assert unpackings == [*range(8)], "q k v, o, gate up and down of layers 0 and 1, once"


def test_weights_that_changed_are_unpacked_again(unpackings):
    model = lora_model(config=WIDE)
    route(model, memory=KEPT)
    ids = batch()
    logits_and_gradients(model, input_ids=ids)
    base, before = find_stack(model)[0].layers[1].mlp.up_proj.base_layer, addresses(model)
    with torch.no_grad():
        base.weight.mul_(1.5)
    changed = logits_and_gradients(model, input_ids=ids)
    assert unpackings == [*range(8), 6] and addresses(model) == before
    base.weight = torch.nn.Parameter(base.weight.detach().clone(), requires_grad=False)
    moved = logits_and_gradients(model, input_ids=ids)
    assert unpackings[9:] == [6]
    assert torch.equal(moved["logits"], changed["logits"])
    unroute(model)
    assert relative_error(changed["logits"], logits_and_gradients(model, input_ids=ids)["logits"]) < 1e-5


@pytest.mark.parametrize("first", ["on", "off"])
def test_an_adapter_switched_off_is_not_in_kept_weights(first, unpackings):
    model = lora_model(config=WIDE)
    route(model, memory=KEPT)
    ids = batch()
    if first == "off":
        with model.disable_adapter():
            model(input_ids=ids, use_cache=False)
        assert unpackings == [], "nothing is kept that training has no use for"
    on = model(input_ids=ids, use_cache=False).logits
    before = addresses(model)
    with model.disable_adapter():
        off = model(input_ids=ids, use_cache=False).logits
    assert unpackings == [*range(8)] and addresses(model) == before
    again = model(input_ids=ids, use_cache=False).logits
    unroute(model)
    with model.disable_adapter():
        expected = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(on, again) and relative_error(off, expected) < 1e-5 < relative_error(on, expected)


def test_4_bit_weights_written_to_in_place_are_noticed(unpackings):
    """As `load_state_dict` does it, which leaves the tensor where it is."""
    base = tiny_model(**WIDE | {"hidden_size": 64, "intermediate_size": 128}).requires_grad_(False)
    quantise(base, torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=list(TARGETS)))
    fill_adapters(model)
    model.train()
    route(model, memory=KEPT)
    ids = batch()
    before = logits_and_gradients(model, input_ids=ids)
    assert unpackings == list(range(8)), "all groups of 4-bit weights"
    weight = find_stack(model)[0].layers[0].self_attn.o_proj.base_layer.weight
    with torch.no_grad():
        weight.copy_(weight ^ 0x33)
    after = logits_and_gradients(model, input_ids=ids)
    assert unpackings[8:] == [1]
    assert relative_error(after["logits"], before["logits"]) > 1e-3
    unroute(model)
    route(model, memory=replace(KEPT, layers_unpacked=0))
    fresh = logits_and_gradients(model, input_ids=ids)
    assert [name for name in fresh if not torch.equal(after[name], fresh[name])] == []


def test_nothing_holds_the_embeddings_through_all_layers(monkeypatch):
    """Where a layer's input waits on the host, the device must be rid of it."""
    model, held = lora_model(config=WIDE), []
    first: list[weakref.ref[torch.Tensor]] = []

    def watched(x, *arguments, **options):
        if len(held) % 3 == 0:
            first[:] = [weakref.ref(x)]
        held.append(first[0]() is not None)
        return fused_layer(x, *arguments, **options)

    monkeypatch.setattr(qwen2tool.routing.stack, "fused_layer", watched)
    route(model)
    stack = find_stack(model)[0]
    with torch.no_grad():
        model(input_ids=batch(), use_cache=False)
        flat = flatten(3, 17, torch.device("cpu"), None, None)
        stack.run(stack.embed(batch()).view(51, 32), flat)
    assert held == [True, False, False, True, False, False]


def test_inference_mode_unpacks_for_itself():
    """Its tensors have no versions to tell a change by."""
    model = lora_model(config=WIDE)
    route(model, memory=KEPT)
    with torch.inference_mode():
        inside = model(input_ids=batch(), use_cache=False).logits
    assert addresses(model) == {}
    assert torch.equal(inside, model(input_ids=batch(), use_cache=False).logits.detach())
