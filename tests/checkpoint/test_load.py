"""A model is loaded whole or not at all; transformers itself takes zeros for the biases that it does not find."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2ForCausalLM
from transformers.utils import logging

from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.load import load_model, load_tokenizer, quiet_transformers
from qwen2tool.errors import UserError
from tests.checkpoint.edits import drop, edit_config, load_state
from tests.checkpoint.files import edit_json
from tests.tiny import write_tiny

V2 = "model.layers.2.self_attn.v_proj.bias"
TOKENS = torch.arange(20).view(1, 20) * 7 % 384


def biases(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.named_parameters() if name.endswith("_proj.bias")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_same_model_as_transformers_loads(dtype, base_folder):
    ours = load_model(open_checkpoint(base_folder), dtype=dtype)
    truth = Qwen2ForCausalLM.from_pretrained(base_folder, dtype=getattr(torch, dtype))
    state, expected = ours.state_dict(), truth.state_dict()
    assert state.keys() == expected.keys() and all(state[name].equal(expected[name]) for name in expected)
    assert not ours.training and ours.dtype == getattr(torch, dtype)
    with torch.no_grad():
        assert ours(TOKENS).logits.equal(truth(TOKENS).logits)


def test_missing_bias_is_refused_and_transformers_goes_on_without(base_copy):
    drop(base_copy, V2)
    with pytest.raises(UserError, match=f"1 of 9 q/k/v biases are missing, the first is {V2}"):
        load_model(open_checkpoint(base_copy), dtype="float32")
    with quiet_transformers():
        theirs = Qwen2ForCausalLM.from_pretrained(base_copy, dtype=torch.float32)
    assert biases(theirs)[V2].count_nonzero() == 0  # the control


def test_bias_that_was_lost_while_loading(base_folder, monkeypatch):
    original = Qwen2ForCausalLM.from_pretrained.__func__

    def losing(cls, *arguments, **options):
        model = original(cls, *arguments, **options)
        with torch.no_grad():
            biases(model)[V2][0] += 1
        return model

    monkeypatch.setattr(Qwen2ForCausalLM, "from_pretrained", classmethod(losing))
    with pytest.raises(UserError, match=f"{V2}: the loaded model does not hold what"):
        load_model(open_checkpoint(base_folder), dtype="float32")


def test_nf4_keeps_the_biases(tmp_path):
    from bitsandbytes.nn import Linear4bit

    base = write_tiny(tmp_path / "base", intermediate_size=128)
    model = load_model(open_checkpoint(base), dtype="float32", nf4=True)
    state = load_state(base)
    found = biases(model)
    assert len(found) == 9 and all(found[name].equal(state[name].float()) for name in found)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(packed) == 21 and all(m.weight.quant_state.nested for m in packed.values())
    with torch.no_grad():
        logits = model(TOKENS).logits
        for bias in found.values():
            bias.zero_()
        assert (model(TOKENS).logits - logits).abs().max() > 0.1 * logits.std()  # and they are at work


def test_nf4_layout_survives_a_forward_pass(tmp_path):
    """bitsandbytes repacks for CPU inference in place, after which neither training nor merging works."""
    base = write_tiny(tmp_path / "base", intermediate_size=128)
    model = load_model(open_checkpoint(base), dtype="bfloat16", nf4=True)
    weight = model.model.layers[0].self_attn.q_proj.weight
    before = weight.data.clone()
    with torch.no_grad():
        model(TOKENS)
    assert model.model.layers[0].self_attn.q_proj.weight.data.equal(before)


def test_tied_head(tmp_path):
    base = write_tiny(tmp_path / "base", tie_word_embeddings=True)
    model = load_model(open_checkpoint(base), dtype="float32")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_other_architecture_is_refused(base_copy):
    edit_config(base_copy, model_type="llama", attention_bias=True)
    with pytest.raises(UserError, match="model_type is 'llama'"):
        load_model(open_checkpoint(base_copy), dtype="float32")


def test_tokenizer(base_folder, base_copy):
    tokenizer = load_tokenizer(base_folder)
    assert tokenizer.decode(tokenizer("the model answers")["input_ids"]) == "the model answers"
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False)
    edit_json(base_copy / "tokenizer_config.json", chat_template=None)
    with pytest.raises(UserError, match="has no chat template"):
        load_tokenizer(base_copy)
    (base_copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(base_copy)


def test_quiet_is_over_when_the_block_ends():
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(ValueError, match="x"), quiet_transformers():
        assert logging.get_verbosity() == logging.ERROR and not logging.is_progress_bar_enabled()
        raise ValueError("x")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)
