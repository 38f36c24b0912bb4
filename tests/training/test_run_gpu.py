"""Whole runs on a GPU: graphs change no bit, routes change no more than rounding does, fp16 stays finite."""

from __future__ import annotations

import json

import pytest

from qwen2tool.training.run import train
from tests.training.common import settings_for, write_instructions, write_preferences

pytestmark = pytest.mark.gpu


def losses(folder):
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def run(base, folder, **changes):
    fields = {"device": "cuda", "epochs": 3, "dropout": 0.1, "learning_rate": 1e-3}
    report = train(settings_for(base, folder, **(fields | changes)), overwrite=True)
    return report, losses(folder)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_graphs_change_no_bit(base_folder, tmp_path, task, quantize):
    (write_instructions if task == "sft" else write_preferences)(tmp_path / "data.jsonl")
    replayed, with_graphs = run(base_folder, tmp_path, task=task, quantize=quantize)
    eager, without = run(base_folder, tmp_path, task=task, quantize=quantize, graphs="off")
    assert replayed.routes["graphs"] and not eager.routes["graphs"]
    # Filled-up batches are other shapes than the eager run's, so cuBLAS may sum in another order.
    assert with_graphs == pytest.approx(without, rel=2e-3)
    _, again = run(base_folder, tmp_path, task=task, quantize=quantize)
    assert again == with_graphs, "the same seed gives the same bits"
    _, other = run(base_folder, tmp_path, task=task, quantize=quantize, seed=4)
    assert other != pytest.approx(with_graphs, rel=2e-3), "another seed shows"


@pytest.mark.parametrize("graphs", ["auto", "off"])
def test_a_step_is_the_same_however_its_micro_batches_are_counted(base_folder, tmp_path, graphs):
    write_instructions(tmp_path / "data.jsonl", 13)
    found = {}
    for batch_size, accumulation in ((1, 4), (2, 2), (4, 1)):
        changes = {"batch_size": batch_size, "gradient_accumulation": accumulation, "graphs": graphs}
        report, found[accumulation] = run(base_folder, tmp_path, dropout=0.0, **changes)
        assert report.routes["tokens_a_pass"] >= 128 and report.steps == 12
    assert found[4] == pytest.approx(found[1], rel=2e-3) and found[2] == pytest.approx(found[1], rel=2e-3)
    _, fewer = run(base_folder, tmp_path, dropout=0.0, batch_size=2, gradient_accumulation=1, graphs=graphs)
    assert len(fewer) != len(found[1]), "the control: steps of fewer records are other steps"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_routes_change_no_more_than_rounding(base_folder, tmp_path, dtype):
    write_instructions(tmp_path / "data.jsonl")
    _, fused = run(base_folder, tmp_path, dtype=dtype, dropout=0.0)
    _, reference = run(base_folder, tmp_path, dtype=dtype, dropout=0.0, routes="reference")
    assert fused == pytest.approx(reference, rel=1e-3 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("budget", [None, 0.5])
def test_a_budget_moves_memory_and_not_the_result(base_folder, tmp_path, budget):
    write_instructions(tmp_path / "data.jsonl")
    report, found = run(base_folder, tmp_path, memory_budget=budget)
    _, plain = run(base_folder, tmp_path, recompute="all")
    assert found == pytest.approx(plain, rel=1e-4)
    assert report.routes["memory"]["embedding_on_host"] == (budget is not None)
