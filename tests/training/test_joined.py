"""Several micro-batches of a step in one pass are the same step: its loss, gradients and records, in their order."""

from __future__ import annotations

import json
from dataclasses import replace
from math import ceil

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from qwen2tool.routing.swap import route
from qwen2tool.training import run
from qwen2tool.training.batches import DpoCollator, SampleDataset, SftCollator
from qwen2tool.training.fast import join, share_memory
from qwen2tool.training.model import place
from qwen2tool.training.trainer import DpoTrainer, GuardedTrainer, SftTrainer
from tests.routing.models import lora_model
from tests.routing.test_memory import LARGE, SMALL
from tests.tolerances import relative_error
from tests.training.common import settings_for, write_instructions, write_preferences
from tests.training.test_batches import samples

SIXTEEN = samples(9, 30, 12, 8, 3, 11, 26, 5, 14, 2, 40, 7, 19, 6, 22, 10, seed=1)
OTHERS = samples(5, 12, 8, 9, 4, 6, 13, 7, 21, 3, 8, 18, 2, 30, 5, 9, seed=2)
PAIRS = [(a, b, -20.0 - 9 * n, -30.0) for n, (a, b) in enumerate(zip(SIXTEEN, OTHERS, strict=True))]
EXACT = 1e-9
"""In float64 only the order of sums differs."""


def trainer_of(tmp_path, joined, *, pairs=False, fill=False, **changes):
    """A float64 trainer of steps of 4 x 4 records, `joined` micro-batches of which are one pass."""
    settings = settings_for("none", tmp_path, batch_size=4, gradient_accumulation=4, **changes)
    arguments = run.trainer_arguments(settings, place(settings), tmp_path / "run", joined=joined)
    model = lora_model(dtype=torch.float64)
    route(model)
    common = {"places": [f"line {n}" for n in range(16)], "model": model, "args": arguments}
    if pairs:
        collator = DpoCollator(32 if fill else None)
        return DpoTrainer(beta=0.1, train_dataset=SampleDataset(PAIRS), data_collator=collator, **common)
    collator = SftCollator(16 if fill else None)
    return SftTrainer(train_dataset=SampleDataset(SIXTEEN), data_collator=collator, **common)


