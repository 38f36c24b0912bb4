"""A routed model is the function of transformers + PEFT, with its gradients, whatever the batch and the adapter."""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

import qwen2tool.routing.layer
from qwen2tool.kernels import backend
from qwen2tool.routing.memory import MemoryPlan
from qwen2tool.routing.plan import find_stack
from qwen2tool.routing.swap import route
from tests.kernels.poison import nan_memory  # noqa: F401  (a fixture)
from tests.routing.models import batch, fill_adapters, logits_and_gradients, lora_model, padding
from tests.tolerances import FACTOR, relative_error

EXACT = 1e-9
"""float64 against float64: the order of sums differs, nothing else (the key centre is fp32, and a constant)."""


@pytest.fixture
def wide_norms(monkeypatch):
    """transformers' RMSNorm computes in fp32 whatever its input; in float64 the comparison shows more digits."""

    def forward(self, x):
        wide = x.double() if x.dtype == torch.float64 else x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)).to(x)

    monkeypatch.setattr(Qwen2RMSNorm, "forward", forward)


def compare(model, *, keep=None, **inputs):
    """Relative errors of logits and of every gradient, routed against not, in float64."""
    model = model.double()
    plain = logits_and_gradients(model, **inputs)
    routed = copy.deepcopy(model)
    plan = route(routed, memory=MemoryPlan(keep) if keep else None)
    found = logits_and_gradients(routed, **inputs)
    assert found.keys() == plain.keys()
    return plan, {name: relative_error(found[name], plain[name]) for name in plain}


def worst(errors):
    return max(errors.items(), key=lambda item: item[1])


pytestmark = pytest.mark.usefixtures("wide_norms", "nan_memory")

