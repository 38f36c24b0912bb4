"""What is missing is named, a bias before all else, and a whole checkpoint passes."""

from __future__ import annotations

import pytest
import torch

from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.inventory import require_whole, take_inventory
from qwen2tool.errors import EXIT_FINDING, EXIT_UNUSABLE, UserError
from tests.checkpoint.edits import drop, edit_config, put
from tests.convert.qwen1_model import write_qwen1
from tests.tiny import write_tiny

K1 = "model.layers.1.self_attn.k_proj.bias"


def refused(folder, words, code=EXIT_FINDING) -> None:
    with pytest.raises(UserError, match=words) as caught:
        require_whole(open_checkpoint(folder))
    assert caught.value.exit_code == code


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}])
def test_whole(changes, tmp_path):
    checkpoint = open_checkpoint(write_tiny(tmp_path / "base", **changes))
    require_whole(checkpoint)
    found = take_inventory(checkpoint)
    assert (found.missing, found.extra, found.misshapen) == ((), (), {})
    assert found.biases == {layer: dict.fromkeys("qkv", "present") for layer in range(3)}


def test_one_missing_bias(base_copy):
    drop(base_copy, K1)
    refused(base_copy, f"1 of 9 q/k/v biases are missing, the first is {K1}")
    found = take_inventory(open_checkpoint(base_copy))
    assert found.missing == found.missing_biases == (K1,)
    assert found.biases[1] == {"q": "present", "k": "missing", "v": "present"}


def test_all_biases_missing(base_copy):
    drop(base_copy, "_proj.bias")
    refused(base_copy, r"9 of 9 q/k/v biases are missing, the first is model\.layers\.0\.self_attn\.q_proj\.bias")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.down_proj.weight", "lm_head.weight"])
def test_missing_weight(name, base_copy):
    drop(base_copy, name)
    refused(base_copy, f"1 tensors are missing, the first is {name}")


@pytest.mark.parametrize("shape", [(31,), (64,), (1, 32)])
def test_misshapen_bias(shape, base_copy):
    put(base_copy, K1, torch.ones(shape, dtype=torch.bfloat16))
    refused(base_copy, rf"{K1} has shape \[{', '.join(map(str, shape))}\], config.json asks for \[32\]")


@pytest.mark.parametrize(
    "name", ["stray", "model.layers.0.self_attn.o_proj.bias", "model.layers.3.self_attn.q_proj.bias"]
)
def test_extra_tensor(name, base_copy):
    put(base_copy, name, torch.ones(64))
    refused(base_copy, f"1 tensors that no Qwen2 has, the first is {name}")
    if name.endswith("bias"):
        layer, projection = int(name.split(".")[2]), name.split(".")[4][0]
        assert take_inventory(open_checkpoint(base_copy)).biases[layer][projection] == "extra"


def test_position_buffers_of_old_savers_are_no_extras(base_copy):
    put(base_copy, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8))
    require_whole(open_checkpoint(base_copy))


def test_stored_copy_of_a_tied_head_is_no_extra(tmp_path):
    base = write_tiny(tmp_path / "base", tie_word_embeddings=True)
    put(base, "lm_head.weight", torch.ones(384, 64))
    require_whole(open_checkpoint(base))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2_moe", None])
def test_other_architecture(kind, base_copy):
    edit_config(base_copy, model_type=kind)
    refused(base_copy, f"model_type is '{kind}', not 'qwen2'", EXIT_UNUSABLE)


def test_packed_linears_may_lack_their_weight_but_never_a_bias(base_copy):
    edit_config(base_copy, quantization_config={"quant_method": "gptq"})
    drop(base_copy, "q_proj.weight")
    for layer in range(3):
        put(base_copy, f"model.layers.{layer}.self_attn.q_proj.qweight", torch.ones(4, 4, dtype=torch.int32))
        put(base_copy, f"model.layers.{layer}.self_attn.q_proj.scales", torch.ones(4))
    found = take_inventory(open_checkpoint(base_copy))
    assert (found.missing, found.extra) == ((), ())
    drop(base_copy, K1)
    assert take_inventory(open_checkpoint(base_copy)).missing == (K1,)
    drop(base_copy, "model.layers.2.self_attn.q_proj.qweight")
    assert take_inventory(open_checkpoint(base_copy)).missing == (K1, "model.layers.2.self_attn.q_proj.weight")
    edit_config(base_copy, quantization_config=None)
    assert len(take_inventory(open_checkpoint(base_copy)).missing) == 4


def test_the_first_qwen_is_sent_to_convert(tmp_path):
    with pytest.raises(UserError) as caught:
        require_whole(open_checkpoint(write_qwen1(tmp_path / "qwen1")))
    assert "Qwen (1)" in caught.value.what and f"qwen2tool convert {tmp_path / 'qwen1'} OUT" in caught.value.fix
