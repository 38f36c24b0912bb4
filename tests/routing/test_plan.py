"""A plan is true: what it calls fused is never called as a module, and what it calls reference is."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import BitsAndBytesConfig, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.load import load_model, quiet_transformers
from qwen2tool.routing import stack as stack_module
from qwen2tool.routing.plan import RoutePlan, find_stack, plan_routes
from qwen2tool.routing.swap import route, unroute
from tests.routing.models import batch, fill_adapters, logits_and_gradients, lora_model, padding
from tests.tiny import TARGETS, tiny_model
from tests.tolerances import relative_error

CLOSE = 1e-3
"""fp32 gradients against fp32 in another order of sums, amplified by near-ties of attention: 1e-4 is seen."""


def with_other(kind, **changes):
    """A second adapter on layer 1 alone, both active."""
    model = lora_model(layers_to_transform=[0, 2], target_modules=["q_proj", "up_proj"])
    model.add_adapter(kind, LoraConfig(r=2, target_modules=["k_proj"], layers_to_transform=[1], **changes))
    fill_adapters(model)
    model.base_model.set_adapter(["default", kind])
    return model.train()


def hooked(where):
    model = lora_model()
    find_stack(model)[0].get_submodule(where).register_forward_hook(lambda *_: None)
    return model


def other_activation(module):
    model = lora_model()
    find_stack(model)[0].layers[1].mlp.act_fn = module
    return model


def replaced():
    model = lora_model()
    mlp = find_stack(model)[0].layers[2].mlp
    mlp.forward = mlp.forward
    return model


def disabled():
    model = lora_model(use_dora=True)
    model.base_model.disable_adapter_layers()
    return model


def merged():
    model = lora_model()
    model.merge_adapter()
    return model


def ia3():
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    return get_peft_model(tiny_model(), config).train()


def trained(part):
    model = lora_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or part in name)
    return model


FUSED, REFERENCE = "fused layer", "reference"
MODELS = {
    "plain": (lambda: tiny_model().requires_grad_(False), {FUSED: 3}),
    "full fine-tuning": (tiny_model, {REFERENCE: 3}),
    "lora": (lora_model, {FUSED: 3}),
    "lora in eval": (lambda: lora_model(dropout=0.1).eval(), {FUSED: 3}),
    "rslora on two": (lambda: lora_model(use_rslora=True, target_modules=["q_proj", "down_proj"]), {FUSED: 3}),
    "dora": (lambda: lora_model(use_dora=True), {REFERENCE: 3}),
    "dora on one layer": (lambda: with_other("dora", use_dora=True), {FUSED: 2, REFERENCE: 1}),
    "lora_bias on one layer": (lambda: with_other("biased", lora_bias=True), {FUSED: 2, REFERENCE: 1}),
    "two adapters": (lambda: with_other("plain"), {FUSED: 3}),
    "dora switched off": (disabled, {FUSED: 3}),
    "merged": (merged, {FUSED: 3}),
    "bias all": (lambda: lora_model(bias="all"), {REFERENCE: 3}),
    "a trained k bias": (lambda: trained("1.self_attn.k_proj.base_layer.bias"), {FUSED: 2, REFERENCE: 1}),
    "trained norms": (lambda: trained("norm"), {FUSED: 3}),
    "a saved linear": (lambda: lora_model(modules_to_save=["o_proj"], target_modules=["q_proj"]), {REFERENCE: 3}),
    "a saved last norm": (lambda: lora_model(modules_to_save=["model.norm"]), {FUSED: 3}),
    "a saved norm in each layer": (lambda: lora_model(modules_to_save=["input_layernorm"]), {REFERENCE: 3}),
    "adapters on table and head": (lambda: lora_model(target_modules=["embed_tokens", "lm_head"]), {FUSED: 3}),
    "trained tokens": (lambda: lora_model(trainable_token_indices=[1, 2]), {FUSED: 3}),
    "ia3": (ia3, {REFERENCE: 3}),
    "attention dropout": (lambda: lora_model(config={"attention_dropout": 0.1}), {REFERENCE: 3}),
    "sliding": (lambda: lora_model(config={"use_sliding_window": True, "sliding_window": 5}), {FUSED: 1, REFERENCE: 2}),
    "gelu": (lambda: lora_model(config={"hidden_act": "gelu"}), {REFERENCE: 3}),
    "another activation": (lambda: other_activation(torch.nn.Sigmoid()), {FUSED: 2, REFERENCE: 1}),
    "torch's own silu": (lambda: other_activation(torch.nn.SiLU()), {FUSED: 3}),
    "a hook in a linear": (lambda: hooked("layers.1.mlp.up_proj"), {REFERENCE: 3}),
    "a hook in LoRA": (lambda: hooked("layers.1.mlp.up_proj.lora_A.default"), {REFERENCE: 3}),
    "a hook in dropout": (lambda: hooked("layers.1.mlp.up_proj.lora_dropout.default"), {REFERENCE: 3}),
    "a hook in an activation": (lambda: hooked("layers.2.mlp.act_fn"), {REFERENCE: 3}),
    "a hook on a layer": (lambda: hooked("layers.0"), {REFERENCE: 3}),
    "a hook on the last norm": (lambda: hooked("norm"), {REFERENCE: 3}),
    "a hook on RoPE": (lambda: hooked("rotary_emb"), {REFERENCE: 3}),
    "a replaced forward": (replaced, {REFERENCE: 3}),
}  # fmt: skip


@contextmanager
def called(model):
    """The names of the modules whose forward is called, by torch's own hook on all modules."""
    names, seen = {id(module): name for name, module in model.named_modules()}, set()
    register = torch.nn.modules.module.register_module_forward_pre_hook
    handle = register(lambda module, _: seen.add(names.get(id(module), "")))
    try:
        yield seen
    finally:
        handle.remove()


