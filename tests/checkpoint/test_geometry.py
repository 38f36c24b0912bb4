"""config.json is read as transformers reads it, and names every tensor that transformers' model has."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from qwen2tool.checkpoint.geometry import (
    effective_rope,
    expected_tensors,
    geometry,
    read_config,
    read_json,
    rope_disagreement,
    sliding_layers,
    with_both_spellings,
)
from qwen2tool.errors import UserError

BASE = {
    "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 384,
}  # fmt: skip
YARN = {"factor": 4.0, "original_max_position_embeddings": 512}
GEOMETRIES = {
    "GQA, untied": {},
    "MHA": {"num_key_value_heads": 4},
    "MQA, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "28 heads on 4": {"hidden_size": 224, "num_attention_heads": 28, "num_key_value_heads": 4},
    "heads of their own size": {"head_dim": 24},
    "one layer": {"num_hidden_layers": 1},
    "Llama with biases": {"model_type": "llama", "attention_bias": True},
    "Llama without": {"model_type": "llama"},
    "Llama, MHA by default": {"model_type": "llama", "num_key_value_heads": None, "attention_bias": True},
}


@pytest.mark.parametrize("case", GEOMETRIES)
def test_tensors_are_those_of_transformers(case):
    config = BASE | GEOMETRIES[case]
    theirs = AutoConfig.for_model(**config)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(theirs).state_dict()
    if theirs.tie_word_embeddings:
        del state["lm_head.weight"]  # the table itself, under a second name
    found = expected_tensors(geometry(config))
    assert found == {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = expected_tensors(geometry(config | {"intermediate_size": 101}))
    assert wrong.keys() == found.keys() and wrong != found  # the control


def test_numbers_are_those_of_transformers():
    shape, theirs = geometry(BASE), Qwen2Config(**BASE)
    for name in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    ):  # fmt: skip
        assert getattr(shape, name) == getattr(theirs, name), name
    assert shape.head_dim == 16 and shape.rope_theta == theirs.rope_parameters["rope_theta"]
    assert shape.attention_bias and not geometry(BASE | {"model_type": "llama"}).attention_bias


SPELLINGS = {
    "none": {},
    "transformers 4": {"rope_theta": 1e6},
    "transformers 5": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "both": {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "both, theta apart": {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "theta outside only": {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}},
    "yarn, 4": {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}},
    "yarn, 4 newer": {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", **YARN}},
    "yarn, 5": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}},
    "yarn in the older one only": {
        "rope_theta": 5e5, "rope_scaling": {"type": "yarn", **YARN},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "yarn in the newer one only": {
        "rope_theta": 5e5, "rope_scaling": {"type": "default"},
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN},
    },
    "older one empty": {"rope_scaling": None, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}},
}  # fmt: skip


def as_read_by_transformers(config) -> dict:
    found = dict(Qwen2Config(**json.loads(json.dumps(config))).rope_parameters)
    found.pop("type", None)
    return found


def as_read_by_version_4(config) -> tuple:
    """rope_theta with its default, and rope_scaling, whose kind stands under either key."""
    scaling = dict(config.get("rope_scaling") or {})
    kind = {scaling.pop("type", "default"), scaling.pop("rope_type", "default")} - {"default"}
    return config.get("rope_theta", 10000.0), kind, scaling


@pytest.mark.parametrize("case", SPELLINGS)
def test_rope_is_what_transformers_takes(case):
    config = BASE | SPELLINGS[case]
    theta, scaling = effective_rope(config)
    assert {"rope_theta": theta, **(scaling or {"rope_type": "default"})} == as_read_by_transformers(config)


@pytest.mark.parametrize("case", SPELLINGS)
def test_both_generations_read_the_same(case):
    config = BASE | SPELLINGS[case]
    edited = with_both_spellings(config)
    truth = as_read_by_transformers(config)
    assert as_read_by_transformers(edited) == truth and rope_disagreement(edited) is None
    kind = {truth["rope_type"]} - {"default"}
    extra = {key: value for key, value in truth.items() if key not in ("rope_type", "rope_theta")}
    assert as_read_by_version_4(edited) == (truth["rope_theta"], kind, extra)
    assert {key: edited[key] for key in BASE} == BASE


def test_where_readers_disagree():
    apart = {case for case, spelling in SPELLINGS.items() if rope_disagreement(BASE | spelling)}
    read_alike = {
        case for case, spelling in SPELLINGS.items() if agree(as_read_by_transformers(BASE | spelling), BASE | spelling)
    }
    assert apart >= SPELLINGS.keys() - read_alike
    assert not apart & {"none", "transformers 4", "both", "yarn, 4", "yarn, 4 newer", "theta outside only"}


def agree(new, config) -> bool:
    extra = {key: value for key, value in new.items() if key not in ("rope_type", "rope_theta")}
    return as_read_by_version_4(config) == (new["rope_theta"], {new["rope_type"]} - {"default"}, extra)


def test_unknown_keys_and_the_argument_stay():
    config = BASE | {"torch_dtype": "bfloat16", "invented": {"a": [1]}}
    before = json.dumps(config)
    edited = with_both_spellings(config)
    assert json.dumps(config) == before and edited["invented"] == {"a": [1]} and edited["dtype"] == "bfloat16"
    assert "dtype" not in with_both_spellings(BASE)


WINDOWS = [
    {},
    {"sliding_window": 32, "use_sliding_window": False, "max_window_layers": 1},
    {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1},
    {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 3},
    {"use_sliding_window": True, "max_window_layers": 2},
    {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0},
    {"sliding_window": 32, "use_sliding_window": True},
    {"sliding_window": 32, "use_sliding_window": True, "layer_types": ["sliding_attention"] + 2 * ["full_attention"]},
]


@pytest.mark.parametrize("changes", WINDOWS)
def test_sliding_layers_are_those_of_transformers(changes):
    types = Qwen2Config(**BASE, **changes).layer_types
    assert sliding_layers(BASE | changes, 3) == tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", None), ("hidden_size", "64"), ("hidden_size", 0), ("vocab_size", -1), ("vocab_size", True),
        ("num_attention_heads", 4.0), ("num_hidden_layers", 10**12), ("intermediate_size", 10**30),
        ("num_key_value_heads", []), ("rms_norm_eps", "small"), ("rms_norm_eps", float("nan")), ("rms_norm_eps", 0),
        ("rope_theta", "1e6"), ("rope_theta", [1]), ("rope_parameters", [1]), ("rope_scaling", "yarn"),
        ("quantization_config", "nf4"), ("dtype", 16), ("torch_dtype", {"a": 1}),
    ],
)  # fmt: skip
def test_key_that_makes_no_sense_is_named(key, value):
    with pytest.raises(UserError, match=key.removeprefix("torch_")):
        geometry(BASE | {key: value})


def test_window_that_makes_no_sense():
    with pytest.raises(UserError, match="max_window_layers"):
        geometry(BASE | {"use_sliding_window": True, "max_window_layers": "all"})


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_missing_key_is_named(key):
    with pytest.raises(UserError, match=key):
        geometry({name: value for name, value in BASE.items() if name != key})


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"not a checkpoint .no config\.json."):
        read_config(tmp_path)
    for text, words in (
        ("{", "it ends early"), ("{]", "Expecting property name"), ("", "it is empty"),
        ("<!DOCTYPE html>", "a web page"), ("[]", "a list, not an object"), ("5", "an int, not an object"),
        ("[" * 100_000, "not valid JSON"),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=words):
            read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"not UTF-8 text .byte 0."):
        read_json(tmp_path / "config.json")
