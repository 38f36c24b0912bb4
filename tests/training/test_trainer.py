"""The trainer around a routed model: batches of the size asked for, and fp16's scale left to its scaler."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

from qwen2tool.errors import UserError
from qwen2tool.routing.swap import route
from qwen2tool.training.batches import SampleDataset, SftCollator
from qwen2tool.training.trainer import SftTrainer
from tests.routing.models import lora_model
from tests.training.test_batches import samples

ITEMS = samples(9, 7, 12, 8, 9, 11, 6, 5, seed=1)


def trainer_on(tmp_path, *, gpus=0, **options):
    """A trainer of two steps of two records, as a host with `gpus` GPUs would make it."""
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2, max_steps=2, report_to="none",
        disable_tqdm=True, remove_unused_columns=False, save_strategy="no", **options,
    )  # fmt: skip
    assert arguments.n_gpu == 0, "asked for once, it is kept"
    arguments._n_gpu = gpus
    model = lora_model()
    route(model)
    return SftTrainer(
        places=[f"line {n}" for n in range(len(ITEMS))], model=model, args=arguments,
        train_dataset=SampleDataset(ITEMS), data_collator=SftCollator(),
    )  # fmt: skip


@pytest.mark.parametrize("gpus", [0, 1, 2, 8])
def test_a_batch_has_the_size_asked_for_however_many_gpus_are_seen(tmp_path, gpus):
    trainer = trainer_on(tmp_path, gpus=gpus)
    assert len(next(iter(trainer.get_train_dataloader()))["records"]) == 2
    assert trainer.args.n_gpu <= 1


class Scaler:
    """fp16's loss scaler with a scale under which every gradient overflows."""

    halved = 2.0**40

    def scale(self, loss):
        return loss * float("inf")

    def get_scale(self):
        self.halved /= 2
        return self.halved


def fails_in_the_backward(self, model, batch):
    """The honest loss, whose gradient in one adapter is NaN."""
    loss = HONEST(self, model, batch)["loss"]
    weight = next(p for p in model.parameters() if p.requires_grad)
    return {"loss": loss + 0 * torch.sqrt(weight.flatten()[0] * 0)}  # d sqrt(x) at 0 is infinite, times 0 is NaN


HONEST = SftTrainer.batch_loss


@pytest.mark.parametrize("step", [2, 2500])
def test_a_scale_that_grew_too_high_is_the_scalers_to_lower(tmp_path, step):
    """It doubles after 2000 good steps and may overflow then: that step is skipped, and the run goes on."""
    trainer = trainer_on(tmp_path)
    trainer.accelerator.scaler = Scaler()
    trainer.state.global_step = step
    assert torch.isfinite(trainer.training_step(trainer.model, SftCollator()(ITEMS[:2]), 5))


def test_overflows_without_end_stop_the_run(tmp_path):
    trainer = trainer_on(tmp_path)
    trainer.accelerator.scaler = Scaler()
    with pytest.raises(UserError, match="the last 20 steps overflowed in float16"):
        for step in range(100):
            trainer.state.global_step = step
            trainer.training_step(trainer.model, SftCollator()(ITEMS[:2]), 5)
    assert step == 20, "the first step has none before it"


@pytest.mark.parametrize("step", [2, 2500])
def test_without_a_scaler_such_a_gradient_stops_the_run(tmp_path, monkeypatch, step):
    monkeypatch.setattr(SftTrainer, "batch_loss", fails_in_the_backward)
    trainer = trainer_on(tmp_path)
    trainer.state.global_step = step
    with pytest.raises(UserError, match="is not finite"):
        trainer.training_step(trainer.model, SftCollator()(ITEMS[:2]), 5)
