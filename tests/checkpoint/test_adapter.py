"""Adapters: scaling and updates are PEFT's, what is no plain LoRA is refused by name, and bases are told apart."""

from __future__ import annotations

import json
import re
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

from qwen2tool.checkpoint.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    REFUSED_KEYS,
    by_pattern,
    delta,
    fingerprint,
    open_adapter,
    require_fit,
    untargeted,
)
from qwen2tool.checkpoint.adapter_report import inspect_adapter
from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.errors import UserError
from tests.checkpoint.edits import put, rewrite
from tests.checkpoint.files import edit_json
from tests.tiny import TARGETS, tiny_model, write_adapter, write_tiny

PATTERNS = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "by module name": {"rank_pattern": {"q_proj": 2, "down_proj": 9}, "alpha_pattern": {"k_proj": 5}},
    "by layer": {
        "rank_pattern": {r"layers\.0\..*": 3, r"layers\.\d+\.mlp\.gate_proj": 6},
        "alpha_pattern": {"model.layers.1.self_attn.v_proj": 40, r".*\.2\.mlp\.\w+": 7},
    },
    "first match counts": {"rank_pattern": {"layers.1.self_attn.q_proj": 6, "q_proj": 5, "self_attn.q_proj": 2}},
    "part of a name is no match": {"rank_pattern": {"proj": 2, "_proj": 3}, "alpha_pattern": {"mlp": 2, "layers.1": 3}},
    "both, rsLoRA": {"rank_pattern": {"v_proj": 8}, "alpha_pattern": {"v_proj": 1, "o_proj": 3}, "use_rslora": True},
}


@pytest.mark.parametrize("case", PATTERNS)
def test_scaling_and_update_are_those_of_peft(case, base_folder, tmp_path):
    adapter = open_adapter(write_adapter(tmp_path / "adapter", base_folder, **PATTERNS[case]))
    model = PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(base_folder, dtype=torch.float32), adapter.path)
    layers = {name: module for name, module in model.base_model.model.named_modules() if isinstance(module, LoraLayer)}
    assert adapter.pairs.keys() == layers.keys() and len(layers) == 21
    for name, layer in layers.items():
        pair = adapter.pairs[name]
        assert (pair.scaling, pair.rank) == (layer.scaling["default"], layer.r["default"]), name
        assert delta(pair).equal(layer.get_delta_weight("default")), name
    scalings = {pair.scaling for pair in adapter.pairs.values()}
    assert (len(scalings) > 1) == (case in {"by module name", "by layer", "first match counts", "both, rsLoRA"})


def test_patterns_by_hand():
    patterns = {"q_proj": 1, r"1\.mlp\.up_proj": 2}
    assert by_pattern(patterns, "model.layers.0.self_attn.q_proj", 9) == 1
    assert by_pattern(patterns, "model.layers.1.mlp.up_proj", 9) == 2
    assert by_pattern(patterns, "model.layers.11.mlp.up_proj", 9) == 9
    assert by_pattern(patterns, "model.layers.1.mlp.up_proj.x", 9) == 9
    assert by_pattern(patterns, "model.layers.0.self_attn.wq_proj", 9) == 9
    assert by_pattern(None, "q_proj", 9) == 9


@pytest.fixture
def copy(adapter_folder, tmp_path):
    return shutil.copytree(adapter_folder, tmp_path / "adapter")


def refused(folder, words) -> None:
    with pytest.raises(UserError, match=words) as caught:
        open_adapter(folder)
    assert caught.value.fix


def test_adapter_that_is_none(base_folder, copy):
    refused(base_folder, "not a PEFT adapter")
    (copy / ADAPTER_FILE).rename(copy / "adapter_model.bin")
    refused(copy, r"needs adapter_config\.json and adapter_model\.safetensors")


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_setting_that_plain_lora_lacks(key, copy):
    edit_json(copy / ADAPTER_CONFIG, **{key: {"set": 1}})
    refused(copy, f"{key} is set")
    for unset in (None, False, [], {}):
        edit_json(copy / ADAPTER_CONFIG, **{key: unset})
        open_adapter(copy)


