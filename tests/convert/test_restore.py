"""Biases that a tool lost, from the checkpoint that the damaged copy was made from; never from a stranger."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from qwen2tool.convert.run import Options, convert
from qwen2tool.errors import EXIT_FINDING, UserError
from tests.checkpoint.edits import QKV_BIASES, drop, edit_config, load_state, put, rewrite
from tests.convert.common import config_of, hashes, logits, manifest_of
from tests.tiny import write_tiny

WEIGHT = "model.layers.1.mlp.gate_proj.weight"


def llamafied_and_stripped(base: Path, folder: Path) -> Path:
    """As mergekit's passthrough leaves a llamafied checkpoint: `attention_bias` says true, no bias is there."""
    convert(base, folder, Options(to="llama"))
    drop(folder, "_proj.bias")
    return folder


def test_a_llamafied_copy_is_whole_again(base_folder, tmp_path):
    damaged = llamafied_and_stripped(base_folder, tmp_path / "damaged")
    report = convert(damaged, tmp_path / "out", biases_from=base_folder)
    assert hashes(tmp_path / "out") == hashes(base_folder)
    assert config_of(tmp_path / "out") == config_of(base_folder)
    assert report.biases is not None and (report.biases["byte_equal"], report.biases["compared"]) == (30, 30)
    stated = manifest_of(tmp_path / "out")["biases"]
    assert stated["original"] == "base" and len(stated["restored"]) == 9 and len(stated["fingerprint"]) == 64
    assert torch.equal(logits(tmp_path / "out"), logits(base_folder))
    assert not torch.equal(logits(damaged), logits(base_folder)), "the control"


def test_it_may_stay_in_llamas_layout(base_folder, tmp_path):
    damaged = llamafied_and_stripped(base_folder, tmp_path / "damaged")
    convert(damaged, tmp_path / "out", Options(to="llama"), biases_from=base_folder)
    assert torch.equal(logits(tmp_path / "out"), logits(base_folder))


def test_zeros_are_lost_biases_and_trained_ones_are_not(base_copy, base_folder, tmp_path):
    """What transformers saves after it filled a missing bias; a fine-tuned weight and bias stay what they became."""
    lost, trained = "model.layers.0.self_attn.k_proj.bias", "model.layers.2.self_attn.q_proj.bias"

    def damage(state: dict[str, torch.Tensor]) -> None:
        state[lost] = torch.zeros_like(state[lost])
        state[trained] = state[trained] + 0.25
        state[WEIGHT] = state[WEIGHT] * 1.5

    rewrite(base_copy, damage)
    report = convert(base_copy, tmp_path / "out", biases_from=base_folder)
    before, out = hashes(base_copy), hashes(tmp_path / "out")
    assert {name for name in out if out[name] != before[name]} == {lost}
    assert out[lost] == hashes(base_folder)[lost]
    assert report.biases is not None and report.biases["restored"] == (lost,)
    assert report.biases["byte_equal"] == report.biases["compared"] - 2 == 36 and len(report.biases["kept"]) == 8


def test_every_weight_fine_tuned(base_copy, base_folder, tmp_path):
    """No matrix is the original's byte for byte, and all are its relatives."""
    generator = torch.Generator().manual_seed(5)
    rewrite(base_copy, lambda s: s.update({n: t + 0.1 * t.std() * noise(t, generator) for n, t in s.items()}))
    drop(base_copy, *QKV_BIASES)
    report = convert(base_copy, tmp_path / "out", biases_from=base_folder)
    assert report.biases is not None and report.biases["byte_equal"] == 0
    assert 0.98 < report.biases["median_cosine"] < 1


def noise(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator).to(like.dtype)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: write_tiny(path, seed=99), "its weights are strangers"),
        (lambda path: write_tiny(path, num_key_value_heads=4), "num_key_value_heads is 2, that of .* is 4"),
        (lambda path: write_tiny(path, num_hidden_layers=2, layer_types=None), "num_hidden_layers is 3"),
        (lambda path: write_tiny(path, rms_norm_eps=1e-5), "rms_norm_eps is 1e-06, that of .* is 1e-05"),
    ],
)
def test_another_model_is_refused(base_copy, tmp_path, make, words):
    drop(base_copy, *QKV_BIASES)
    other = make(tmp_path / "other")
    with pytest.raises(UserError, match=words) as refused:
        convert(base_copy, tmp_path / "out", biases_from=other)
    assert refused.value.exit_code == EXIT_FINDING and not (tmp_path / "out").exists()


def test_a_permuted_copy_is_refused(base_copy, base_folder, tmp_path):
    """Right shapes, every layer's weights in another layer's place."""

    def rotate(state: dict[str, torch.Tensor]) -> None:
        layers = {n: t for n, t in state.items() if n.startswith("model.layers.")}
        for name, tensor in layers.items():
            layer = int(name.split(".")[2])
            state[name.replace(f".{layer}.", f".{(layer + 1) % 3}.", 1)] = tensor

    rewrite(base_copy, rotate)
    drop(base_copy, *QKV_BIASES)
    with pytest.raises(UserError, match="strangers"):
        convert(base_copy, tmp_path / "out", biases_from=base_folder)


def test_other_damage_is_not_repaired(base_copy, base_folder, tmp_path):
    drop(base_copy, *QKV_BIASES)
    drop(base_copy, WEIGHT)
    with pytest.raises(UserError, match=f"{WEIGHT} is missing"):
        convert(base_copy, tmp_path / "out", biases_from=base_folder)
    put(base_copy, WEIGHT, torch.zeros(2, 2))
    with pytest.raises(UserError, match=f"{WEIGHT} has shape"):
        convert(base_copy, tmp_path / "out", biases_from=base_folder)


def test_an_original_without_biases_is_none(base_copy, tmp_path):
    drop(base_copy, *QKV_BIASES)
    other = Path(shutil.copytree(base_copy, tmp_path / "other"))
    with pytest.raises(UserError, match="other: 9 of 9 q/k/v biases are missing"):
        convert(base_copy, tmp_path / "out", biases_from=other)


def test_nothing_to_restore(base_copy, base_folder, tmp_path):
    with pytest.raises(UserError, match="has all its biases"):
        convert(base_copy, tmp_path / "out", biases_from=base_folder)


def test_another_spelling_of_the_config_is_no_other_model(base_copy, base_folder, tmp_path):
    drop(base_copy, *QKV_BIASES)
    edit_config(base_copy, rope_parameters=None, dtype=None, torch_dtype=None, max_position_embeddings=256)
    convert(base_copy, tmp_path / "out", biases_from=base_folder)
    assert hashes(tmp_path / "out") == hashes(base_folder)
    assert load_state(tmp_path / "out")["model.norm.weight"].dtype == torch.bfloat16
