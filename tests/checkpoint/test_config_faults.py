"""What readers refuse in a config.json: each is one that transformers refuses too, and none is said of a sound one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen2tool.checkpoint.config_faults import config_faults, other_class
from qwen2tool.checkpoint.report import inspect_checkpoint
from qwen2tool.errors import UserError
from tests.checkpoint.edits import edit_config, put
from tests.tiny import tiny_config

YARN = {"type": "yarn", "rope_type": "yarn", "factor": 4.0}
REFUSED: dict[str, dict[str, Any]] = {
    "an unknown RoPE type": {"rope_scaling": {"type": "nonsense", "factor": 2.0}, "rope_parameters": None},
    "vision's RoPE": {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}, "rope_parameters": None},
    "YaRN without a factor": {"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": None},
    "llama3 without its factors": {"rope_scaling": {"type": "llama3", "factor": 2.0}, "rope_parameters": None},
    "a factor in words": {"rope_scaling": YARN | {"factor": "four"}, "rope_parameters": None},
    "too few layer types": {"layer_types": ["full_attention"] * 2},
    "an unknown layer type": {"layer_types": ["full_attention", "full_attention", "round"]},
    "sliding without a window": {"layer_types": ["sliding_attention"] * 3},
    "a window in words": {"sliding_window": "wide"},
    "no activation": {"hidden_act": None},
    "an unknown dtype": {"dtype": "half a float"},
}
SOUND: dict[str, dict[str, Any]] = {
    "as saved": {},
    "YaRN": {"rope_scaling": dict(YARN), "rope_parameters": None},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None},
    "a whole factor": {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": None},
    "sliding": {"layer_types": ["sliding_attention"] * 3, "use_sliding_window": True, "sliding_window": 8},
    "no layer types": {"layer_types": None},
    "another activation": {"hidden_act": "gelu"},
}


def config_of(changes: dict[str, Any]) -> dict[str, Any]:
    saved = json.loads(tiny_config().to_json_string(use_diff=False))
    return {**saved, "dtype": "float32", **json.loads(json.dumps(changes))}


def runs(config: dict[str, Any]) -> None:
    """Builds transformers' model and runs it."""
    config = json.loads(json.dumps(config))
    with torch.no_grad():
        Qwen2ForCausalLM(Qwen2Config.from_dict(config))(torch.arange(6)[None])


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_refuses_is_a_fault(name: str) -> None:
    config = config_of(REFUSED[name])
    assert len(list(config_faults(config, 3))) == 1
    with pytest.raises(Exception):  # noqa: B017  (each is refused by an error of its own)
        runs(config)


@pytest.mark.parametrize("name", SOUND)
def test_what_transformers_runs_is_none(name: str) -> None:
    config = config_of(SOUND[name])
    assert list(config_faults(config, 3)) == []
    runs(config)


def test_inspect_calls_them_wrong(base_copy) -> None:
    edit_config(base_copy, rope_scaling={"type": "nonsense", "factor": 2.0}, rope_parameters=None)
    report = inspect_checkpoint(base_copy)
    assert report.exit_code == 1 and "the type 'nonsense'" in report.findings[0]


@pytest.mark.parametrize("key", ["tie_word_embeddings", "use_sliding_window"])
def test_a_flag_in_words_is_refused_as_transformers_refuses_it(key: str, base_copy) -> None:
    """bool("false") is true: a head would be called tied that is not."""
    edit_config(base_copy, layer_types=None, **{key: "false"})
    with pytest.raises(UserError, match=f"{key} is 'false', not true or false"):
        inspect_checkpoint(base_copy)
    with pytest.raises(Exception, match=key):
        Qwen2Config.from_pretrained(base_copy)


@pytest.mark.parametrize(
    ("model_type", "names", "family"),
    [
        ("qwen2", ["LlamaForCausalLM"], "Llama"),
        ("qwen2", ["MistralForCausalLM"], "Mistral"),
        ("llama", ["Qwen2ForCausalLM"], None),
        ("qwen2", ["Qwen2ForCausalLM"], None),
        ("qwen2", ["Qwen2ForSequenceClassification"], None),
        ("qwen2", ["RewardModel"], None),
        ("llama", ["LlamaForCausalLM"], None),
        ("qwen2", [], None),
        ("qwen2", None, None),
        ("gpt2", ["LlamaForCausalLM"], None),
    ],
)
def test_a_class_of_another_family(model_type: str, names: list[str] | None, family: str | None) -> None:
    found = other_class({"model_type": model_type, "architectures": names})
    assert found is None if family is None else found is not None and f"for a {family}," in found


def test_another_activation_is_a_note(base_copy) -> None:
    edit_config(base_copy, hidden_act="gelu")
    report = inspect_checkpoint(base_copy)
    assert report.exit_code == 0 and any("hidden_act is 'gelu'" in note for note in report.notes)


def test_whole_numbers_are_no_weights(base_copy) -> None:
    put(base_copy, "model.layers.1.mlp.up_proj.weight", torch.ones(100, 64, dtype=torch.int8))
    report = inspect_checkpoint(base_copy)
    assert report.exit_code == 1 and "1 tensor is stored as whole numbers (I8)" in report.findings[0]


def test_a_window_that_layer_types_switches_off(base_copy) -> None:
    edit_config(base_copy, use_sliding_window=True, sliding_window=8)
    (note,) = [note for note in inspect_checkpoint(base_copy).notes if "sliding_window" in note]
    assert "layer_types lets no layer slide" in note
    edit_config(base_copy, layer_types=None, max_window_layers=28)
    (note,) = [note for note in inspect_checkpoint(base_copy).notes if "sliding_window" in note]
    assert "max_window_layers 28" in note


def test_biases_of_another_size_are_not_called_sound(base_copy) -> None:
    edit_config(base_copy, num_key_value_heads=4)
    report = inspect_checkpoint(base_copy)
    assert report.headline == ("all 9 q/k/v biases are there, but 6 of them in another size than config.json asks for")
