"""A number that is not finite stops the run with its step and records; nothing is stepped, logged or saved from it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

from qwen2tool.errors import EXIT_FINDING, UserError
from qwen2tool.routing.attention import safe_attention
from qwen2tool.training.guard import Whereabouts, norms_of, on_host, require_finite_gradients, require_finite_loss
from qwen2tool.training.run import train
from qwen2tool.training.trainer import GuardedTrainer, SftTrainer
from tests.training.common import settings_for, write_instructions


@pytest.fixture
def folder(tmp_path):
    write_instructions(tmp_path / "data.jsonl")
    return tmp_path


def logged(folder):
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def poison_gradient(monkeypatch, at_step):
    """One NaN in one gradient of step `at_step`, as cuDNN's masked backward leaves it; the loss stays finite."""
    honest = SftTrainer.batch_loss

    def poisoned(self, model, batch):
        loss = honest(self, model, batch)["loss"]
        if self.state.global_step + 1 == at_step:
            weight = next(p for n, p in model.named_parameters() if "layers.1.self_attn.q_proj.lora_B" in n)
            loss = loss + 0 * torch.sqrt(weight.flatten()[0] * 0)  # d sqrt(x) at 0 is infinite, times 0 is NaN
        return {"loss": loss}

    monkeypatch.setattr(SftTrainer, "batch_loss", poisoned)


def test_a_nan_gradient_stops_the_run(base_folder, folder, monkeypatch):
    poison_gradient(monkeypatch, at_step=3)
    with pytest.raises(UserError) as caught:
        train(settings_for(base_folder, folder, epochs=2, save_steps=1))
    message = str(caught.value)
    assert (
        "step 3, batch of " in message
        and "data.jsonl line" in message
        and "layers.1.self_attn.q_proj.lora_B" in message
    )
    assert caught.value.exit_code == EXIT_FINDING
    assert [entry["step"] for entry in logged(folder)] == [1, 2]
    assert not (folder / "run" / "adapter").exists()
    saved = sorted((folder / "run" / "checkpoints").iterdir())
    assert [path.name for path in saved] == ["checkpoint-1", "checkpoint-2"]
    for path in saved:
        assert all(t.isfinite().all() for t in load_file(path / "adapter_model.safetensors").values())


def test_without_the_guard_the_same_run_saves_nan(base_folder, folder, monkeypatch):
    """The negative control: transformers alone trains through, and what it saves is ruined."""
    poison_gradient(monkeypatch, at_step=3)
    for check in ("require_finite_loss", "require_finite_gradients"):
        monkeypatch.setattr(f"qwen2tool.training.trainer.{check}", lambda *_: None)
    monkeypatch.setattr(GuardedTrainer, "_save", Trainer._save)
    monkeypatch.setattr("qwen2tool.training.model.require_finite_weights", lambda model: None)
    train(settings_for(base_folder, folder, epochs=2))
    saved = load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
    assert any(not t.isfinite().all() for t in saved.values())


def test_a_nan_loss_stops_the_first_step(base_copy, folder):
    shard = base_copy / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    tensors["model.norm.weight"][5] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"step 1, batch of .*data.jsonl line .*: the loss is nan"):
        train(settings_for(base_copy, folder))
    assert not (folder / "run" / "metrics.jsonl").exists() and not (folder / "run" / "adapter").exists()


def test_weights_that_overflowed_are_not_saved(base_folder, folder, monkeypatch):
    def explode(self, *args, **kwargs):
        result = Trainer.train(self, *args, **kwargs)
        next(p for p in self.model.parameters() if p.requires_grad).data[0, 0] = float("inf")
        return result

    monkeypatch.setattr(GuardedTrainer, "train", explode, raising=False)
    with pytest.raises(UserError, match="not finite after the last step"):
        train(settings_for(base_folder, folder))
    assert not (folder / "run" / "adapter").exists()


def test_attention_guard_excludes_cudnn_and_leaves_the_process_as_it_was():
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
    assert before[0], "torch's default, or this test shows nothing"
    with safe_attention():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    assert (torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()) == before


def test_numbers_are_fetched_with_their_names():
    values = {"loss": torch.tensor(1.5), "several": torch.tensor([0.1, -3.0]), "none": torch.zeros(0)}
    found = on_host(values | {"norms": norms_of([torch.tensor([3.0, 4.0]), torch.full((2, 2), 0.5)])})
    assert found == {"loss": [1.5], "several": values["several"].tolist(), "none": [], "norms": [5.0, 1.0]}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_of_a_gradient_shows_in_its_norm(bad):
    gradients = [torch.ones(3, 5), torch.ones(7)]
    names, where = ["a", "b"], Whereabouts(["line 1"])
    require_finite_gradients(dict(zip(names, norms_of(gradients).tolist(), strict=True)), where)
    gradients[1][4] = bad
    where.enter(3, [0])
    with pytest.raises(
        UserError, match=r"step 3, batch of line 1: the gradient of b is not finite \(nor are 0 more of 2"
    ):
        require_finite_gradients(dict(zip(names, norms_of(gradients).tolist(), strict=True)), where)
    with pytest.raises(UserError, match="step 3, batch of line 1: the loss is"):
        require_finite_loss(bad, where)
