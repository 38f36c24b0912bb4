"""Routing changes one model instance and nothing else: taken off it leaves no trace, and on it nobody else sees it."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2ForSequenceClassification, Qwen2Model
from transformers.models.qwen2 import modeling_qwen2

from qwen2tool.errors import UserError
from qwen2tool.routing import stack as stack_module
from qwen2tool.routing.plan import find_stack, plan_routes
from qwen2tool.routing.stack import RoutedStack
from qwen2tool.routing.swap import route, unroute
from tests.routing.models import batch, fill_adapters, logits_and_gradients, lora_model, padding
from tests.tiny import tiny_config, tiny_model
from tests.tolerances import relative_error

CLOSE = 1e-5
"""fp32 against fp32 in another order of sums."""
CLOSE_GRADIENT = 1e-3
"""The same where near-ties of attention amplify it: 1e-4 is seen."""


def plain_model(**changes):
    return tiny_model(**changes).requires_grad_(False)


KINDS = {
    "plain": plain_model,
    "tied": lambda: plain_model(tie_word_embeddings=True),
    "lora": lora_model,
    "everything": lambda: lora_model(modules_to_save=["norm", "embed_tokens"], use_dora=True, lora_bias=False),
}


def identities(model):
    """Every module, parameter and buffer by name, as objects."""
    parts = (model.named_modules(), model.named_parameters(), model.named_buffers())
    return [(name, id(thing)) for part in parts for name, thing in part]


@pytest.mark.parametrize("kind", KINDS)
def test_unroute_restores_the_very_same_objects(kind):
    model = KINDS[kind]()
    before, attributes = identities(model), {id(m): sorted(vars(m)) for m in model.modules()}
    stack, _ = find_stack(model)
    route(model)
    assert isinstance(find_stack(model)[0], RoutedStack) and identities(model) != before
    model.train()
    model(input_ids=batch(), use_cache=False)
    unroute(model)
    assert find_stack(model)[0] is stack
    assert identities(model) == before
    assert {id(m): sorted(vars(m)) for m in model.modules()} == attributes


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_set_while_routed_stays(training):
    model = lora_model().train(not training)
    route(model)
    assert find_stack(model)[0].training != training
    model.train(training)
    unroute(model)
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_keys_order_and_storage(kind):
    model = KINDS[kind]()

    def seen():
        return [(name, tensor.data_ptr()) for name, tensor in model.state_dict().items()]

    before, names = seen(), [name for name, _ in model.named_parameters()]
    route(model)
    assert seen() == before and [name for name, _ in model.named_parameters()] == names
    assert [n for n, m in model.named_modules()] == [n for n, m in KINDS[kind]().named_modules()]
    with torch.no_grad():
        next(model.parameters()).data = next(model.parameters()).data.clone()
    assert seen() != before


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", KINDS)
def test_saved_files_are_the_same_bytes(kind, tmp_path):
    model = KINDS[kind]()
    model.save_pretrained(tmp_path / "before")
    route(model)
    model(input_ids=batch(), use_cache=False)
    model.save_pretrained(tmp_path / "routed")
    if hasattr(model, "peft_config"):
        model.get_base_model().save_pretrained(tmp_path / "routed base")
        unroute(model)
        model.get_base_model().save_pretrained(tmp_path / "base")
        assert digests(tmp_path / "base") == digests(tmp_path / "routed base")
        route(model)
    assert digests(tmp_path / "before") == digests(tmp_path / "routed")
    assert any(name.endswith(".safetensors") for name in digests(tmp_path / "routed"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad] or list(model.parameters())
    trained[-1].data.view(-1)[0] += 1
    model.save_pretrained(tmp_path / "changed")
    assert digests(tmp_path / "changed") != digests(tmp_path / "routed")


def process_wide():
    """What a library could leave behind: attributes of classes, functions of modules, switches of torch."""
    import peft.tuners.lora.bnb
    import peft.tuners.lora.layer
    import transformers.integrations.sdpa_attention
    import transformers.modeling_utils

    modules = (modeling_qwen2, peft.tuners.lora.layer, peft.tuners.lora.bnb, transformers.modeling_utils, torch.nn)
    modules += (transformers.integrations.sdpa_attention, torch.nn.functional)
    places = {cls.__qualname__: cls for module in modules for _, cls in inspect.getmembers(module, inspect.isclass)}
    places |= {module.__name__: module for module in modules}
    found = {(place, name): id(value) for place, thing in places.items() for name, value in vars(thing).items()}
    cuda = torch.backends.cuda
    switches = (cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled, cuda.cudnn_sdp_enabled)
    return found | {("torch", switch.__name__): switch() for switch in switches}


def test_a_second_model_in_the_process_is_as_before(monkeypatch):
    other = lora_model(seed=3)
    expected = logits_and_gradients(other, input_ids=batch(), attention_mask=padding("left"))
    logits_and_gradients(lora_model(use_dora=True), input_ids=batch())  # what transformers and PEFT do lazily is done
    before = process_wide()
    for model in (lora_model(), lora_model(use_dora=True)):
        route(model)
        logits_and_gradients(model, input_ids=batch(), attention_mask=padding("left"))
    after = process_wide()
    assert {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} == set()
    found = logits_and_gradients(other, input_ids=batch(), attention_mask=padding("left"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    fresh = logits_and_gradients(lora_model(seed=3), input_ids=batch(), attention_mask=padding("left"))
    assert all(torch.equal(fresh[name], expected[name]) for name in expected)
    monkeypatch.setattr(modeling_qwen2.Qwen2MLP, "forward", lambda self, x: x)
    assert process_wide() != before


def test_route_and_unroute_twice():
    model = lora_model()
    with pytest.raises(UserError, match="not routed"):
        unroute(model)
    route(model)
    with pytest.raises(UserError, match="routed already"):
        route(model)
    unroute(model)
    with pytest.raises(UserError, match="not routed"):
        unroute(model)
    route(model)


def test_what_is_no_qwen2_is_refused_untouched():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=100, num_hidden_layers=2, num_attention_heads=4, vocab_size=384
    )
    llama = LlamaForCausalLM(config)
    before = identities(llama)
    for function in (plan_routes, route, unroute):
        with pytest.raises(UserError, match="'llama'"):
            function(llama)
    assert identities(llama) == before
    with pytest.raises(UserError, match="holds no Qwen2"):
        route(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="bare Qwen2Model"):
        route(plain_model().model)

    class Other(Qwen2Model):
        pass

    model = plain_model()
    model.model.__class__ = Other
    with pytest.raises(UserError, match="a Other"):
        route(model)


def test_a_classifier_is_routed_too():
    model = Qwen2ForSequenceClassification(tiny_config(num_labels=3, pad_token_id=0)).requires_grad_(False)
    plain = model(input_ids=batch(), use_cache=False).logits
    assert route(model).counts == {"fused layer": 3}
    assert relative_error(model(input_ids=batch(), use_cache=False).logits, plain) < CLOSE


@pytest.fixture
def fused(monkeypatch):
    """The calls of `fused_layer`: (layer, keep)."""
    calls, real = [], stack_module.fused_layer

    def spy(x, spec, *arguments, **options):
        calls.append((spec.index, options["keep"]))
        return real(x, spec, *arguments, **options)

    monkeypatch.setattr(stack_module, "fused_layer", spy)
    return calls


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", ["plain", "lora", "everything"])
def test_generate_gives_the_same_tokens(kind, use_cache, fused):
    model = KINDS[kind]().eval()
    options = {"max_new_tokens": 16, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0, "eos_token_id": 383}
    inputs = {"input_ids": batch(), "attention_mask": padding("left")}
    plain = model.generate(**inputs, **options)
    plan = route(model)
    assert torch.equal(model.generate(**inputs, **options), plain)
    assert bool(fused) == (not use_cache and "fused layer" in plan.counts)
    assert len({tuple(row) for row in plain[:, 17:].tolist()}) == 3, "three prompts, three answers"
    other = model.generate(input_ids=inputs["input_ids"], attention_mask=padding("right"), **options)
    assert not torch.equal(other, plain)


def test_an_eval_pass_fills_a_cache_and_goes_on_from_it():
    model = lora_model().eval()
    plain = model(input_ids=batch())
    route(model)
    routed = model(input_ids=batch())
    assert torch.equal(routed.logits, plain.logits)
    step = model(input_ids=batch(3, 1), past_key_values=routed.past_key_values).logits
    whole = model(input_ids=torch.cat([batch(), batch(3, 1)], 1)).logits[:, -1:]
    assert relative_error(step, whole) < CLOSE < relative_error(model(input_ids=batch(3, 1)).logits, whole)


def test_a_cache_that_is_asked_for_in_training_is_given(fused):
    model = lora_model()
    route(model)
    assert model(input_ids=batch(), use_cache=True).past_key_values is not None and not fused
    assert model(input_ids=batch()).past_key_values is None and fused


def test_gradient_checkpointing_changes_what_is_kept_and_no_gradient(fused):
    model = lora_model(modules_to_save=["lm_head"])
    route(model)
    kept = logits_and_gradients(model, input_ids=batch())
    assert fused == [(index, "all") for index in range(3)]
    fused.clear()
    model.gradient_checkpointing_enable()
    recomputed = logits_and_gradients(model, input_ids=batch())
    assert fused == [(index, "input") for index in range(3)]
    assert kept.keys() == recomputed.keys()
    assert max(relative_error(recomputed[name], kept[name]) for name in kept) < 1e-6
    unroute(model)
    stock = logits_and_gradients(model, input_ids=batch())
    assert max(relative_error(recomputed[name], stock[name]) for name in kept) < CLOSE_GRADIENT
    route(model)
    fused.clear()
    model.gradient_checkpointing_disable()
    logits_and_gradients(model, input_ids=batch())
    assert fused == [(index, "all") for index in range(3)]


def test_an_adapter_for_each_row():
    model = lora_model()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    fill_adapters(model)
    inputs = {"input_ids": batch(), "adapter_names": ["default", "other", "__base__"], "use_cache": False}
    plain = model.eval()(**inputs).logits
    route(model)
    assert torch.equal(model(**inputs).logits, plain)
    assert not torch.allclose(model(**(inputs | {"adapter_names": ["other", "default", "__base__"]})).logits, plain)
    assert plan_routes(model).counts == {"fused layer": 3}, "PEFT's hooks are gone after the pass"


def test_activated_lora_is_left_to_transformers():
    """Its adapter starts at a token of each row, so that it needs the rows."""
    model, ids = lora_model(alora_invocation_tokens=[5, 6]), batch()
    ids[:, 8:10] = torch.tensor([5, 6])
    plain = model(input_ids=ids, use_cache=False).logits
    assert route(model).counts == {"reference": 3}
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)


def test_hidden_states_asked_for_once_do_not_keep_the_fast_path_away(fused):
    model = lora_model()
    route(model)
    assert len(model(input_ids=batch(), output_hidden_states=True).hidden_states) == 4 and not fused
    assert plan_routes(model).counts == {"fused layer": 3}
    model(input_ids=batch())
    assert len(fused) == 3


@pytest.mark.parametrize("where", ["", "norm", "rotary_emb", "layers.1", "layers.2.mlp.act_fn"])
def test_a_hook_runs_once_and_sees_the_batch(where, fused):
    model, shapes = lora_model(), []
    handle = (
        find_stack(model)[0]
        .get_submodule(where)
        .register_forward_hook(
            lambda module, inputs, output: shapes.append([t.shape for t in inputs if isinstance(t, torch.Tensor)])
        )
    )
    model(input_ids=batch(), attention_mask=padding("left"), use_cache=False)
    assert route(model).counts == {"reference": 3}
    model(input_ids=batch(), attention_mask=padding("left"), use_cache=False)
    assert len(shapes) == 2 and shapes[0] == shapes[1] and not fused
    handle.remove()
    assert plan_routes(model).counts == {"fused layer": 3}
    model(input_ids=batch(), use_cache=False)
    assert len(shapes) == 2 and len(fused) == 3


def test_a_hook_that_steers_the_last_token_of_each_row_steers_it():
    def steer(module, inputs, output):
        return torch.cat([output[:, :-1], output[:, -1:] + 5], 1)

    model = lora_model()
    straight = model(input_ids=batch(), use_cache=False).logits
    find_stack(model)[0].layers[1].register_forward_hook(steer)
    steered = model(input_ids=batch(), use_cache=False).logits
    route(model)
    assert torch.equal(model(input_ids=batch(), use_cache=False).logits, steered)
    assert relative_error(straight, steered) > 0.01


def test_weights_that_accelerate_brings_in_piece_by_piece():
    model = lora_model().eval()
    plain = model(input_ids=batch(), use_cache=False).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert find_stack(model)[0].norm.weight.is_meta
    assert route(model).counts == {"reference": 3}
    assert relative_error(model(input_ids=batch(), use_cache=False).logits, plain) < CLOSE


@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_whatever_attention_the_config_names(attention, side):
    model = lora_model(use_dora=True, layers_to_transform=[1])
    model.config._attn_implementation = attention
    mask = torch.ones(3, 17, dtype=torch.int64) if side is None else padding(side)
    plain = logits_and_gradients(model, input_ids=batch(), attention_mask=mask)
    route(model)
    found = logits_and_gradients(model, input_ids=batch(), attention_mask=mask)
    assert max(relative_error(found[name], plain[name]) for name in plain) < CLOSE


def test_modules_exchanged_after_routing_are_exchanged_everywhere():
    model = plain_model()
    route(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    fill_adapters(adapted)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1)
    cached, uncached = (adapted.eval()(input_ids=batch(), use_cache=cache).logits for cache in (True, False))
    assert relative_error(uncached, cached) < CLOSE
    with adapted.disable_adapter():
        assert relative_error(adapted(input_ids=batch()).logits, cached) > 0.1
    resized = plain_model()
    route(resized)
    resized.resize_token_embeddings(400, mean_resizing=False)
    unroute(resized)
    assert resized.model.embed_tokens.weight.shape[0] == resized.get_input_embeddings().weight.shape[0] == 400


def test_the_inner_model_answers_as_a_tuple_where_asked():
    model = lora_model()
    plain = find_stack(model)[0](input_ids=batch(), use_cache=False, return_dict=False)
    route(model)
    found = find_stack(model)[0](input_ids=batch(), use_cache=False, return_dict=False)
    assert type(found) is type(plain) is tuple and torch.equal(found[0], plain[0])
