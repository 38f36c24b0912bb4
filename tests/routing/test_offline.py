"""The plan that is made of configs alone is the plan of the model once it is loaded; what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, Qwen2ForCausalLM

from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.load import load_model, quiet_transformers
from qwen2tool.errors import UserError
from qwen2tool.routing.offline import _training_model, meta_model, plan_checkpoint, plan_checkpoint_memory
from qwen2tool.routing.plan import plan_routes
from qwen2tool.routing.sizes import measure
from tests.checkpoint.edits import drop, edit_config
from tests.checkpoint.files import edit_json
from tests.tiny import write_adapter, write_tiny

ADAPTER = "adapter_model.safetensors"


def loaded(base, adapter=None, *, nf4=False):
    """The model as training has it, in the checkpoint's own dtype."""
    model = load_model(open_checkpoint(base), dtype="bfloat16", nf4=nf4).requires_grad_(False)
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter, is_trainable=True)).train()


ADAPTERS = {
    "all seven": {"lora_dropout": 0.05},
    "rslora, patterns": {"use_rslora": True, "rank_pattern": {"k_proj": 3}, "target_modules": ["q_proj", "k_proj"]},
    "dora": {"use_dora": True},
    "trained biases": {"bias": "all"},
    "its own biases": {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    "one layer": {"layers_to_transform": [2]},
    "saved norm and head": {"modules_to_save": ["model.norm", "lm_head"]},
    "table and head": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "trained tokens": {"trainable_token_indices": [1, 5]},
    "activated": {"alora_invocation_tokens": [5, 6]},
}


@pytest.mark.parametrize("nf4", [False, True], ids=["16bit", "nf4"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_plan_is_that_of_the_loaded_model(kind, nf4, base_folder, tmp_path):
    write_adapter(tmp_path / "adapter", base_folder, **ADAPTERS[kind])
    offline = plan_checkpoint(open_checkpoint(base_folder), tmp_path / "adapter", nf4=nf4)
    assert offline == plan_routes(loaded(base_folder, tmp_path / "adapter", nf4=nf4))
    assert ("4-bit base" in str(offline)) == (nf4 and "fused layer" in offline.counts)


@pytest.mark.parametrize("nf4", [False, True], ids=["16bit", "nf4"])
def test_the_plan_without_an_adapter(nf4, base_folder):
    offline = plan_checkpoint(open_checkpoint(base_folder), nf4=nf4)
    assert offline == plan_routes(loaded(base_folder, nf4=nf4)) and offline.counts == {"fused layer": 3}
    assert offline != plan_checkpoint(open_checkpoint(base_folder), nf4=not nf4)


GEOMETRIES = {
    "sliding": ({"use_sliding_window": True, "sliding_window": 8}, {"fused layer": 1, "reference": 2}),
    "tied": ({"tie_word_embeddings": True}, {"fused layer": 3}),
    "gelu": ({"hidden_act": "gelu"}, {"reference": 3}),
    "attention dropout": ({"attention_dropout": 0.1}, {"reference": 3}),
}  # fmt: skip


@pytest.mark.parametrize("kind", GEOMETRIES)
def test_what_the_config_decides(kind, tmp_path):
    changes, counts = GEOMETRIES[kind]
    base = write_tiny(tmp_path / "base", **changes)
    offline = plan_checkpoint(open_checkpoint(base))
    assert offline.counts == counts and offline == plan_routes(loaded(base))


STORED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4, one linear kept": {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp.up_proj"]},
}


@pytest.mark.parametrize("kind", STORED)
def test_a_checkpoint_that_is_stored_in_4_bits(kind, base_folder, tmp_path):
    options = {"device_map": {"": "cpu"}, "dtype": torch.bfloat16}
    with quiet_transformers():
        model = Qwen2ForCausalLM.from_pretrained(
            base_folder, quantization_config=BitsAndBytesConfig(**STORED[kind]), **options
        )
        model.save_pretrained(tmp_path / "base")
        model = Qwen2ForCausalLM.from_pretrained(tmp_path / "base", **options).requires_grad_(False).train()
    offline = plan_checkpoint(open_checkpoint(tmp_path / "base"))
    assert offline == plan_routes(model) and offline.counts == {"fused layer": 3}
    proj = [r.reason.split(",")[0] for r in offline.routes if r.module.endswith("_proj")]
    assert proj.count("4-bit base") == 21 - ("kept" in kind)
    with pytest.raises(UserError, match=r"already quantised\. Leave out --quantize"):
        plan_checkpoint(open_checkpoint(tmp_path / "base"), nf4=True)


def test_nothing_is_on_a_real_device(base_folder):
    model = meta_model(open_checkpoint(base_folder), nf4=True)
    assert {t.device.type for t in model.parameters()} == {"meta"}
    assert not any(p.requires_grad for p in model.parameters()) and model.training


def refused(base, adapter=None, *words):
    with pytest.raises(UserError) as caught:
        plan_checkpoint(open_checkpoint(base), adapter)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text
    return caught.value


def test_bases_that_are_refused(base_copy, tmp_path):
    edit_config(base_copy, quantization_config={"quant_method": "gptq", "bits": 4})
    assert refused(base_copy, None, "quantised by 'gptq'").exit_code == 2
    edit_config(base_copy, quantization_config=None, hidden_act="swosh")
    assert refused(base_copy, None, "config.json", "swosh").exit_code == 2
    edit_config(base_copy, hidden_act="silu")
    plan_checkpoint(open_checkpoint(base_copy))
    drop(base_copy, "model.layers.1.self_attn.k_proj.bias")
    assert refused(base_copy, None, "1 of 9 q/k/v biases are missing").exit_code == 1
    edit_config(base_copy, model_type="llama")
    assert refused(base_copy, None, "model_type is 'llama'").exit_code == 2