def test_refused_settings_are_all_that_peft_has():
    """A field that PEFT adds is looked at by a person before a merge takes it for harmless."""
    harmless = {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern",
        "megatron_core", "loftq_config", "eva_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
    }  # fmt: skip
    read = {
        "r",
        "lora_alpha",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "init_lora_weights",
        "rank_pattern",
        "alpha_pattern",
    }
    assert set(LoraConfig.__dataclass_fields__) - harmless - read == set(REFUSED_KEYS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', not 'LORA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"init_lora_weights": ["odd"]}, "init_lora_weights is"),
        ({"r": 5}, "has rank 4 and 4, adapter_config.json says 5"),
        ({"rank_pattern": {"q_proj": 3}}, "has rank 4 and 4, adapter_config.json says 3"),
        ({"r": None}, r"r of model\..* is None, not a positive number"),
        ({"r": "4"}, "r of .* is '4'"),
        ({"lora_alpha": None}, "lora_alpha of .* is None"),
        ({"lora_alpha": 0}, "lora_alpha of .* is 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha of .* is nan"),
        ({"alpha_pattern": {"q_proj": []}}, r"lora_alpha of .*q_proj is \[\]"),
        ({"alpha_pattern": ["q_proj"]}, "lora_alpha of"),
        ({"rank_pattern": {"(": 4}}, "r of"),
    ],
)
def test_config_that_makes_no_sense(changes, words, copy):
    edit_json(copy / ADAPTER_CONFIG, **changes)
    refused(copy, words)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_alone(start, copy):
    edit_json(copy / ADAPTER_CONFIG, init_lora_weights=start)
    assert len(open_adapter(copy).pairs) == 21


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base(start):
    """Why they are refused: PEFT moves a part of the base's weights into A and B."""
    model = tiny_model()
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    options = {"r": 4, "target_modules": ["q_proj"]}
    changed = get_peft_model(model, LoraConfig(init_lora_weights=start, **options))
    layer = changed.base_model.model.model.layers[0].self_attn.q_proj
    assert (layer.base_layer.weight - before).abs().max() > 0.01
    plain = get_peft_model(tiny_model(), LoraConfig(**options)).base_model.model.model.layers[0].self_attn.q_proj
    assert plain.base_layer.weight.equal(before)


DOWN = "base_model.model.model.layers.2.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{DOWN}.lora_A.weight"), "layers.2.mlp.down_proj has no lora_A"),
        (lambda t: t.pop(f"{DOWN}.lora_B.weight"), "layers.2.mlp.down_proj has no lora_B"),
        (lambda t: t.update({f"{DOWN}.lora_magnitude_vector": torch.ones(64)}), "lora_magnitude_vector is no LoRA"),
        (lambda t: t.update({f"{DOWN}.lora_B.bias": torch.ones(64)}), "lora_B.bias is no LoRA"),
        (lambda t: t.update({f"{DOWN}.lora_A.weight": torch.ones(400)}), "lora_A.weight is no LoRA"),
        (
            lambda t: t.update({f"{DOWN}.lora_A.weight": torch.ones(4, 100, dtype=torch.int8)}),
            "lora_A.weight is no LoRA",
        ),
        (lambda t: t.update({"model.x.lora_A.weight": torch.ones(4, 4)}), "model.x.lora_A.weight is no LoRA"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_tensors_that_are_no_pairs(change, words, copy):
    tensors = load_file(copy / ADAPTER_FILE)
    change(tensors)
    save_file(tensors, copy / ADAPTER_FILE)
    refused(copy, words)


def test_fit(base_folder, adapter_folder, tmp_path):
    adapter = open_adapter(adapter_folder)
    require_fit(adapter, open_checkpoint(base_folder))
    for changes, words in (
        ({"num_hidden_layers": 2}, r"adapts model\.layers\.2\..*, which .* does not have"),
        ({"num_key_value_heads": 1}, r"k_proj is for a weight of shape \[32, 64\], .* has \[16, 64\]"),
    ):
        other = open_checkpoint(write_tiny(tmp_path / words[:8].strip("\\"), **changes))
        with pytest.raises(UserError, match=words):
            require_fit(adapter, other)


def test_other_base(base_folder, copy, tmp_path):
    other = open_checkpoint(write_tiny(tmp_path / "other", seed=4))
    (copy / "qwen2tool.json").write_text(json.dumps({"base_fingerprint": fingerprint(other)}))
    adapter = open_adapter(copy)
    require_fit(adapter, other)
    require_fit(adapter, open_checkpoint(base_folder), allow_other_base=True)
    with pytest.raises(UserError, match="was trained on another base"):
        require_fit(adapter, open_checkpoint(base_folder))


@pytest.mark.parametrize("seed", [0, 1])
def test_fingerprint_is_that_of_the_tensors_not_of_the_shards(seed, tmp_path):
    found = {
        fingerprint(open_checkpoint(write_tiny(tmp_path / str(shards), seed=seed, shards=shards)))
        for shards in (1, 2, 3, 7)
    }
    assert len(found) == 1 and found != {fingerprint(open_checkpoint(write_tiny(tmp_path / "x", seed=seed + 2)))}


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.2.self_attn.k_proj.bias", 31),
        ("model.layers.0.self_attn.q_proj.bias", 0),
        ("model.layers.1.post_attention_layernorm.weight", 63),
        ("model.norm.weight", 5),
        ("model.layers.1.mlp.up_proj.weight", (0, 3)),
        ("lm_head.weight", (0, 0)),
    ],
)
def test_fingerprint_sees_one_changed_number(name, index, base_copy):
    before = fingerprint(open_checkpoint(base_copy))
    rewrite(base_copy, lambda state: None)
    assert fingerprint(open_checkpoint(base_copy)) == before
    rewrite(base_copy, lambda state: state[name].__setitem__(index, state[name][index] + 1))
    assert fingerprint(open_checkpoint(base_copy)) != before