def untruths(plan, seen):
    """Modules that ran otherwise than the plan says; the head is apart, since a stock loss wants its logits."""
    routes = [route for route in plan.routes if not route.module.endswith("lm_head")]
    return [route for route in routes if (route.module in seen) != (route.implementation == REFERENCE)]


def reason_of(plan, name):
    return next(r.reason for r in plan.routes if r.module.endswith(name))


@pytest.mark.parametrize("name", MODELS)
def test_every_module_runs_as_the_plan_says(name, monkeypatch):
    make, counts = MODELS[name]
    model, indices = make(), []
    real = stack_module.fused_layer
    monkeypatch.setattr(
        stack_module, "fused_layer", lambda x, spec, *a, **k: indices.append(spec.index) or real(x, spec, *a, **k)
    )
    before = plan_routes(model)
    plan = route(model)
    assert plan == before == plan_routes(model) and plan.counts == counts
    with called(model) as seen:
        model(input_ids=batch(), attention_mask=padding("left"), use_cache=False)
    assert untruths(plan, seen) == []
    layers = [r for r in plan.routes if r.module.rpartition(".")[2].isdigit()]
    assert indices == [index for index, layer in enumerate(layers) if layer.implementation == FUSED]
    assert all(r.reason for r in plan.routes)


def test_an_untrue_plan_is_found():
    model, other = lora_model(), lora_model(use_dora=True)
    claimed, honest = plan_routes(model), plan_routes(other)
    route(other)
    with called(other) as seen:
        other(input_ids=batch(), use_cache=False)
    assert len(untruths(claimed, seen)) == 3 * 8 and untruths(honest, seen) == []


FROZEN = ("plain", "dora switched off")


@pytest.mark.parametrize("name", [name for name in MODELS if name not in FROZEN])
def test_no_gradient_is_lost_on_any_route(name):
    model = MODELS[name][0]().eval()  # no dropout
    if name == "merged":
        model.get_base_model().lm_head.weight.requires_grad_(True)
    inputs = {"input_ids": batch(), "attention_mask": padding("right")}
    plain = logits_and_gradients(model, **inputs)
    route(model)
    found = logits_and_gradients(model, **inputs)
    assert found.keys() == plain.keys() and len(plain) > 1
    assert all(relative_error(found[key], plain[key]) < CLOSE for key in plain if plain[key].any())
    assert not any(found[key].any() for key in plain if not plain[key].any())


