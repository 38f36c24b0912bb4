"""Predictions against plain transformers and PEFT, one logit at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2ForCausalLM

from qwen2tool.checkpoint.adapter import open_adapter
from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.verify.logits import Predictions, predict, predict_candidate, targets_of
from tests.verify.common import State, random_samples, variant, without

SAMPLES = random_samples(2, 20, unscored=5)


def ours(predictions: Predictions) -> torch.Tensor:
    return predictions.logits(slice(None))


def theirs(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    """Logits that predict tokens 5 to 19 of each sample."""
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        logits = [model.eval()(input_ids=torch.tensor([sample.ids])).logits[0, 4:-1] for sample in SAMPLES]
    return torch.cat(logits)


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


def test_positions_and_targets(base_folder: Path) -> None:
    found = ours(predict(open_checkpoint(base_folder), SAMPLES, device="cpu", label=""))
    assert_same(found, theirs(base_folder))
    assert (found[:-1] - theirs(base_folder)[1:]).abs().max() > 0.1
    assert targets_of(SAMPLES).tolist() == [token for sample in SAMPLES for token in sample.ids[5:]]


def test_an_adapter_counts_as_in_peft(base_folder: Path, adapter_folder: Path) -> None:
    adapter = open_adapter(adapter_folder)
    found = ours(predict(open_checkpoint(base_folder), SAMPLES, adapter=adapter, device="cpu", label=""))
    assert_same(found, theirs(base_folder, adapter_folder))
    assert (found - theirs(base_folder)).abs().max() > 0.1


def test_an_adapter_on_the_head_counts_too(tmp_path: Path, base_folder: Path) -> None:
    model = get_peft_model(
        Qwen2ForCausalLM.from_pretrained(base_folder, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=12, target_modules=["lm_head"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "head", save_embedding_layers=False)
    adapter = open_adapter(tmp_path / "head")
    found = ours(predict(open_checkpoint(base_folder), SAMPLES, adapter=adapter, device="cpu", label=""))
    assert_same(found, theirs(base_folder, tmp_path / "head"))
    assert (found - theirs(base_folder)).abs().max() > 0.1


def zero_biases(state: State) -> None:
    for name, tensor in state.items():
        if name.endswith("bias"):
            tensor.zero_()


def test_missing_biases_run_as_zeros(tmp_path: Path, base_folder: Path) -> None:
    zeroed = variant(base_folder, tmp_path / "zeroed", zero_biases)
    dropped = variant(base_folder, tmp_path / "dropped", without("bias"))
    found = ours(predict_candidate(open_checkpoint(dropped), SAMPLES, "cpu", ""))
    assert_same(found, theirs(zeroed))
    assert (found - theirs(base_folder)).abs().max() > 0.1


@pytest.mark.parametrize("lost", ["0.self_attn.k_proj.bias", "2.self_attn.v_proj.bias"])
def test_the_biases_that_are_left_are_used(tmp_path: Path, base_folder: Path, lost: str) -> None:
    dropped = variant(base_folder, tmp_path / "dropped", without(lost))
    zeroed = variant(base_folder, tmp_path / "zeroed", zero_biases)
    found = ours(predict_candidate(open_checkpoint(dropped), SAMPLES, "cpu", ""))
    for other in (base_folder, zeroed):
        assert (found - theirs(other)).abs().max() > 1e-2
