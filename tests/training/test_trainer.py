"""The trainer around a routed model: batches of the size asked for, pairs and tokens of a step that weigh the same, and
fp16's scale left to its scaler."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

from qwen2tool.errors import UserError
from qwen2tool.routing.swap import route
from qwen2tool.training.batches import DpoCollator, SampleDataset, SftCollator
from qwen2tool.training.trainer import DpoTrainer, SftTrainer
from tests.routing.models import lora_model
from tests.training.test_batches import samples

ITEMS = samples(9, 7, 12, 8, 9, 11, 6, 5, seed=1)


PAIRS = [
    (chosen, rejected, -20.0 - 9 * n, -30.0)
    for n, (chosen, rejected) in enumerate(zip(ITEMS, samples(5, 12, 8, 9, 4, 6, 13, 7, seed=2), strict=True))
]
"""With reference log-probs that make losses and gradients of very different sizes."""


def trainer_on(tmp_path, *, gpus=0, pairs=False, fill=None, **options):
    """A trainer of two steps of two records, as a host with `gpus` GPUs would make it."""
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2, max_steps=2, report_to="none",
        disable_tqdm=True, remove_unused_columns=False, save_strategy="no", **options,
    )  # fmt: skip
    assert arguments.n_gpu == 0, "asked for once, it is kept"
    arguments._n_gpu = gpus
    model = lora_model()
    route(model)
    common = {"places": [f"line {n}" for n in range(len(ITEMS))], "model": model, "args": arguments}
    if pairs:
        return DpoTrainer(beta=0.1, train_dataset=SampleDataset(PAIRS), data_collator=DpoCollator(fill), **common)
    return SftTrainer(train_dataset=SampleDataset(ITEMS), data_collator=SftCollator(fill), **common)


def gradient_of_step(trainer, *batches):
    """(loss, gradient of all adapters in one) of an optimizer step over `batches` of records."""
    trainer.model.zero_grad()
    made = [trainer.data_collator(batch) for batch in batches]
    found, count = trainer.get_batch_samples(iter(made), len(made), torch.device("cpu"))
    loss = sum(trainer.training_step(trainer.model, batch, count) for batch in found)
    return loss, torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("fill", [None, 12])
def test_every_pair_of_a_step_weighs_the_same_however_it_is_cut_into_batches(tmp_path, fill):
    """The last batch of an epoch is smaller: 4 + 2 pairs are the mean of six, not of two means."""
    trainer = trainer_on(tmp_path, pairs=True, fill=fill)
    alone = [gradient_of_step(trainer, [pair]) for pair in PAIRS[:6]]
    losses, gradients = (torch.stack(values) for values in zip(*alone, strict=True))
    loss, gradient = gradient_of_step(trainer, PAIRS[:4], PAIRS[4:6])
    assert loss.item() == pytest.approx(losses.mean().item(), rel=1e-5)
    torch.testing.assert_close(gradient, gradients.mean(0), rtol=1e-4, atol=1e-5)
    means = (losses[:4].mean() + losses[4:].mean()) / 2
    assert abs(means - losses.mean()) > 0.05, "the pairs must tell the two averages apart"
    assert (gradients[:4].mean(0) / 2 + gradients[4:].mean(0) / 2 - gradients.mean(0)).abs().max() > 1e-3


@pytest.mark.parametrize("gpus", [0, 1, 2, 8])
def test_a_batch_has_the_size_asked_for_however_many_gpus_are_seen(tmp_path, gpus):
    trainer = trainer_on(tmp_path, gpus=gpus)
    assert len(next(iter(trainer.get_train_dataloader()))[0]["records"]) == 2
    assert trainer.args.n_gpu <= 1


@pytest.mark.parametrize("fill", [None, 12])
@pytest.mark.parametrize("pairs", [False, True])
def test_tokens_are_those_of_the_records_without_what_fills_up(tmp_path, pairs, fill):
    trainer = trainer_on(tmp_path, pairs=pairs, fill=fill)
    records = PAIRS if pairs else ITEMS
    gradient_of_step(trainer, records[:3], records[3:5])
    sides = [pair[:2] if pairs else (pair,) for pair in records[:5]]
    assert trainer.tokens == sum(len(sample.ids) for side in sides for sample in side)
    if fill:
        assert len(trainer.data_collator(records[:3])[0]["input_ids"]) > trainer.tokens


def test_a_pass_trains_whatever_scored_the_model_before(tmp_path):
    """Every module of it, also where the model's own flag says so already: a wrapper is made in training mode."""
    trainer = trainer_on(tmp_path)
    modes = []

    honest = trainer.batch_loss

    def noted(model, batch):
        modes.append(all(part.training for part in model.modules()))
        return honest(model, batch)

    trainer.batch_loss = noted
    trainer.model.eval()
    trainer.model.training = True
    gradient_of_step(trainer, ITEMS[:2])
    trainer.model.eval()
    assert not any(part.training for part in trainer.model.modules())
    gradient_of_step(trainer, ITEMS[:2])
    assert modes == [True, True]


def test_operations_are_counted_as_the_trainer_does(tmp_path):
    trainer = trainer_on(tmp_path)
    for count in (2, 3):
        (batch,) = trainer.data_collator(ITEMS[:count])
        one = Trainer.floating_point_ops(trainer, batch)
        assert trainer.floating_point_ops([batch, batch]) == 2 * one > 0


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