def test_a_sliding_layer_really_slides():
    """Layer 0 sees all, layers 1 and 2 see 5 tokens; a window that is ignored would show."""
    config = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5}
    model = lora_model(config=config)
    plan = plan_routes(model)
    assert [r.implementation for r in plan.routes if r.module[-1].isdigit()] == [FUSED, REFERENCE, REFERENCE]
    assert "slides over a window" in reason_of(plan, "layers.2")
    for mask in (None, padding("left")):
        inputs = {"input_ids": batch()} | ({} if mask is None else {"attention_mask": mask})
        plain = logits_and_gradients(model, **inputs)
        routed = lora_model(config=config)
        route(routed)
        found = logits_and_gradients(routed, **inputs)
        assert all(relative_error(found[name], plain[name]) < CLOSE for name in plain)
    wide = logits_and_gradients(lora_model(), input_ids=batch())
    assert relative_error(wide["logits"], logits_and_gradients(model, input_ids=batch())["logits"]) > 0.1


def adapted(base):
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, target_modules=list(TARGETS), task_type="CAUSAL_LM"))
    fill_adapters(model)
    return model.train()


def quantised(folder, **options):
    config = BitsAndBytesConfig(**options)
    with quiet_transformers():
        return Qwen2ForCausalLM.from_pretrained(
            folder, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
        )


FOUR_BIT = {
    "nf4 double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
}


def agree(model):
    """The plan, having checked that routed and unrouted are one function and the plan is true."""
    plain = logits_and_gradients(model, input_ids=batch())
    plan = route(model)
    with called(model) as seen:
        found = logits_and_gradients(model, input_ids=batch())
    assert untruths(plan, seen) == []
    assert all(relative_error(found[name], plain[name]) < CLOSE for name in plain) and len(plain) == 43
    return plan


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_a_4_bit_base_is_fused(kind, base_folder):
    model = adapted(quantised(base_folder, load_in_4bit=True, **FOUR_BIT[kind]))
    plan = agree(model)
    assert plan.counts == {FUSED: 3}
    assert all("4-bit base, LoRA rank 4" in r.reason for r in plan.routes if r.module.endswith("_proj"))
    dense = adapted(load_model(open_checkpoint(base_folder), dtype="float32"))
    logits = [m(input_ids=batch(), use_cache=False).logits for m in (dense, model)]
    assert relative_error(logits[1], logits[0]) > 0.01, "quantisation shows, so a dense weight in its place would"


def test_an_8_bit_base_goes_by_reference(base_folder):
    plan = agree(adapted(quantised(base_folder, load_in_8bit=True)))
    assert plan.counts == {REFERENCE: 3}
    assert "Linear8bitLt" in reason_of(plan, "layers.1")


def test_a_4_bit_weight_that_is_not_there_yet_is_not_called_fused(base_folder):
    model = adapted(quantised(base_folder, load_in_4bit=True, **FOUR_BIT["nf4"]))
    find_stack(model)[0].layers[1].mlp.up_proj.base_layer.weight.quant_state = None
    plan = plan_routes(model)
    assert plan.counts == {FUSED: 2, REFERENCE: 1} and any("not quantised yet" in r.reason for r in plan.routes)


def test_a_4_bit_weight_repacked_for_cpus_goes_by_reference(base_folder):
    model = adapted(quantised(base_folder, load_in_4bit=True, **FOUR_BIT["nf4"]))
    find_stack(model)[0].layers[0].self_attn.q_proj.base_layer.weight.quant_state.packing_format_for_cpu = True
    plan = plan_routes(model)
    assert plan.counts == {FUSED: 2, REFERENCE: 1} and any("repacked" in r.reason for r in plan.routes)


