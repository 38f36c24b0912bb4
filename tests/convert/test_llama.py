"""Qwen2 -> Llama's layout -> Qwen2: the same function bit for bit, and back without a trace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig

from qwen2tool.convert.llama import KEPT, to_llama_config, to_qwen2_config
from qwen2tool.convert.run import Options, convert
from qwen2tool.errors import EXIT_FINDING, UserError
from tests.checkpoint.edits import drop, edit_config, load_state, put, rewrite
from tests.convert.common import YARN, config_of, hashes, logits, older_reader
from tests.tiny import write_tiny

BIAS = "model.layers.1.self_attn.{}_proj.bias"


@pytest.fixture(scope="module")
def llama_folder(base_folder, tmp_path_factory) -> Path:
    """Read-only."""
    out = tmp_path_factory.mktemp("llama") / "out"
    convert(base_folder, out, Options(to="llama"))
    return out


@pytest.fixture
def llama_copy(llama_folder, tmp_path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "llama"))


def test_config_says_what_llama_needs(base_folder, llama_folder):
    config = config_of(llama_folder)
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert (config["attention_bias"], config["mlp_bias"], config["head_dim"]) == (True, False, 16)
    assert not {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"} & config.keys()
    assert config[KEPT]["removed"]["sliding_window"] == config_of(base_folder)["sliding_window"]
    assert isinstance(AutoConfig.from_pretrained(llama_folder), LlamaConfig)


def test_tensors_are_the_same_bytes_and_the_new_bias_is_zero(base_folder, llama_folder):
    before, after = hashes(base_folder), hashes(llama_folder)
    added = after.keys() - before.keys()
    assert added == {BIAS.format("o").replace(".1.", f".{n}.") for n in range(3)}
    assert {name: after[name] for name in before} == before
    for name in added:
        tensor = load_state(llama_folder)[name]
        assert tensor.shape == (64,) and tensor.dtype == torch.bfloat16 and not tensor.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope", ["default", "yarn"])
def test_logits_are_equal_bit_for_bit(tmp_path, rope, dtype):
    changes = {"rope_parameters": YARN} if rope == "yarn" else {}
    base = write_tiny(tmp_path / "base", **changes)
    edit_config(base, rope_scaling={k: v for k, v in YARN.items() if k != "rope_theta"} if rope == "yarn" else None)
    convert(base, tmp_path / "llama", Options(to="llama"))
    convert(tmp_path / "llama", tmp_path / "back")
    truth = logits(base, dtype)
    assert torch.equal(logits(tmp_path / "llama", dtype), truth)
    assert torch.equal(logits(tmp_path / "back", dtype), truth)
    if rope == "yarn":
        plain = edit_config(tmp_path / "llama", rope_scaling=None, rope_parameters=None) or tmp_path / "llama"
        assert not torch.equal(logits(plain, dtype), truth), "without YaRN the function is another"


@pytest.mark.parametrize("letter", ["q", "k", "v"])
@pytest.mark.parametrize("fault", ["dropped", "zeroed", "permuted"])
def test_one_bias_lost_is_found(base_folder, llama_copy, letter, fault):
    """The negative control of the bitwise equality, and of the hashes."""
    name = BIAS.format(letter)
    if fault == "dropped":
        drop(llama_copy, name)
    else:
        rewrite(llama_copy, lambda state: state.update({name: state[name].flip(0) * (fault == "permuted")}))
    assert hashes(llama_copy).get(name) != hashes(base_folder)[name]
    assert not torch.equal(logits(llama_copy), logits(base_folder))


def test_back_is_exact(base_folder, llama_folder, tmp_path):
    back = tmp_path / "back"
    convert(llama_folder, back)
    assert hashes(back) == hashes(base_folder)
    before, after = config_of(base_folder), config_of(back)
    assert {key: after[key] for key in before} == before
    assert after.keys() - before.keys() <= {"rope_theta", "rope_parameters", "dtype", "torch_dtype"}
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (back / file).read_bytes() == (base_folder / file).read_bytes()


@pytest.mark.parametrize("spelling", ["both", "transformers 4", "transformers 5"])
@pytest.mark.parametrize("to", ["llama", "qwen2"])
def test_readers_of_both_generations_get_theta_and_dtype(base_copy, tmp_path, spelling, to):
    if spelling == "transformers 4":
        edit_config(base_copy, rope_parameters=None, dtype=None)
    elif spelling == "transformers 5":
        edit_config(base_copy, rope_theta=None, torch_dtype=None)
        assert older_reader(config_of(base_copy))["rope_theta"] == 10000.0, "the trap"
    convert(base_copy, tmp_path / "out", Options(to=to))
    assert older_reader(config_of(tmp_path / "out")) == {
        "rope_theta": 1e6, "rope_scaling": None, "dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    new = AutoConfig.from_pretrained(tmp_path / "out")
    assert new.rope_parameters["rope_theta"] == 1e6 and new.dtype == torch.bfloat16


def test_a_tied_head_stays_one(tmp_path):
    base = write_tiny(tmp_path / "base", tie_word_embeddings=True)
    convert(base, tmp_path / "llama", Options(to="llama"))
    assert "lm_head.weight" not in hashes(tmp_path / "llama") and config_of(tmp_path / "llama")["tie_word_embeddings"]
    assert torch.equal(logits(tmp_path / "llama"), logits(base))
    convert(tmp_path / "llama", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(base)


def test_a_layer_that_slides_is_refused(base_copy, tmp_path):
    edit_config(base_copy, use_sliding_window=True, sliding_window=32, max_window_layers=1, layer_types=None)
    with pytest.raises(UserError, match=r"2 layers slide \(the first is layer 1\)"):
        convert(base_copy, tmp_path / "out", Options(to="llama"))
    assert not (tmp_path / "out").exists()
    edit_config(base_copy, max_window_layers=3)
    convert(base_copy, tmp_path / "out", Options(to="llama"))
    convert(tmp_path / "out", tmp_path / "back")
    kept = config_of(tmp_path / "back")
    assert (kept["use_sliding_window"], kept["sliding_window"], kept["max_window_layers"]) == (True, 32, 3)


@pytest.mark.parametrize(
    ("change", "words", "remedy"),
    [
        (lambda f: drop(f, BIAS.format("k")), "1 of 9 q/k/v biases are missing", "--biases-from"),
        (lambda f: put(f, BIAS.format("o"), torch.full((64,), 1e-3)), "o_proj.bias is not zero", "Keep this model"),
        (lambda f: put(f, "model.layers.0.mlp.up_proj.bias", torch.zeros(100)), "no bias in its MLP", "Keep this"),
    ],
)
def test_the_way_back_is_refused(llama_copy, tmp_path, change, words, remedy):
    change(llama_copy)
    with pytest.raises(UserError) as refused:
        convert(llama_copy, tmp_path / "out")
    assert words in refused.value.what and remedy in refused.value.fix and refused.value.exit_code == EXIT_FINDING
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_the_work_of_another_tool_comes_back(base_folder, llama_copy, tmp_path):
    """No record of ours, and no o_proj.bias either, as one of the known scripts leaves it out."""
    edit_config(llama_copy, **{KEPT: None}, head_dim=None, pretraining_tp=1)
    drop(llama_copy, "o_proj.bias")
    convert(llama_copy, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(base_folder)
    config = config_of(tmp_path / "out")
    assert config["model_type"] == "qwen2" and "attention_bias" not in config and "pretraining_tp" not in config
    assert torch.equal(logits(tmp_path / "out"), logits(base_folder))


@pytest.mark.parametrize("record", [[], {"removed": {"vocab_size": 3}, "added": []}, {"removed": {}, "added": [1]}])
def test_a_record_that_is_not_ours_is_refused(base_folder, record):
    config = to_llama_config(config_of(base_folder))
    assert to_qwen2_config(config) == config_of(base_folder)
    with pytest.raises(UserError, match=KEPT):
        to_qwen2_config(config | {KEPT: record})


def test_the_tokenizer_is_the_same(base_folder, llama_folder):
    text = "Grüße, 你好, مرحبا 42 <|im_start|>"
    mine, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (base_folder, llama_folder))
    assert mine(text)["input_ids"] == theirs(text)["input_ids"]
    assert json.loads((llama_folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
