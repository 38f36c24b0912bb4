"""A run is resumed as the run it was, or not at all."""

from __future__ import annotations

import json
import shutil

import pytest

from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.errors import UserError
from qwen2tool.training.resume import describe_inputs, keep_inputs, require_same_inputs
from qwen2tool.training.run import train
from qwen2tool.training.trainer import GuardedTrainer
from tests.tiny import write_adapter, write_tiny
from tests.training.common import settings_for, write_instructions

RUN = {"epochs": 2, "save_steps": 2}


@pytest.fixture
def stopped(base_copy, tmp_path, monkeypatch):
    """A run of 6 steps that was killed after step 3, with its checkpoint of step 2."""
    write_instructions(tmp_path / "data.jsonl")
    step = GuardedTrainer.training_step

    def die(self, *arguments, **options):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(GuardedTrainer, "training_step", die)
        with pytest.raises(KeyboardInterrupt):
            train(settings_for(base_copy, tmp_path, **RUN))
    return tmp_path


def steps_in(folder):
    return [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_metrics_hold_each_step_once(stopped, base_copy):
    assert steps_in(stopped) == [1, 2, 3]
    train(settings_for(base_copy, stopped, **RUN), resume=True)
    assert steps_in(stopped)[:6] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(UserError, match="the run is complete"):
        train(settings_for(base_copy, stopped, **RUN), resume=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 1e-3}, "--learning-rate is 0.001, the run"),
        ({"alpha": 99}, "--alpha is 99"),
        ({"rank": 8}, "--rank is 8"),
        ({"batch_size": 4}, "--batch-size is 4"),
        ({"task": "dpo"}, "--task is 'dpo'"),
    ],
)
def test_other_settings_are_refused(stopped, base_copy, change, words):
    before = (stopped / "run" / "settings.yaml").read_text()
    with pytest.raises(UserError) as caught:
        train(settings_for(base_copy, stopped, **(RUN | change)), resume=True)
    assert words in str(caught.value)
    assert (stopped / "run" / "settings.yaml").read_text() == before


def test_what_changes_nothing_may_change(stopped, base_copy):
    report = train(settings_for(base_copy, stopped, **(RUN | {"logging_steps": 3, "save_total_limit": 1})), resume=True)
    assert report.steps == 6


def test_another_base_under_the_same_name_is_refused(stopped, base_copy):
    shutil.rmtree(base_copy)
    write_tiny(base_copy, seed=5)
    with pytest.raises(UserError, match="--model is not what the run"):
        train(settings_for(base_copy, stopped, **RUN), resume=True)


def test_other_data_under_the_same_name_are_refused(stopped, base_copy):
    write_instructions(stopped / "data.jsonl", count=11)
    with pytest.raises(UserError, match="--data is not what the run"):
        train(settings_for(base_copy, stopped, **RUN), resume=True)


def test_another_adapter_under_the_same_name_is_refused(stopped, base_copy, adapter_folder):
    """In DPO the adapter that a run began with is also its reference."""
    adapter = shutil.copytree(adapter_folder, stopped / "start")
    inputs = describe_inputs(open_checkpoint(base_copy), settings_for(base_copy, stopped, adapter=str(adapter)))
    keep_inputs(stopped / "run", inputs)
    require_same_inputs(stopped / "run", inputs)
    write_adapter(adapter, base_copy, seed=8)
    now = describe_inputs(open_checkpoint(base_copy), settings_for(base_copy, stopped, adapter=str(adapter)))
    with pytest.raises(UserError, match="--adapter is not what the run"):
        require_same_inputs(stopped / "run", now)


def test_a_damaged_checkpoint_is_named(stopped, base_copy):
    (stopped / "run" / "checkpoints" / "checkpoint-2" / "optimizer.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="checkpoint-2: cannot be resumed from"):
        train(settings_for(base_copy, stopped, **RUN), resume=True)
