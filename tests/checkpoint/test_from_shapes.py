"""Weights without a config: what shapes fix is what the config says, and what they do not fix is said."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.from_shapes import config_from_shapes
from qwen2tool.checkpoint.geometry import expected_tensors, geometry
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.checkpoint.inventory import take_inventory
from qwen2tool.errors import UserError
from tests.tiny import write_tiny

PUBLISHED = {  # hidden, intermediate, layers, heads, key/value heads, head size, vocabulary, tied
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 64, 151936, True),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 128, 151936, True),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 128, 152064, False),
    "Qwen2.5-72B": (8192, 29568, 80, 64, 8, 128, 152064, False),
    "Qwen1.5-0.5B": (1024, 2816, 24, 16, 16, 64, 151936, True),
    "CodeQwen1.5-7B": (4096, 13440, 32, 32, 4, 128, 92416, False),
}


def config_of(model: str) -> dict:
    hidden, inter, layers, heads, kv, head_dim, vocabulary, tied = PUBLISHED[model]
    return {
        "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": inter, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head_dim, "vocab_size": vocabulary,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": tied,
    }  # fmt: skip


def tensors_of(config: dict, file) -> dict[str, TensorInfo]:
    shapes = expected_tensors(geometry(config))
    return {n: TensorInfo(name=n, dtype="BF16", shape=s, file=file, start=0, end=0) for n, s in shapes.items()}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models_come_back_whole(model, tmp_path):
    config = config_of(model)
    derived, assumed = config_from_shapes(tmp_path / "x", tensors_of(config, tmp_path))
    assert geometry(derived) == geometry(config)
    assert any(f"{config['head_dim']} is assumed" in sentence for sentence in assumed)


@pytest.mark.parametrize("tied", [False, True])
def test_a_file_without_config(tied, tmp_path):
    folder = write_tiny(tmp_path / "one", shards=1, tie_word_embeddings=tied)
    with_config = open_checkpoint(folder).geometry
    (folder / "config.json").unlink()
    checkpoint = open_checkpoint(folder / "model.safetensors")
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings"):
        assert getattr(checkpoint.geometry, key) == getattr(with_config, key), key
    found = take_inventory(checkpoint)
    assert (found.missing, found.extra, found.misshapen) == ((), (), {}) and len(checkpoint.assumed) == 3
    assert checkpoint.geometry.head_dim == 32  # not the 16 of the config: that is what the sentence is for


@pytest.mark.parametrize(
    ("ending", "kind", "count"),
    [("q_proj.bias", "qwen2", 4), ("none", "qwen2", 3), ("+o", "llama", 3), ("+q", "qwen3", 3)],
)
def test_the_architecture_is_that_of_the_tensors(ending, kind, count, tmp_path):
    tensors = tensors_of(config_of("Qwen2.5-0.5B"), tmp_path)
    extra = {"+o": "o_proj.bias", "+q": "q_norm.weight"}.get(ending)
    if extra:
        name = f"model.layers.0.self_attn.{extra}"
        tensors[name] = TensorInfo(name=name, dtype="BF16", shape=(896,), file=tmp_path, start=0, end=0)
    config, assumed = config_from_shapes(tmp_path, {n: t for n, t in tensors.items() if not n.endswith(ending)})
    assert (config["model_type"], len(assumed)) == (kind, count)


def test_a_lost_layer_of_biases_is_still_seen(tmp_path):
    folder = write_tiny(tmp_path / "one", shards=1)
    (folder / "config.json").unlink()
    state = load_file(folder / "model.safetensors")
    del state["model.layers.2.self_attn.k_proj.bias"]
    save_file(state, folder / "model.safetensors")
    found = take_inventory(open_checkpoint(folder / "model.safetensors"))
    assert found.missing == ("model.layers.2.self_attn.k_proj.bias",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.clear(), "no tensor named model.layers"),
        (lambda t: t.pop("model.embed_tokens.weight"), "no model.embed_tokens.weight to take a size from"),
        (lambda t: t.pop("model.layers.0.mlp.gate_proj.weight"), "gate_proj.weight to take a size from"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(9, 1).byte()}), "is packed"),
        (lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.ones(9)}), "no matrix"),
        (lambda t: t.update({"model.layers.0.mlp.gate_proj.weight": torch.ones(0, 9)}), "no matrix"),
        (lambda t: t.update({"model.layers.99999.x": torch.ones(1)}), "no tensor named model.layers"),
    ],
)
def test_what_fixes_no_geometry(change, words, tmp_path):
    folder = write_tiny(tmp_path / "one", shards=1)
    (folder / "config.json").unlink()
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=words) as caught:
        open_checkpoint(folder / "model.safetensors")
    assert "config.json" in caught.value.fix