def step_of(trainer, records, *, alone=False):
    """(loss, gradients by name) of an optimizer step over `records`, in batches of the trainer's size."""
    trainer.model.zero_grad()
    size = trainer.args.per_device_train_batch_size
    made = [trainer.data_collator(records[start : start + size]) for start in range(0, len(records), size)]
    batches, count = trainer.get_batch_samples(iter(made), len(made), torch.device("cpu"))
    assert len(batches) == -(-len(records) // size)
    counts = [trainer.weight(batch) * len(batches) if alone else count for batch in batches]
    loss = sum(trainer.training_step(trainer.model, *pair) for pair in zip(batches, counts, strict=True))
    return loss, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fill", [False, True], ids=["as it is", "filled up"])
@pytest.mark.parametrize("pairs", [False, True], ids=["sft", "dpo"])
@pytest.mark.parametrize("count", [16, 13])
def test_the_step_is_the_same(tmp_path, pairs, fill, count):
    records = (PAIRS if pairs else SIXTEEN)[:count]
    loss, gradients = step_of(trainer_of(tmp_path, 1, pairs=pairs), records)
    assert len(gradients) == 3 * 7 * 2 and all(value.abs().max() > 0 for value in gradients.values())
    for joined in (2, 4):
        trainer = trainer_of(tmp_path, joined, pairs=pairs, fill=fill)
        joined_loss, joined_gradients = step_of(trainer, records)
        assert relative_error(joined_loss, loss) < EXACT
        assert joined_gradients.keys() == gradients.keys()
        assert max(relative_error(joined_gradients[name], gradients[name]) for name in gradients) < EXACT


def test_a_mean_over_each_micro_batch_alone_would_show(tmp_path):
    """The control: dividing by a micro-batch's own scored tokens, the sum then by the number of micro-batches."""
    loss, gradients = step_of(trainer_of(tmp_path, 4), SIXTEEN)
    other_loss, other = step_of(trainer_of(tmp_path, 1), SIXTEEN, alone=True)
    assert relative_error(other_loss, loss) > 1e-4
    assert min(relative_error(other[name], gradients[name]) for name in gradients) > 1e-3


def records_of_steps(monkeypatch, tmp_path, count, joined, **changes):
    """The records of each optimizer step that the Trainer's loop makes, and the rates it makes them with."""
    steps, rates = {}, []

    def note(self, model, inputs, number=None):
        steps.setdefault(self.state.global_step, []).extend(inputs["records"])
        rates.append((self.state.global_step, self.lr_scheduler.get_last_lr()[0]))
        return torch.tensor(0.0)

    monkeypatch.setattr(GuardedTrainer, "training_step", note)
    trainer = trainer_of(tmp_path, joined, **changes)
    trainer.train_dataset = SampleDataset(samples(*[3] * count))
    trainer.train()
    return [steps[number] for number in range(trainer.state.global_step)], sorted(set(rates))


@pytest.mark.parametrize("count", [3, 17, 31, 900])
@pytest.mark.parametrize("changes", [{"epochs": 1.5}, {"max_steps": 3}], ids=str)
def test_every_step_holds_the_same_records_in_the_same_order(monkeypatch, tmp_path, count, changes):
    """Also the last, smaller one of an epoch, and where the micro-batches do not fill the last pass of a step."""
    single, rates = records_of_steps(monkeypatch, tmp_path, count, 1, **changes)
    epoch = ceil(count / 16)
    assert len(single) == changes.get("max_steps", ceil(changes.get("epochs", 0) * epoch))
    if len(single) >= epoch:
        assert sorted(record for step in single[:epoch] for record in step) == list(range(count))
    for joined in (2, 4):
        assert records_of_steps(monkeypatch, tmp_path, count, joined, **changes) == (single, rates)
    other, _ = records_of_steps(monkeypatch, tmp_path, count, 1, **changes, seed=4)
    assert other != single, "another seed is another order"


def joining(monkeypatch, joined):
    """Runs go on with `joined` micro-batches a pass, as on a GPU that has the room."""
    honest = run.put_on_fast_path
    monkeypatch.setattr(run, "put_on_fast_path", lambda *a, **o: honest(*a, **o)._replace(joined=joined))


def adapter_of(folder):
    return load_file(folder / "run" / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_a_whole_run_and_what_it_says(base_folder, tmp_path, monkeypatch, task, capsys):
    (write_instructions if task == "sft" else write_preferences)(tmp_path / "data.jsonl", 11)
    found = []
    for joined in (1, 4):
        joining(monkeypatch, joined)
        settings = settings_for(base_folder, tmp_path, task=task, gradient_accumulation=4, epochs=2)
        report = run.train(settings, overwrite=True)
        said = capsys.readouterr().err
        assert ("4 micro-batches a pass" in said) == (joined == 4) and report.steps == 4
        written = json.loads((tmp_path / "run" / "report.json").read_text())
        assert written["routes"]["micro_batches_a_pass"] == joined
        found.append((adapter_of(tmp_path), report.last_loss, report.tokens))
    assert found[0][1:] == pytest.approx(found[1][1:], rel=1e-4)
    assert max((found[0][0][name] - found[1][0][name]).abs().max() for name in found[0][0]) < 2e-3


def test_a_run_resumes_with_another_number(base_folder, tmp_path, monkeypatch):
    """Memory that was free then may not be now: the checkpoint's next records come next, whatever the number."""
    write_instructions(tmp_path / "data.jsonl", 37)
    settings = settings_for(base_folder, tmp_path, gradient_accumulation=4, epochs=2, save_steps=3)
    joining(monkeypatch, 4)
    run.train(settings)
    whole = adapter_of(tmp_path)
    finish, saved = Trainer._save_checkpoint, []

    def die_after_saving(self, *arguments, **options):
        finish(self, *arguments, **options)
        saved.append(self.state.global_step)
        if saved[-1] == 6:  # in the second epoch of five steps each
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", die_after_saving)
        with pytest.raises(KeyboardInterrupt):
            run.train(settings, overwrite=True)
    joining(monkeypatch, 2)
    run.train(settings, resume=True)
    resumed = adapter_of(tmp_path)
    assert max((whole[name] - resumed[name]).abs().max() for name in whole) < 2e-3


PACKED = replace(SMALL, packed=True)


def choice(sizes, tokens, budget, *, as_kept=False, **changes):
    """(how many are joined, the plans to choose from)"""
    options = {"recompute": "auto", "host": True, "graphs": True, "many_shapes": True} | changes
    sized = {count: replace(sizes, tokens=n) for count, n in tokens.items()}
    plans = {count: share_memory(each, budget, **options) for count, each in sized.items()}
    return join(plans, sized, budget, as_kept=as_kept), plans


HALF_B = {1: 1024, 2: 2048, 4: 4096}


@pytest.mark.parametrize("sizes", [SMALL, PACKED], ids=["16 bit", "nf4"])
@pytest.mark.parametrize("as_kept", [True, False])
def test_all_are_joined_where_everything_fits(as_kept, sizes):
    assert choice(sizes, HALF_B, 80 * 10**9, as_kept=as_kept)[0] == 4
    eager, plans = choice(sizes, HALF_B, 80 * 10**9, as_kept=as_kept, graphs=False)
    assert eager == 4 and not plans[4].graphs, "without graphs launches weigh more still"
    assert choice(sizes, {1: 1024, 2: 2048}, 80 * 10**9, as_kept=as_kept)[0] == 2


def test_a_budget_that_one_asked_for_may_be_paid_with_recomputation():
    """At 0.5B a pass's own time is worth more than what it computes again; without need nothing is computed again."""
    joined, plans = choice(SMALL, HALF_B, 3 * 10**9)
    assert set(plans[1].memory.keep) == {"all"} and set(plans[4].memory.keep) != {"all"} and plans[4].graphs
    assert joined == 4
    joined, _ = choice(SMALL, HALF_B, 3 * 10**9, as_kept=True)
    assert set(plans[joined].memory.keep) == {"all"} and joined < 4


def test_a_large_model_does_not_pay_for_launches_with_products():
    joined, plans = choice(LARGE, {1: 2048, 2: 4096, 4: 8192}, 21 * 10**9)
    assert all(shared.graphs and shared.memory.estimate <= 21 * 10**9 for shared in plans.values())
    assert plans[4].memory.saved / 4 < plans[1].memory.saved
    assert joined < 4


@pytest.mark.parametrize("sizes", [SMALL, PACKED], ids=["16 bit", "nf4"])
def test_neither_the_budget_nor_graphs_are_given_up(sizes):
    smallest = {count: shared.memory.estimate for count, shared in choice(sizes, HALF_B, 0)[1].items()}
    for budget in range(smallest[1], 2 * smallest[4], smallest[1] // 20):
        joined, plans = choice(sizes, HALF_B, budget)
        assert plans[joined].memory.estimate <= budget and plans[joined].graphs >= plans[1].graphs
    assert choice(sizes, HALF_B, 0)[0] == 1, "where nothing fits"
