"""A loss has a price on it: measured layer by layer as transformers would run it, in the manifest and on the card."""

from __future__ import annotations

from math import exp

import pytest
import torch
from transformers import Qwen2ForCausalLM

from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.convert import lossy
from qwen2tool.convert.lossy import NO_TOKENIZER, TEXT, measure
from qwen2tool.convert.read import open_qwen2
from qwen2tool.convert.run import Options, convert
from qwen2tool.errors import UserError
from tests.checkpoint.edits import edit_config, load_state, put, rewrite
from tests.convert.common import YARN, config_of, hashes, manifest_of
from tests.tiny import write_tiny

DROPPED = Options(to="llama", drop_biases=True, allow_lossy=True)


def figures(before, after, samples) -> tuple[float, float, float, float]:
    """(mean KLD, same top-1, perplexities) by transformers' own models, whole, and plain arithmetic in float64."""
    divergence, same, losses = [], [], ([], [])
    for ids in samples:
        tokens = torch.tensor([ids])
        with torch.no_grad():
            sides = [m(tokens).logits[0, :-1].double().log_softmax(-1) for m in (before, after)]
        divergence.append((sides[0].exp() * (sides[0] - sides[1])).sum(-1))
        same.append(sides[0].argmax(-1) == sides[1].argmax(-1))
        for loss, side in zip(losses, sides, strict=True):
            loss.append(-side[torch.arange(len(ids) - 1), tokens[0, 1:]])
    means = [torch.cat(values).double().mean().item() for values in (divergence, same, *losses)]
    return means[0], means[1], exp(means[2]), exp(means[3])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"rope_parameters": YARN},
        {"use_sliding_window": True, "sliding_window": 8},
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    ],
    ids=["plain", "tied", "yarn", "sliding", "mha"],
)
def test_figures_are_those_of_the_whole_model(tmp_path, changes):
    base = write_tiny(tmp_path / "base", **changes)
    if "rope_parameters" in changes:
        edit_config(base, rope_scaling={key: value for key, value in YARN.items() if key != "rope_theta"})
    other = write_tiny(tmp_path / "other", **changes)
    edit_config(other, **{key: config_of(base)[key] for key in ("rope_scaling",) if key in config_of(base)})
    name = "model.layers.1.self_attn.v_proj.bias"
    put(other, name, load_state(other)[name] * 0.9)
    damage = measure(open_qwen2(base), open_qwen2(other), base, "one bias scaled")
    models = [Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (base, other)]
    samples, text = lossy._samples(base, 384)
    kld, same, before, after = figures(*models, samples)
    assert damage.mean_kld == pytest.approx(kld, rel=1e-3) and kld > 1e-5
    assert damage.same_top1 == pytest.approx(same, abs=2e-3) and same < 1
    assert damage.perplexity_before == pytest.approx(before, rel=1e-5)
    assert damage.perplexity_after == pytest.approx(after, rel=1e-5) and after != before
    assert text == damage.text == TEXT and damage.tokens == sum(len(ids) - 1 for ids in samples) > 900


def test_a_model_is_no_damage_to_itself(base_folder):
    damage = measure(open_qwen2(base_folder), open_qwen2(base_folder), base_folder, "nothing")
    assert (damage.mean_kld, damage.same_top1) == (0.0, 1.0)
    assert damage.perplexity_before == damage.perplexity_after


def test_dropped_biases_are_measured_and_written_down(base_folder, tmp_path):
    report = convert(base_folder, tmp_path / "out", DROPPED)
    assert report.damage is not None and report.damage == manifest_of(tmp_path / "out")["damage"]
    assert report.damage["what"] == "all 9 q, k and v biases"
    assert report.damage["mean_kld"] > 0.05 and report.damage["same_top1"] < 0.9
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**Something was lost on the way: all 9 q, k and v biases.**" in card and "# out" in card
    assert f"{report.damage['perplexity_after']:,.4g}" in card and str(tmp_path) not in card
    assert config_of(tmp_path / "out")["attention_bias"] is False
    assert not [name for name in open_checkpoint(tmp_path / "out").tensors if name.endswith("bias")]
    with pytest.raises(UserError, match="9 of 9 q/k/v biases are missing"):
        convert(tmp_path / "out", tmp_path / "back")
    convert(tmp_path / "out", tmp_path / "whole", biases_from=base_folder)
    assert hashes(tmp_path / "whole") == hashes(base_folder)


def test_a_rounding_is_measured_only_where_one_was(base_folder, tmp_path):
    """fp16 cannot hold the smallest bf16 numbers; fp32 can hold all of them."""
    rounded = convert(base_folder, tmp_path / "fp16", Options(dtype="float16", allow_lossy=True))
    assert rounded.damage is not None and rounded.damage["what"] == "numbers rounded to float16"
    assert 0 <= rounded.damage["mean_kld"] < 1e-6 and (tmp_path / "fp16" / "README.md").is_file()
    whole = convert(base_folder, tmp_path / "fp32", Options(dtype="float32", allow_lossy=True))
    assert whole.damage is None and not (tmp_path / "fp32" / "README.md").exists()


def test_without_a_tokenizer(base_copy, tmp_path):
    for file in base_copy.glob("tokenizer*"):
        file.unlink()
    report = convert(base_copy, tmp_path / "out", DROPPED)
    assert report.damage is not None and report.damage["text"] == NO_TOKENIZER and report.damage["tokens"] == 1020


def test_packing_error_is_per_matrix(base_copy, tmp_path):
    """One matrix of large outliers among small numbers is named as the worst; by hand from the two folders."""
    name = "model.layers.2.mlp.down_proj.weight"

    def outliers(state: dict[str, torch.Tensor]) -> None:
        state[name][:, ::64] *= 40

    rewrite(base_copy, outliers)
    report = convert(base_copy, tmp_path / "nf4", Options(to="nf4"))
    convert(tmp_path / "nf4", tmp_path / "back")
    mine, theirs = load_state(base_copy)[name].float(), load_state(tmp_path / "back")[name].float()
    assert report.damage is not None and report.damage["worst"] == name
    assert report.damage["worst_relative_error"] == pytest.approx(float((mine - theirs).norm() / mine.norm()), rel=1e-5)
