"""Other people's trainers train a routed model as they train the unrouted one."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from qwen2tool.routing import stack as stack_module
from qwen2tool.routing.plan import find_stack, plan_routes
from qwen2tool.routing.stack import RoutedStack
from qwen2tool.routing.swap import route, unroute
from tests.routing.models import batch, fill_adapters, lora_model
from tests.tiny import write_tokenizer
from tests.tolerances import relative_error

STEPS = 6
CLOSE = 1e-4
"""Of losses, relative: fp32, dropout 0."""


@pytest.fixture
def fused(monkeypatch):
    """The layers that `fused_layer` ran, call by call."""
    calls, real = [], stack_module.fused_layer
    monkeypatch.setattr(
        stack_module, "fused_layer", lambda x, spec, *a, **k: calls.append(spec.index) or real(x, spec, *a, **k)
    )
    return calls


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def arguments(kind, folder, **changes):
    """Of any trainer: CPU, fp32, a learning rate at which a few steps show and rounding does not yet.

    AdamW's first steps have the size of the rate whatever the gradient's: at 5e-3 transformers' own eager and sdpa
    attention were 1.3e-4 apart after six steps.
    """
    fields = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 3, "learning_rate": 1e-3,
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False,
        "lr_scheduler_type": "constant", "seed": 1, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    return kind(**(fields | changes))


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_training(train, model, fused, steps=STEPS):
    """Trains a copy as it is, a routed one, and a routed one that lost an adapter, which must show."""
    plain, routed, wrong = model, copy.deepcopy(model), copy.deepcopy(model)
    expected = train(plain)
    assert not fused and len(expected) == steps and expected[-1] != expected[0]
    route(routed)
    found = train(routed)
    assert fused, "nothing was fused"
    assert max(abs(f / e - 1) for f, e in zip(found, expected, strict=True)) < CLOSE, (found, expected)
    for (name, p), (_, q) in zip(plain.named_parameters(), routed.named_parameters(), strict=True):
        assert relative_error(q, p) < 1e-2, name
    assert isinstance(find_stack(routed)[0], RoutedStack)
    route(wrong)
    find_stack(wrong)[0].layers[1].self_attn.v_proj.lora_B["default"].weight.data.zero_()
    assert max(abs(f / e - 1) for f, e in zip(train(wrong), expected, strict=True)) > CLOSE


def rows(count, mask=True):
    """Records of different lengths, padded on the right to 17; labels are the ids of the second half."""
    records = []
    for index, ids in enumerate(batch(count, 17, seed=2)):
        length = 17 - index % 5 if mask else 17
        seen = (torch.arange(17) < length).long()
        labels = torch.where((seen == 1) & (torch.arange(17) > 6), ids, -100)
        records.append({"input_ids": ids * seen, "attention_mask": seen, "labels": labels})
    return records


@pytest.mark.parametrize("checkpointing", [False, True], ids=["keeping", "checkpointing"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_transformers_trainer(checkpointing, accumulation, fused, tmp_path):
    def train(model):
        options = arguments(
            TrainingArguments, tmp_path, gradient_accumulation_steps=accumulation, gradient_checkpointing=checkpointing
        )
        return losses(Trainer(model=model, args=options, train_dataset=rows(24)))

    assert_same_training(train, lora_model(), fused)


def test_transformers_trainer_with_reference_layers_among_fused_ones(fused, tmp_path):
    model = lora_model(config={"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2})

    def train(model):
        return losses(Trainer(model=model, args=arguments(TrainingArguments, tmp_path), train_dataset=rows(24)))

    assert_same_training(train, model, fused)
    assert set(fused) == {0, 1}


def test_transformers_trainer_evaluates_saves_and_resumes(fused, tmp_path):
    """A checkpoint that a routed model left is one that an unrouted model resumes from."""
    model = lora_model()
    whole = copy.deepcopy(model)
    options = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    route(whole)
    trainer = Trainer(
        model=whole, args=arguments(TrainingArguments, tmp_path / "a", **options), train_dataset=rows(24),
        eval_dataset=rows(6),
    )  # fmt: skip
    expected = losses(trainer)
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 2
    resumed = Trainer(
        model=model, args=arguments(TrainingArguments, tmp_path / "b", **options), train_dataset=rows(24),
        eval_dataset=rows(6),
    )  # fmt: skip
    fused.clear()
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    found = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    assert not fused and len(found) == STEPS
    assert max(abs(f / e - 1) for f, e in zip(found, expected, strict=True)) < CLOSE
    unroute(whole)
    assert plan_routes(whole).counts == {"fused layer": 3}


WORDS = ["the", "model", "answers", "the", "question", "and", "the", "user", "reads", "the", "answer"]


def text(start, length):
    return " ".join(WORDS[(start + 5 * i) % len(WORDS)] for i in range(length))


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_trl_sft(packing, fused, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    records = datasets.Dataset.from_list(
        [{"prompt": text(i, 4 + i % 3) + " ", "completion": text(i + 1, 3 + i % 4)} for i in range(36)]
    )

    def train(model):
        options = arguments(
            trl.SFTConfig, tmp_path, max_length=48, packing=packing, dataset_num_proc=None, gradient_checkpointing=False
        )
        return losses(trl.SFTTrainer(model=model, args=options, train_dataset=records, processing_class=tokenizer))

    assert_same_training(train, lora_model(), fused)


def test_trl_dpo(fused, tokenizer, tmp_path):
    """The reference is the model with its adapter switched off."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    records = datasets.Dataset.from_list(
        [
            {"prompt": text(i, 4 + i % 3) + " ", "chosen": text(i + 1, 3 + i % 4), "rejected": text(i + 2, 2 + i % 5)}
            for i in range(24)
        ]
    )

    def train(model):
        options = arguments(trl.DPOConfig, tmp_path, max_length=48, learning_rate=1e-3, gradient_checkpointing=False)
        return losses(trl.DPOTrainer(model=model, args=options, train_dataset=records, processing_class=tokenizer))

    model = lora_model()
    fill_adapters(model, seed=8)
    assert_same_training(train, model, fused)