def test_reasons_say_rank_dropout_bias_and_dtype():
    model = lora_model(dropout=0.05, rank_pattern={"k_proj": 3}, target_modules=["q_proj", "k_proj", "up_proj"])
    plan = plan_routes(model.to(torch.bfloat16))
    assert reason_of(plan, "0.self_attn.q_proj") == ("bfloat16 base, LoRA rank 4, dropout 0.05, bias in fp32 with RoPE")
    assert "LoRA rank 3" in reason_of(plan, "2.self_attn.k_proj")
    assert reason_of(plan, "0.self_attn.v_proj") == "bfloat16 base, no adapter, bias in the product"
    assert reason_of(plan, "1.mlp.gate_proj") == "bfloat16 base, no adapter"
    model.add_adapter("other", LoraConfig(r=2, lora_dropout=0.05, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    assert "LoRA rank 4+2" in reason_of(plan_routes(model), "0.self_attn.q_proj")
    model.base_model.set_adapter("other")
    assert "LoRA rank 2" in reason_of(plan_routes(model), "0.self_attn.q_proj")
    assert "no adapter" in reason_of(plan_routes(model), "0.self_attn.k_proj")


HEADS = {
    "plain": (lora_model, "kernel"),
    "adapted": (lambda: lora_model(target_modules=["q_proj", "lm_head"]), REFERENCE),
    "saved": (lambda: lora_model(modules_to_save=["lm_head"]), REFERENCE),
    "trained": (lambda: trained("lm_head"), REFERENCE),
}


@pytest.mark.parametrize("kind", HEADS)
def test_the_head_of_a_training_pass(kind):
    """Our trainer asks for log-probabilities, and calls the head only where the plan says so."""
    from qwen2tool.training.forward import log_probs

    make, implementation = HEADS[kind]
    model = make()
    plan = route(model)
    head = plan.routes[-1]
    assert head.module.endswith("lm_head") and head.implementation == implementation
    ids = batch(1, 12)[0]
    packed = {
        "input_ids": ids, "positions": torch.arange(12), "offsets": torch.tensor([0, 12], dtype=torch.int32),
        "longest": 12, "rows": torch.arange(11),
    }  # fmt: skip
    with called(model) as seen:
        found = log_probs(model, packed, ids[1:])
    assert (head.module in seen) == (implementation == REFERENCE)
    truth = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    assert relative_error(found, truth.gather(1, ids[1:, None])[:, 0]) < 1e-5


def test_prompt_tuning_touches_no_module():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(tiny_model(), config).train()
    plain = logits_and_gradients(model, input_ids=batch())
    assert route(model).counts == {FUSED: 3}
    found = logits_and_gradients(model, input_ids=batch())
    assert found.keys() == plain.keys() and len(plain) == 2
    assert all(relative_error(found[name], plain[name]) < CLOSE for name in plain)


def test_a_plan_may_leave_layers_to_transformers(monkeypatch):
    """Changed as data and given to `route`: that layer is transformers' own, the others fused, the function stays."""
    model, calls = lora_model(), []
    wanted = logits_and_gradients(model, input_ids=batch())
    routes = plan_routes(model).routes
    routes = [replace(r, implementation="reference") if r.module.endswith("layers.1") else r for r in routes]
    forward = Qwen2DecoderLayer.forward

    def counted(layer, *arguments, **options):
        calls.append(1)
        return forward(layer, *arguments, **options)

    monkeypatch.setattr(Qwen2DecoderLayer, "forward", counted)
    plan = route(model, RoutePlan(tuple(routes)))
    assert plan.counts == {"fused layer": 2, "reference": 1} and plan.left == {1}
    assert {r.reason for r in plan.routes if "layers.1" in r.module} == {"asked for"}
    found = logits_and_gradients(model, input_ids=batch())
    assert calls == [1]
    assert max(relative_error(found[name], wanted[name]) for name in wanted) < CLOSE
    unroute(model)
    assert route(model).counts == {"fused layer": 3}
