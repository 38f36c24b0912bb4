"""Whole runs on a tiny model: trajectories that must agree, against transformers' own loss and hand-made steps."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM

from qwen2tool.checkpoint.load import load_tokenizer
from qwen2tool.data.encode import encode_conversation, encode_preference
from qwen2tool.data.records import read_conversations, read_preferences
from qwen2tool.errors import UserError
from qwen2tool.training import model as training_model
from qwen2tool.training.run import train
from qwen2tool.training.tasks import SftTask
from tests.tiny import write_tiny
from tests.training.common import settings_for, write_instructions, write_preferences
from tests.training.padded import padded_batch


def adapter_of(folder):
    return load_file(folder / "run" / "adapter" / "adapter_model.safetensors")


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture
def sft(tmp_path):
    write_instructions(tmp_path / "data.jsonl")
    return tmp_path


@pytest.fixture
def dpo(tmp_path):
    write_preferences(tmp_path / "data.jsonl")
    return tmp_path


def test_first_loss_is_transformers_own_over_all_tokens_of_the_step(base_folder, sft):
    """All records in one step, in batches of unequal token counts: the mean over tokens, as if it were one batch."""
    train(settings_for(base_folder, sft, batch_size=2, gradient_accumulation=6))
    tokenizer = load_tokenizer(base_folder)
    conversations = read_conversations(sft / "data.jsonl")
    batch = padded_batch([encode_conversation(tokenizer, c, 0, 999) for c in conversations])
    model = Qwen2ForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        truth = model(**inputs).loss.item()
        by_batch = sum(model(**{k: v[i : i + 2] for k, v in inputs.items()}).loss.item() for i in range(0, 12, 2)) / 6
    assert metrics_of(sft)[0]["loss"] == pytest.approx(truth, rel=1e-5)
    assert abs(by_batch - truth) > 1e-3, "the data must tell the two averages apart"


def test_accumulation_and_checkpointing_do_not_change_the_trajectory(base_folder, sft):
    runs = []
    for changes in ({"batch_size": 4, "gradient_accumulation": 1}, {"recompute": "all"}):
        train(settings_for(base_folder, sft, epochs=2, **changes), overwrite=True)
        runs.append((adapter_of(sft), [entry["loss"] for entry in metrics_of(sft) if "loss" in entry]))
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-4)
    assert largest_difference(runs[0][0], runs[1][0]) < 2e-4
    train(settings_for(base_folder, sft, epochs=2, seed=4), overwrite=True)
    assert largest_difference(runs[0][0], adapter_of(sft)) > 1e-2, "another seed is another trajectory"


def test_training_lowers_held_out_loss_and_writes_everything(base_folder, sft):
    report = train(settings_for(base_folder, sft, epochs=4, eval_data=str(sft / "data.jsonl")))
    assert report.eval_after.nll < report.eval_before.nll - 0.2
    samples = [
        encode_conversation(load_tokenizer(base_folder), c, 0, 999) for c in read_conversations(sft / "data.jsonl")
    ]
    assert report.tokens == 4 * sum(len(sample.ids) for sample in samples)
    assert 0 < report.train_seconds < report.seconds
    written = json.loads((sft / "run" / "report.json").read_text())
    assert written["eval_after"]["nll"] == report.eval_after.nll and written["environment"]["torch"]
    assert {p.name for p in (sft / "run").iterdir()} == {
        "adapter", "inputs.json", "metrics.jsonl", "report.json", "settings.yaml",
    }  # fmt: skip
    files = {p.name for p in (sft / "run" / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "qwen2tool.json"}


def test_saved_adapter_is_the_function_that_was_scored(base_folder, sft):
    """PEFT loads what was saved, and transformers' loss of it is the run's own held-out score."""
    report = train(settings_for(base_folder, sft, epochs=2, eval_data=str(sft / "data.jsonl")))
    base = Qwen2ForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    tokenizer = load_tokenizer(base_folder)
    conversations = read_conversations(sft / "data.jsonl")
    batch = padded_batch([encode_conversation(tokenizer, c, 0, 999) for c in conversations])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        untrained = base(**inputs).loss.item()
        model = PeftModel.from_pretrained(base, sft / "run" / "adapter").eval()
        trained = model(**inputs).loss.item()
    assert report.eval_before.nll == pytest.approx(untrained, rel=1e-5)
    assert report.eval_after.nll == pytest.approx(trained, rel=1e-5)


def test_resumed_run_ends_where_the_uninterrupted_one_does(base_folder, sft, monkeypatch):
    changes = {"epochs": 2, "save_steps": 2, "dropout": 0.1}
    train(settings_for(base_folder, sft, **changes))
    whole = adapter_of(sft)
    from transformers import Trainer

    finish = Trainer._save_checkpoint

    def die_after_saving(self, *args, **kwargs):
        finish(self, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", die_after_saving)
        with pytest.raises(KeyboardInterrupt):
            train(settings_for(base_folder, sft, **changes), overwrite=True)
    assert not (sft / "run" / "adapter").exists()
    train(settings_for(base_folder, sft, **changes), resume=True)
    resumed = adapter_of(sft)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_dpo_reference_is_the_model_with_its_adapter_off(base_folder, dpo):
    report = train(settings_for(base_folder, dpo, task="dpo", eval_data=str(dpo / "data.jsonl"), epochs=6))
    assert (report.eval_before.accuracy, report.eval_before.margin) == (0.5, 0.0)
    rewards = trained_rewards(base_folder, dpo, reference_adapter=None, beta=0.1)
    assert report.eval_after.margin == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean().item(), abs=1e-4)
    assert report.eval_after.margin > 0.1 and report.eval_after.accuracy == 1.0


def test_dpo_reference_of_a_continued_adapter_is_that_adapter_as_it_was(base_folder, adapter_folder, dpo):
    changes = {"task": "dpo", "adapter": str(adapter_folder), "eval_data": str(dpo / "data.jsonl"), "epochs": 4}
    report = train(settings_for(base_folder, dpo, learning_rate=2e-3, **changes))
    assert report.first_loss == pytest.approx(0.6931, abs=0.02)
    as_it_was = trained_rewards(base_folder, dpo, reference_adapter=adapter_folder, beta=0.1)
    adapter_off = trained_rewards(base_folder, dpo, reference_adapter=None, beta=0.1)
    margin = (as_it_was[:, 0] - as_it_was[:, 1]).mean().item()
    assert report.eval_after.margin == pytest.approx(margin, abs=1e-4)
    assert abs((adapter_off[:, 0] - adapter_off[:, 1]).mean().item() - margin) > 1e-2


def trained_rewards(base_folder, folder, reference_adapter, beta):
    """(pairs, 2) rewards from two separately loaded models: PEFT's own forward, transformers' log-softmax."""
    tokenizer = load_tokenizer(base_folder)
    pairs = [encode_preference(tokenizer, p, 0, 999) for p in read_preferences(folder / "data.jsonl")]

    def log_probs(adapter):
        model = Qwen2ForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, adapter).eval() if adapter else model.eval()
        return torch.tensor([[one(model, sample) for sample in pair] for pair in pairs])

    def one(model, sample):
        with torch.no_grad():
            logs = model(torch.tensor([sample.ids])).logits[0].double().log_softmax(-1)
        return sum(logs[t - 1, sample.ids[t]].item() for t in range(1, len(sample.ids)) if sample.scored[t])

    return beta * (log_probs(folder / "run" / "adapter") - log_probs(reference_adapter))


def test_qlora_keeps_the_biases_and_trains(base_folder, sft):
    report = train(settings_for(base_folder, sft, quantize="nf4", epochs=4, eval_data=str(sft / "data.jsonl")))
    plain = settings_for(base_folder, sft, epochs=4, eval_data=str(sft / "data.jsonl"), output=str(sft / "plain"))
    assert report.eval_before.nll != train(plain).eval_before.nll, "NF4 must really be on"
    assert report.eval_after.nll < report.eval_before.nll - 0.2


def test_adapter_for_another_base_is_refused(base_folder, sft, tmp_path):
    from tests.tiny import write_tiny

    train(settings_for(base_folder, sft))
    other = write_tiny(tmp_path / "other", seed=9)
    changes = {"adapter": str(sft / "run" / "adapter"), "output": str(sft / "next")}
    with pytest.raises(UserError, match="another base"):
        train(settings_for(other, sft, **changes))
    assert not (sft / "next").exists()
    train(settings_for(base_folder, sft, **changes))


def test_output_that_exists_is_left_alone(base_folder, sft):
    (sft / "run").mkdir()
    (sft / "run" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="already exists"):
        train(settings_for(base_folder, sft))
    with pytest.raises(UserError, match=r"run: holds mine\.txt, and is no checkpoint, adapter, training run"):
        train(settings_for(base_folder, sft), overwrite=True)
    assert [p.name for p in (sft / "run").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("inside", ["adapter", "data", "model"])
def test_overwriting_never_deletes_what_the_run_reads(base_copy, adapter_folder, sft, inside):
    (sft / "run").mkdir()
    (sft / "run" / "trainer_state.json").write_text("{}")  # a folder that could be replaced, did it not hold them
    sources = {"adapter": adapter_folder, "data": sft / "data.jsonl", "model": base_copy}
    real = sft / "run" / "needed"
    copy = shutil.copytree if sources[inside].is_dir() else shutil.copyfile
    copy(sources[inside], real)
    changes = {inside: str(real)}
    with pytest.raises(UserError, match="replacing it would delete"):
        train(settings_for(base_copy, sft, **changes), overwrite=True)
    assert real.exists()


def test_records_whose_answer_does_not_fit_stop_the_run_or_are_left_out_by_request(base_folder, sft):
    lines = (sft / "data.jsonl").read_text().splitlines()
    lines.insert(3, json.dumps({"instruction": "the question " * 200, "output": "the answer"}))
    (sft / "data.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="line 4: no token of the answer fits into max_length 250"):
        train(settings_for(base_folder, sft, max_length=250))
    assert not (sft / "run").exists()
    report = train(settings_for(base_folder, sft, max_length=250, skip_too_long=True))
    assert (report.records, report.skipped) == (12, 1)


def test_several_processes_are_refused(base_folder, sft, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE is 2"):
        train(settings_for(base_folder, sft))
    assert not (sft / "run").exists()


def test_losses_of_every_step_count_however_seldom_they_are_logged(base_folder, sft):
    rare = train(settings_for(base_folder, sft, epochs=2, logging_steps=50))
    often = train(settings_for(base_folder, sft, epochs=2), overwrite=True)
    assert (rare.first_loss, rare.last_loss) == (often.first_loss, often.last_loss)
    logged = [entry["loss"] for entry in metrics_of(sft) if "loss" in entry]
    assert (often.first_loss, often.last_loss) == pytest.approx((logged[0], logged[-1]), rel=1e-6)


def test_the_embedding_table_goes_to_the_host_where_asked(base_folder, sft, monkeypatch):
    moved = []
    monkeypatch.setattr(training_model, "embedding_to_host", moved.append)
    for embedding in ("auto", "host"):
        train(settings_for(base_folder, sft, max_steps=1, embedding=embedding), overwrite=True)
    assert len(moved) == 1
    tied = write_tiny(sft / "tied", tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"--embedding is host, but .*tied ties the head to the table"):
        train(settings_for(tied, sft, embedding="host", output=str(sft / "other")))
    assert not (sft / "other").exists() and len(moved) == 1


def test_an_unknown_tracker_is_refused_before_anything_is_written(base_folder, sft):
    with pytest.raises(UserError, match="--report-to nothing"):
        train(settings_for(base_folder, sft, report_to="nothing"))
    assert not (sft / "run").exists()


def test_tokens_beyond_the_table_are_named(base_copy, sft):
    file = base_copy / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    far = {f"far{n}": 320 + n for n in range(100)}
    tokenizer["model"]["vocab"] |= far
    tokenizer["added_tokens"] += [
        {**tokenizer["added_tokens"][-1], "id": number, "content": name} for name, number in far.items()
    ]
    file.write_text(json.dumps(tokenizer))
    (sft / "far.jsonl").write_text(json.dumps({"instruction": "a far99 thing", "output": "yes"}))
    for role in ("data", "eval_data"):
        with pytest.raises(UserError, match=r"far.jsonl line 1: the tokenizer gives id \d+, .* has 384 rows"):
            train(settings_for(base_copy, sft, **{role: str(sft / "far.jsonl")}))
        assert not (sft / "run").exists()


@pytest.mark.parametrize(("stop", "saved"), [(1, False), (2, True)])
def test_what_was_trained_is_saved_before_it_is_scored(base_folder, sft, monkeypatch, stop, saved):
    """Memory may run out in the score behind the last step, where graphs still hold theirs: hours must not go with it.

    The first score, before anything was trained, may stop the run without a trace.
    """
    write_instructions(sft / "held.jsonl", 4)
    honest, calls = SftTask.score, []

    def runs_out(self):
        calls.append(len(calls))
        if len(calls) == stop:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(self)

    monkeypatch.setattr(SftTask, "score", runs_out)
    with pytest.raises(torch.OutOfMemoryError):
        train(settings_for(base_folder, sft, eval_data=str(sft / "held.jsonl")))
    assert (sft / "run" / "adapter").exists() == saved