def test_fingerprint_sees_names_and_dtypes(base_copy):
    before = fingerprint(open_checkpoint(base_copy))
    rewrite(base_copy, lambda state: state.update({"model.norm.weight": state["model.norm.weight"].float()}))
    wider = fingerprint(open_checkpoint(base_copy))
    put(base_copy, "extra", torch.zeros(0))
    assert len({before, wider, fingerprint(open_checkpoint(base_copy))}) == 3


def test_targets_are_all_seven(adapter_folder):
    assert {module.rpartition(".")[2] for module in open_adapter(adapter_folder).pairs} == set(TARGETS)


TARGETED = {
    "as trained": {},
    "one name": {"target_modules": ["q_proj"]},
    "a whole name": {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    "a part of a name": {"target_modules": ["proj"]},
    "a pattern": {"target_modules": r".*\.layers\.[01]\.mlp\.(up|down)_proj"},
    "a pattern that matches nothing": {"target_modules": "nothing"},
    "all linears": {"target_modules": "all-linear"},
    "one layer": {"layers_to_transform": 1},
    "two layers": {"layers_to_transform": [0, 2]},
    "some left out": {"exclude_modules": ["k_proj", "model.layers.0.mlp.up_proj"]},
    "left out by a pattern": {"exclude_modules": r".*mlp.*"},
}


@pytest.mark.parametrize("case", TARGETED)
def test_what_the_config_does_not_target_peft_drops(case, base_folder, adapter_folder, tmp_path):
    """The truth is the modules that PEFT adapts when it builds a model from the same config."""
    config = json.loads((adapter_folder / ADAPTER_CONFIG).read_text()) | TARGETED[case]
    modules = open_adapter(adapter_folder).pairs
    try:
        fields = {key: config[key] for key in ("target_modules", "layers_to_transform", "exclude_modules")}
        model = get_peft_model(tiny_model(), LoraConfig(r=4, task_type="CAUSAL_LM", **fields))
        adapted = {name for name, module in model.base_model.model.named_modules() if isinstance(module, LoraLayer)}
    except ValueError:  # PEFT refuses targets that match nothing
        adapted = set()
    assert untargeted(config, modules) == [name for name in modules if name not in adapted]
    assert not untargeted(config, modules) if case in ("as trained", "all linears") else untargeted(config, modules)


def test_an_adapter_of_which_peft_would_drop_a_part_is_refused(adapter_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(adapter_folder, copy)
    edit_json(copy / ADAPTER_CONFIG, target_modules=["q_proj", "k_proj"])
    with pytest.raises(UserError, match=r"and 14 more modules, which adapter_config\.json does not target"):
        open_adapter(copy)
    report = inspect_adapter(copy)
    assert report.exit_code == 1 and "15 of 21 adapted modules" in report.findings[0]


@pytest.mark.parametrize("targets", [None, [], {}, 3, [1], "(a*)*b", "(", "a*b*c*d*e*"])
def test_targets_that_say_nothing_target_everything(targets):
    assert untargeted({"target_modules": targets}, ["model.layers.0.mlp.up_proj"]) == []


def test_a_pattern_of_doubtful_syntax_warns_nobody(base_folder, tmp_path):
    """Python warns of `[[` wherever a pattern is compiled, with a line of our source."""
    folder = write_adapter(tmp_path / "a", base_folder)
    edit_json(folder / "adapter_config.json", rank_pattern={"[[]x": 4})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_adapter(folder).pairs
    with pytest.warns(FutureWarning):
        re.compile("[[]x")