def copy_of(adapter, target, config=None, tensors=None):
    shutil.copytree(adapter, target)
    edit_json(target / "adapter_config.json", **(config or {}))
    if tensors is not None:
        found = load_file(target / ADAPTER)
        tensors(found)
        save_file(found, target / ADAPTER, metadata={"format": "pt"})
    return target


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
MISFITS = {
    "no adapter": ({}, None, "not a PEFT adapter"),
    "other targets": ({"target_modules": ["c_attn"]}, None, "c_attn"),
    "fewer targets": ({"target_modules": ["q_proj"]}, None, "for which the base has no place"),
    "another rank": ({"r": 5}, None, "has shape [4, 100], this base asks for [5, 100]"),
    "a tensor less": ({}, lambda found: found.pop(Q0), f"no {Q0}"),
    "a tensor more": ({}, lambda found: found.update({"what": torch.zeros(2)}), "holds what"),
    "no method": ({"peft_type": "NONSENSE"}, None, "PEFT cannot put this adapter on the base"),
    "prompts": ({"peft_type": "PROMPT_TUNING"}, None, "changes the input"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_adapters_that_do_not_fit(kind, base_folder, adapter_folder, tmp_path):
    config, tensors, words = MISFITS[kind]
    adapter = copy_of(adapter_folder, tmp_path / "adapter", config, tensors)
    if kind == "no adapter":
        (adapter / "adapter_config.json").unlink()
    error = refused(base_folder, adapter, str(adapter), words)
    assert error.exit_code == 2
    plan_checkpoint(open_checkpoint(base_folder), adapter_folder)


def test_an_adapter_of_another_geometry(adapter_folder, tmp_path):
    other = write_tiny(tmp_path / "other", hidden_size=32)
    refused(other, adapter_folder, "has shape", "this base asks for")
    shallow = write_tiny(tmp_path / "shallow", num_hidden_layers=2)
    refused(shallow, adapter_folder, "layers.2.", "for which the base has no place")


def test_an_adapter_config_alone_is_enough(base_folder, adapter_folder, tmp_path):
    """A plan before there is anything to load; settings that would decompose the base are left alone."""
    whole = plan_checkpoint(open_checkpoint(base_folder), adapter_folder)
    adapter = copy_of(adapter_folder, tmp_path / "adapter", {"init_lora_weights": "pissa"})
    (adapter / ADAPTER).unlink()
    assert plan_checkpoint(open_checkpoint(base_folder), adapter) == whole


def test_embeddings_saved_beside_an_adapter_fit(base_folder, tmp_path):
    """PEFT saves the whole table where the vocabulary was resized."""
    model = Qwen2ForCausalLM.from_pretrained(base_folder)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert any("embed_tokens" in name for name in load_file(tmp_path / "adapter" / ADAPTER))
    assert plan_checkpoint(open_checkpoint(base_folder), tmp_path / "adapter").counts == {"fused layer": 3}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["inference_mode"]


@pytest.mark.parametrize("nf4", [False, True], ids=["16bit", "nf4"])
def test_memory_is_measured_as_on_the_loaded_model(nf4, base_folder, adapter_folder):
    """Static bytes but for the scales of partial blocks: tiny linears are no multiple of 64 x 256 weights."""
    checkpoint = open_checkpoint(base_folder)
    found = measure(_training_model(checkpoint, adapter_folder, nf4), 64, 16, torch.bfloat16)
    truth = measure(loaded(base_folder, adapter_folder, nf4=nf4), 64, 16, torch.bfloat16)
    assert found.static == pytest.approx(truth.static, rel=0.01 if nf4 else 0)
    assert replace(found, static=0, embedding=0, layer_packed=0) == replace(truth, static=0, embedding=0)
    assert found.embedding == 384 * 64 * 2, "as if on a GPU: the table could wait on the host"
    assert found.layer_packed == ((2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 100) // 2 if nf4 else 0), "and so could these"
    base = measure(_training_model(checkpoint, None, nf4), 64, 16, torch.bfloat16)
    assert base.static < found.static and base.rank_columns == 0


def test_a_memory_plan_without_an_adapter_takes_the_default_one(base_folder, tmp_path):
    checkpoint = open_checkpoint(base_folder)
    adapter = write_adapter(tmp_path / "r64", base_folder, rank=64)
    sizes = {"tokens": 512, "length": 128, "budget": 10**9}
    assert plan_checkpoint_memory(checkpoint, **sizes) == plan_checkpoint_memory(checkpoint, adapter, **sizes)
    small = write_adapter(tmp_path / "r2", base_folder, rank=2)
    assert plan_checkpoint_memory(checkpoint, small, **sizes) != plan_checkpoint_memory(checkpoint, adapter, **sizes)


def test_weights_wait_on_the_host_only_where_all_layers_are_fused(tmp_path):
    """As in training: a layer on the reference path takes its weights from where they are."""
    base = write_tiny(tmp_path / "base", num_hidden_layers=5)
    checkpoint = open_checkpoint(base)
    sizes = {"nf4": True, "tokens": 128, "length": 32, "budget": 0}
    plain, dora = write_adapter(tmp_path / "plain", base), write_adapter(tmp_path / "dora", base, use_dora=True)
    assert plan_checkpoint_memory(checkpoint, plain, **sizes).host_weights == 3
    assert plan_checkpoint_memory(checkpoint, dora, **sizes).host_weights == 0