GEOMETRIES = {
    "gqa": {},
    "mha tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "eps 1e-5": {"rms_norm_eps": 1e-5, "intermediate_size": 123},
    "one kv head": {"num_key_value_heads": 1},
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("keep", ["input", "mlp", "attention", "all"])
def test_logits_and_every_gradient(geometry, keep):
    model = lora_model(config=GEOMETRIES[geometry])
    plan, errors = compare(model, keep=(keep,) * 3, input_ids=batch())
    assert plan.counts == {"fused layer": 3}
    assert worst(errors)[1] < EXACT, worst(errors)
    assert len(errors) == 1 + 3 * 7 * 2


ROPES = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "longrope": {
        "factor": 2.0, "original_max_position_embeddings": 8,
        "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.0 + i for i in range(8)],
    },
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("side", ["plain", "left"])
@pytest.mark.parametrize("kind", ROPES)
def test_every_rope_type(kind, side):
    """Sequences of 17 in models made for 8, where the frequencies of some types depend on the length."""
    rope = {"rope_type": kind, "rope_theta": 10_000.0, **ROPES[kind]}
    model = lora_model(config={"max_position_embeddings": 8, "rope_parameters": rope})
    mask = {} if side == "plain" else {"attention_mask": padding(side)}
    plan, errors = compare(model, input_ids=batch(), **mask)
    assert plan.counts == {"fused layer": 3}
    assert worst(errors)[1] < EXACT, worst(errors)
    other = lora_model(config={"max_position_embeddings": 8})
    plain, scaled = (logits_and_gradients(m.double(), input_ids=batch(), **mask)["logits"] for m in (other, model))
    assert relative_error(scaled, plain) > 1e-3, "the control: this type is another function"


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("keep", ["input", "mlp", "attention", "all"])
def test_low_rank_products_made_again_are_the_same_bits(keep, dropout, monkeypatch):
    """The same kernels over the same inputs: made from a wrong one (x for norm(x), say) they would differ."""
    kept, keeps = [], qwen2tool.routing.layer._keep

    def seen(*arguments):
        kept.append([tail is not None for tail in arguments[4]])
        return keeps(*arguments)

    monkeypatch.setattr(qwen2tool.routing.layer, "_keep", seen)
    found = []
    for tails in (True, False):
        model = lora_model(dropout=dropout)
        route(model, memory=MemoryPlan((keep,) * 3, tails=tails))
        torch.manual_seed(5)
        found.append(logits_and_gradients(model, input_ids=batch()))
    assert kept == [[True] * 4] * 3 + [[False] * 4] * 3
    assert len(found[0]) == 1 + 3 * 7 * 2
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("keep", ["input", "all"])
def test_gate_and_up_are_gone_before_the_gradients_of_attention_come(keep, monkeypatch):
    """The memory plan counts on it: of the two moments only the higher one is paid for."""
    rows, mlp, attention = [], qwen2tool.routing.layer._mlp_backward, qwen2tool.routing.layer._attention_backward
    make = qwen2tool.routing.layer._gate_up

    def made(*arguments):
        found = make(*arguments)
        rows.append(weakref.ref(found.plain))
        return found

    def in_mlp(*arguments):
        result = mlp(*arguments)
        alive.append(rows[-1]() is not None)
        return result

    def in_attention(*arguments):
        alive.append(rows[-1]() is not None)
        return attention(*arguments)

    alive: list[bool] = []
    for name, planted in (("_gate_up", made), ("_mlp_backward", in_mlp), ("_attention_backward", in_attention)):
        monkeypatch.setattr(qwen2tool.routing.layer, name, planted)
    model = lora_model(config={"num_hidden_layers": 1})
    route(model, memory=MemoryPlan((keep,)))
    logits_and_gradients(model, input_ids=batch())
    assert alive == [keep == "all", False]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(side):
    _, errors = compare(lora_model(), input_ids=batch(), attention_mask=padding(side))
    assert worst(errors)[1] < EXACT, worst(errors)


def test_a_mask_that_is_ignored_would_show():
    model = lora_model().double()
    masked = logits_and_gradients(model, input_ids=batch(), attention_mask=padding("left"))["logits"]
    ignored = logits_and_gradients(model, input_ids=batch())["logits"] * padding("left")[..., None]
    assert relative_error(ignored, masked) > 1e-2


def test_packed_sequences_do_not_see_each_other():
    positions = torch.cat([torch.arange(n) for n in (5, 1, 11)])[None]
    ids = batch(1, 17)
    model = lora_model()
    _, errors = compare(model, input_ids=ids, position_ids=positions)
    assert worst(errors)[1] < EXACT, worst(errors)
    route(model)
    other = ids.clone()
    other[0, :6] = (other[0, :6] + 1) % 384
    packed = [model(input_ids=i, position_ids=positions, use_cache=False).logits for i in (ids, other)]
    assert torch.equal(packed[0][0, 6:], packed[1][0, 6:])
    whole = [model(input_ids=i, use_cache=False).logits for i in (ids, other)]
    assert not torch.allclose(whole[0][0, 6:], whole[1][0, 6:])


ADAPTERS = {
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"k_proj": 3, "layers.1.mlp.up_proj": 9}, "alpha_pattern": {"q_proj": 5}},
    "v and down alone": {"target_modules": ["v_proj", "down_proj"]},
    "one layer alone": {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    "rank 1": {"r": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_adapter_shape(kind):
    changes = dict(ADAPTERS[kind])
    plan, errors = compare(lora_model(rank=changes.pop("r", 4), **changes), input_ids=batch())
    assert plan.counts == {"fused layer": 3}
    assert worst(errors)[1] < EXACT, worst(errors)


REFERENCE = {
    "dora": ({"use_dora": True}, "LoRA variant"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "bias all": ({"bias": "all"}, "is trained"),
    "bias lora_only": ({"bias": "lora_only"}, "is trained"),
    "a trained linear": ({"modules_to_save": ["o_proj"], "target_modules": ["q_proj"]}, "o_proj is a"),
}


@pytest.mark.parametrize("kind", REFERENCE)
def test_what_cannot_be_fused_says_why_and_loses_no_gradient(kind):
    changes, words = REFERENCE[kind]
    model = lora_model(**changes)
    plan, errors = compare(model, input_ids=batch())
    assert plan.counts == {"reference": 3}
    assert all(words in r.reason for r in plan.routes if r.implementation == "reference" and "layers" in r.module)
    assert worst(errors)[1] < EXACT, worst(errors)


def test_one_dora_layer_leaves_the_others_fused():
    model = lora_model(target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 2])
    from peft import LoraConfig

    model.add_adapter("d", LoraConfig(r=2, target_modules=["k_proj"], layers_to_transform=[1], use_dora=True))
    fill_adapters(model)
    model.base_model.set_adapter(["default", "d"])
    plan, errors = compare(model, input_ids=batch())
    assert plan.counts == {"fused layer": 2, "reference": 1}
    assert worst(errors)[1] < EXACT, worst(errors)


def test_trained_norms_embeddings_and_head_keep_their_gradients():
    model = lora_model(modules_to_save=["embed_tokens", "lm_head"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "norm" in name)
    plan, errors = compare(model, input_ids=batch())
    assert plan.counts == {"fused layer": 3} and plan.routes[-1].implementation == "reference"
    assert sum("norm" in name for name in errors) == 7 and any("lm_head" in name for name in errors)
    assert any("embed_tokens" in name for name in errors)
    assert worst(errors)[1] < EXACT, worst(errors)


def test_adapters_switched_disabled_merged_and_deleted_after_routing():
    from peft import LoraConfig

    model = lora_model(dtype=torch.float64)
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "k_proj", "down_proj"]))
    fill_adapters(model, seed=9)
    model = model.double()
    routed = copy.deepcopy(model)
    route(routed)
    seen = []

    def agree():
        found = [m.train()(input_ids=batch(), use_cache=False).logits for m in (model, routed)]
        assert relative_error(found[1], found[0]) < EXACT
        seen.append(found[0].detach())

    agree()
    for m in (model, routed):
        m.set_adapter("other")
    agree()
    for m in (model, routed):
        m.base_model.set_adapter(["default", "other"])
    agree()
    with model.disable_adapter(), routed.disable_adapter():
        agree()
    for m in (model, routed):
        m.set_adapter("default")
        m.delete_adapter("other")
        m.merge_adapter()
    agree()
    assert all(relative_error(a, b) > 1e-2 for i, a in enumerate(seen[:4]) for b in seen[:i])


