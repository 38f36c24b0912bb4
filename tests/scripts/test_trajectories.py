"""The bookkeeping of scripts/trajectories.py: differences by hand arithmetic, and steps that were not made."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import trajectories


def run(dtype, routes, losses, seed=1, held_out=None):
    return {"seed": seed, "dtype": dtype, "routes": routes, "losses": losses, "eval_after": held_out}


def test_difference_by_hand():
    assert trajectories.difference([2.0, 1.0, 9.0], [2.5, 0.8]) == {
        "steps": 2, "mean": pytest.approx(0.35), "max": pytest.approx(0.5), "max_relative": pytest.approx(0.25),
    }  # fmt: skip
    assert trajectories.difference([], [1.0])["mean"] is None


def test_a_loss_that_is_no_number_is_not_passed_over():
    """max(1.0, nan) is 1.0."""
    found = trajectories.difference([2.0, math.nan], [1.0, 1.0])
    assert math.isnan(found["max"]) and math.isnan(found["mean"]) and math.isnan(found["max_relative"])


def test_comparisons_are_made_within_a_seed():
    runs = [
        run("float32", "auto", [1.0], held_out=2.0), run("float32", "reference", [1.1], held_out=2.5),
        run("bfloat16", "auto", [1.3]), run("bfloat16", "reference", [1.7]), run("float16", "auto", [9.0], seed=2),
    ]  # fmt: skip
    found = [(line["what"], line["dtype"], line["max"]) for line in trajectories.comparisons(runs)]
    assert found == [
        ("routed against reference", "float32", pytest.approx(0.1)),
        ("routed against reference", "bfloat16", pytest.approx(0.4)),
        ("routed against reference in float32", "bfloat16", pytest.approx(0.2)),
        ("reference against reference in float32", "bfloat16", pytest.approx(0.6)),
    ]
    assert trajectories.comparisons(runs)[0]["held_out"] == pytest.approx(0.5)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
def test_a_step_that_the_scaler_leaves_out_is_not_counted(fused):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with trajectories.counted_steps() as stepped:
        for factor in (1.0, math.inf, 1.0):
            optimizer.zero_grad()
            scaler.scale((weight * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert len(stepped) == 2
    weight.grad = torch.ones(3)
    optimizer.step()
    assert len(stepped) == 2  # nobody counts any more


def test_outcome_names_what_was_skipped_and_what_stopped():
    logs = [{"step": n, "loss": 2.0, "grad_norm": norm} for n, norm in ((1, math.inf), (2, 0.5), (3, 0.6))]
    found = trajectories.outcome(logs, 2, None)
    assert (found["skipped"], found["skipped_at"], found["finite"]) == (1, [1], True)
    assert not trajectories.outcome(logs, 3, None, "step 4: the loss is nan")["finite"]
    assert not trajectories.outcome([{"step": 1, "loss": math.nan, "grad_norm": 1.0}], 1, None)["finite"]


def test_fp16_is_measured_on_a_gpu_alone(monkeypatch):
    arguments = ["model", "--data", "file"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert trajectories.parse(arguments).dtypes == ["float32", "bfloat16"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert trajectories.parse(arguments).dtypes == ["float32", "bfloat16", "float16"]
