"""A step cut into passes by tokens is the same step: its loss, gradients and records, in their order."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from math import ceil

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from qwen2tool.routing.swap import route
from qwen2tool.training import evaluate, run
from qwen2tool.training.batches import DpoCollator, SampleDataset, SftCollator, bucket, cut, parts
from qwen2tool.training.fast import MOST_TOKENS, best_cut, cuts, share_memory
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


def trainer_of(tmp_path, most, *, pairs=False, fill=False, **changes):
    """A float64 trainer of steps of 4 x 4 records, cut into passes of `most` tokens, None: a micro-batch is one."""
    settings = settings_for("none", tmp_path, batch_size=4, gradient_accumulation=4, **changes)
    whole = most is not None
    arguments = run.trainer_arguments(settings, place(settings), tmp_path / "run", whole_steps=whole)
    model = lora_model(dtype=torch.float64)
    route(model)
    common = {"places": [f"line {n}" for n in range(16)], "model": model, "args": arguments}
    if pairs:
        collator = DpoCollator(32 if fill else None, most)
        return DpoTrainer(beta=0.1, train_dataset=SampleDataset(PAIRS), data_collator=collator, **common)
    collator = SftCollator(16 if fill else None, most)
    return SftTrainer(train_dataset=SampleDataset(SIXTEEN), data_collator=collator, **common)


def step_of(trainer, records, *, alone=False):
    """(loss, gradients by name) of an optimizer step over `records`, in batches of the trainer's size."""
    trainer.model.zero_grad()
    size = trainer.args.per_device_train_batch_size
    made = [trainer.data_collator(records[start : start + size]) for start in range(0, len(records), size)]
    batches, count = trainer.get_batch_samples(iter(made), len(made), torch.device("cpu"))
    assert len(batches) == -(-len(records) // size)
    counts = [sum(map(trainer.weight, batch)) * len(batches) if alone else count for batch in batches]
    loss = sum(trainer.training_step(trainer.model, *pair) for pair in zip(batches, counts, strict=True))
    return loss, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fill", [False, True], ids=["as it is", "filled up"])
@pytest.mark.parametrize("pairs", [False, True], ids=["sft", "dpo"])
@pytest.mark.parametrize("count", [16, 13])
def test_the_step_is_the_same(tmp_path, pairs, fill, count):
    records = (PAIRS if pairs else SIXTEEN)[:count]
    loss, gradients = step_of(trainer_of(tmp_path, None, pairs=pairs), records)
    assert len(gradients) == 3 * 7 * 2 and all(value.abs().max() > 0 for value in gradients.values())
    for most in (128, 256, 512):
        trainer = trainer_of(tmp_path, most, pairs=pairs, fill=fill)
        assert len(trainer.data_collator(records)) > (most < 256), "several passes, or one"
        cut_loss, cut_gradients = step_of(trainer, records)
        assert relative_error(cut_loss, loss) < EXACT
        assert cut_gradients.keys() == gradients.keys()
        assert max(relative_error(cut_gradients[name], gradients[name]) for name in gradients) < EXACT


def test_a_mean_over_each_micro_batch_alone_would_show(tmp_path):
    """The control: dividing by a micro-batch's own scored tokens, the sum then by the number of micro-batches."""
    loss, gradients = step_of(trainer_of(tmp_path, 128), SIXTEEN)
    other_loss, other = step_of(trainer_of(tmp_path, None), SIXTEEN, alone=True)
    assert relative_error(other_loss, loss) > 1e-4
    assert min(relative_error(other[name], gradients[name]) for name in gradients) > 1e-3


def records_of_steps(monkeypatch, tmp_path, count, most, **changes):
    """The records of each optimizer step that the Trainer's loop makes, and the rates it makes them with."""
    steps, rates = {}, []

    def note(self, model, inputs, number=None):
        steps.setdefault(self.state.global_step, []).extend(record for one in inputs for record in one["records"])
        rates.append((self.state.global_step, self.lr_scheduler.get_last_lr()[0]))
        return torch.tensor(0.0)

    monkeypatch.setattr(GuardedTrainer, "training_step", note)
    trainer = trainer_of(tmp_path, most, **changes)
    trainer.train_dataset = SampleDataset(samples(*[3] * count))
    trainer.train()
    return [steps[number] for number in range(trainer.state.global_step)], sorted(set(rates))


@pytest.mark.parametrize("count", [3, 17, 31, 900])
@pytest.mark.parametrize("changes", [{"epochs": 1.5}, {"max_steps": 3}], ids=str)
def test_every_step_holds_the_same_records_in_the_same_order(monkeypatch, tmp_path, count, changes):
    """Also the last, smaller one of an epoch; in a step, those of a pass stand together."""
    single, rates = records_of_steps(monkeypatch, tmp_path, count, None, **changes)
    epoch = ceil(count / 16)
    assert len(single) == changes.get("max_steps", ceil(changes.get("epochs", 0) * epoch))
    if len(single) >= epoch:
        assert sorted(record for step in single[:epoch] for record in step) == list(range(count))
    assert records_of_steps(monkeypatch, tmp_path, count, 128, **changes) == (single, rates)
    several, same = records_of_steps(monkeypatch, tmp_path, count, 9, **changes)
    assert (list(map(sorted, several)), same) == (list(map(sorted, single)), rates)
    other, _ = records_of_steps(monkeypatch, tmp_path, count, None, **changes, seed=4)
    assert other != single, "another seed is another order"


def cutting(monkeypatch, most):
    """Runs go on with passes of `most` tokens, as on a GPU that has the room."""
    honest = run.put_on_fast_path
    monkeypatch.setattr(run, "put_on_fast_path", lambda *a, **o: honest(*a, **o)._replace(cut=most))


def adapter_of(folder):
    return load_file(folder / "run" / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_a_whole_run_and_what_it_says(base_folder, tmp_path, monkeypatch, task, capsys):
    (write_instructions if task == "sft" else write_preferences)(tmp_path / "data.jsonl", 11)
    found = []
    for most in (None, 256, 1024):
        cutting(monkeypatch, most)
        settings = settings_for(base_folder, tmp_path, task=task, gradient_accumulation=4, epochs=2)
        report = run.train(settings, overwrite=True)
        said = capsys.readouterr().err
        assert "layers.0-" in said and "bias in fp32 with RoPE" in said, "the table of routes"
        assert (f"passes of up to {most} tokens" in said) == (most is not None) and report.steps == 4
        written = json.loads((tmp_path / "run" / "report.json").read_text())
        assert written["routes"]["tokens_a_pass"] == most
        found.append((adapter_of(tmp_path), report.last_loss, report.tokens))
    for other in found[1:]:
        assert found[0][1:] == pytest.approx(other[1:], rel=1e-4)
        assert max((found[0][0][name] - other[0][name]).abs().max() for name in found[0][0]) < 2e-3


def test_a_run_resumes_with_another_number(base_folder, tmp_path, monkeypatch):
    """Memory that was free then may not be now: the checkpoint's next records come next, whatever the number."""
    write_instructions(tmp_path / "data.jsonl", 37)
    settings = settings_for(base_folder, tmp_path, gradient_accumulation=4, epochs=2, save_steps=3)
    cutting(monkeypatch, 1024)
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
    cutting(monkeypatch, 512)
    run.train(settings, resume=True)
    resumed = adapter_of(tmp_path)
    assert max((whole[name] - resumed[name]).abs().max() for name in whole) < 2e-3


@pytest.mark.parametrize("most", [40, 64, 128])
def test_records_are_cut_into_few_passes(most):
    sizes = [len(sample.ids) for sample in SIXTEEN]
    groups = cut(sizes, most)
    assert sorted(position for group in groups for position in group) == list(range(16))
    held = [sum(sizes[position] for position in group) for group in groups]
    assert max(held) <= most and len(groups) == -(-sum(sizes) // most)
    assert groups == sorted(groups) and all(group == sorted(group) for group in groups)


def test_a_record_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="40 tokens in passes of at most 39"):
        cut([len(sample.ids) for sample in SIXTEEN], 39)


def test_pairs_stay_together():
    passes = DpoCollator(None, 70)(PAIRS)
    assert len(passes) > 2 and sorted(record for one in passes for record in one["records"]) == list(range(16))
    for one in passes:
        assert len(one["offsets"]) == 2 * len(one["records"]) + 1 and one["tokens"] <= 70
        assert one["reference_chosen"].tolist() == [PAIRS[record][2] for record in one["records"]]


@pytest.mark.parametrize("most", [128, 1024, 3072])
def test_passes_come_in_few_shapes(most):
    shapes = {
        (len(one["input_ids"]), len(one["labels"]), len(one["offsets"]))
        for count in range(1, 17)
        for one in SftCollator(16, most)(SIXTEEN[:count])
    }
    assert {tokens for tokens, _, _ in shapes} <= set(parts(most))
    assert {offsets for _, _, offsets in shapes} == {18}


def test_passes_of_pairs_come_in_few_shapes_too():
    shapes = {
        (len(one["input_ids"]), len(one["labels"]), len(one["offsets"]), len(one["reference_chosen"]), len(one["real"]))
        for count in range(1, 17)
        for one in DpoCollator(32, 128)(PAIRS[:count])
    }
    assert len(shapes) == 1, shapes
    (one,) = DpoCollator(32, 1024)(PAIRS[:3])
    assert one["real"].tolist() == [True] * 3 + [False] * 13
    assert set(one["owners"].tolist()) <= {0, 1, 2, 16, 17, 18} and one["owners"].max() >= 16


@pytest.mark.parametrize("pairs", [False, True], ids=["sft", "dpo"])
def test_scoring_keeps_to_the_tokens_of_a_pass(pairs, tmp_path, monkeypatch):
    """The memory plan is made for passes of so many."""
    placement = place(settings_for("none", tmp_path, device="cpu", dtype="float32"))
    model, seen = lora_model(), []
    route(model)
    honest = evaluate.pack
    monkeypatch.setattr(evaluate, "pack", lambda chunk: seen.append(sum(len(s.ids) for s in chunk)) or honest(chunk))
    score = evaluate.pair_log_probs if pairs else evaluate.sft_score
    items = [pair[:2] for pair in PAIRS] if pairs else SIXTEEN
    whole = score(model, items, placement, 8)
    assert max(seen) > 64
    seen.clear()
    parted = score(model, items, placement, 8, 64)
    assert max(seen) <= 64 and sum(seen) == sum(len(s.ids) for item in items for s in (item if pairs else (item,)))
    if pairs:
        assert torch.allclose(torch.tensor(parted), torch.tensor(whole), rtol=1e-4)
    else:
        assert parted.tokens == whole.tokens and parted.nll == pytest.approx(whole.nll, rel=1e-5)


def test_parts_of_a_pass():
    assert parts(128) == [128] and parts(256) == [256, 128]
    assert parts(1024) == [1024, 512, 256] and parts(3072) == [3072, 1536, 768]
    assert parts(8192) == [8192, 4096, 2048, 1024]


def test_cuts_to_choose_from():
    assert cuts(1024, 4096) == [1024, 2048, 3072, 4096]
    assert cuts(1024, 1024) == [1024]
    assert cuts(16384, 65536) == [16384], "a record is never cut"
    assert cuts(682, 3072) == [768, 1024, 2048, 3072], "nor filled up by half of it"
    assert cuts(1, 128) == [128] and cuts(129, 256) == [256] and cuts(1025, 1100) == [1152]
    assert cuts(512, 65536)[-1] == MOST_TOKENS
    assert all(a < b and bucket(a) == a for a, b in pairwise(cuts(128, 8192)))


PACKED = replace(SMALL, packed=True)
HALF_B = (1024, 2048, 4096)


def choice(sizes, tokens, budget, *, as_kept=False, **changes):
    """(how many tokens a pass has, the plans to choose from)"""
    options = {"recompute": "auto", "host": True, "graphs": True, "many_shapes": True} | changes
    sized = {count: replace(sizes, tokens=count) for count in tokens}
    plans = {count: share_memory(each, budget, **options) for count, each in sized.items()}
    return best_cut(plans, sized, budget, as_kept=as_kept), plans


@pytest.mark.parametrize("sizes", [SMALL, PACKED], ids=["16 bit", "nf4"])
@pytest.mark.parametrize("as_kept", [True, False])
def test_the_largest_where_everything_fits(as_kept, sizes):
    assert choice(sizes, HALF_B, 80 * 10**9, as_kept=as_kept)[0] == 4096
    eager, plans = choice(sizes, HALF_B, 80 * 10**9, as_kept=as_kept, graphs=False)
    assert eager == 4096 and not plans[4096].graphs, "without graphs launches weigh more still"
    assert choice(sizes, (1024, 2048), 80 * 10**9, as_kept=as_kept)[0] == 2048


def test_a_budget_that_one_asked_for_may_be_paid_with_recomputation():
    """At 0.5B a pass's own time is worth more than what it computes again; without need nothing is computed again."""
    best, plans = choice(SMALL, HALF_B, 3 * 10**9)
    assert set(plans[1024].memory.keep) == {"all"} and set(plans[4096].memory.keep) != {"all"} and plans[4096].graphs
    assert best == 4096
    best, _ = choice(SMALL, HALF_B, 3 * 10**9, as_kept=True)
    assert set(plans[best].memory.keep) == {"all"} and best < 4096


def test_a_large_model_does_not_pay_for_launches_with_products():
    best, plans = choice(LARGE, (2048, 4096, 8192), 21 * 10**9)
    assert all(shared.graphs and shared.memory.estimate <= 21 * 10**9 for shared in plans.values())
    assert plans[8192].memory.saved / 4 < plans[2048].memory.saved
    assert best < 8192


@pytest.mark.parametrize("sizes", [SMALL, PACKED], ids=["16 bit", "nf4"])
def test_neither_the_budget_nor_graphs_are_given_up(sizes):
    smallest = {count: shared.memory.estimate for count, shared in choice(sizes, HALF_B, 0)[1].items()}
    for budget in range(smallest[1024], 2 * smallest[4096], smallest[1024] // 20):
        best, plans = choice(sizes, HALF_B, budget)
        assert plans[best].memory.estimate <= budget and plans[best].graphs >= plans[1024].graphs
    assert choice(sizes, HALF_B, 0)[0] == 1024, "where nothing fits"