def test_a_hook_inside_a_layer_still_runs():
    model = lora_model()
    calls = []
    stack, _ = find_stack(model)
    stack.layers[1].mlp.up_proj.register_forward_hook(lambda *args: calls.append(1))
    plan = route(model)
    assert plan.counts == {"reference": 3}  # the hook may look at the rows of the batch
    model(input_ids=batch(), use_cache=False)
    assert calls == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_error_is_no_larger_than_the_reference_s(dtype):
    """Over 18 models; in a single one a near-tie of attention decides which of two equal roundings looks better: one or
    two of 36 exceed FACTOR."""
    logs = []
    for seed in range(18):
        truth = logits_and_gradients(lora_model(seed=seed).double(), input_ids=batch(seed=seed))
        model = lora_model(seed=seed, dtype=dtype)
        with torch.autocast("cpu", dtype):  # as every 16-bit trainer runs it
            plain = logits_and_gradients(model, input_ids=batch(seed=seed))
            route(model)
            found = logits_and_gradients(model, input_ids=batch(seed=seed))
        ratios = [relative_error(found[n], truth[n]) / relative_error(plain[n], truth[n]) for n in truth]
        logs.append(sum(math.log(ratio) for ratio in ratios) / len(ratios))
    assert sorted(logs)[-3] < math.log(FACTOR) and sum(logs) / len(logs) < math.log(0.95), [math.exp(x) for x in logs]


def test_a_backward_inside_autocast_is_the_same():
    """Left inside by a loop of one's own: nothing of it is cast."""
    found = []
    for enabled in (False, True):
        model = lora_model(dtype=torch.bfloat16)
        assert route(model).counts == {"fused layer": 3}
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch(), use_cache=False).logits.square().mean()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0] and all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


def test_a_weight_that_is_stored_transposed():
    """Its rows are not contiguous, which kernels that copy rows must not take for granted."""
    model = lora_model()
    right = logits_and_gradients(model, input_ids=batch())
    stack, _ = find_stack(model)
    for layer in stack.layers:
        weight = layer.mlp.up_proj.base_layer.weight
        weight.data = weight.data.t().contiguous().t()
    assert route(model).counts == {"fused layer": 3}
    with backend.use("triton"):
        found = logits_and_gradients(model, input_ids=batch())
    assert worst({name: relative_error(found[name], right[name]) for name in right})[1] < 1e-4


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_an_adapter_that_changed_before_the_backward_is_refused(part, fused):
    """As torch does: the gradient would be that of neither the old weights nor the new ones."""
    model = lora_model()
    if fused:
        assert route(model).counts == {"fused layer": 3}
    model(input_ids=batch(), use_cache=False).logits.sum().backward()  # untouched, it runs
    loss = model(input_ids=batch(), use_cache=False).logits.sum()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
