"""On a GPU: what a run takes at its peak is what the memory plan said it would, whatever the plan keeps where."""

from __future__ import annotations

import gc

import pytest
import torch

from qwen2tool.training import fast
from qwen2tool.training.model import fresh_lora
from qwen2tool.training.stepper import LINEARS, StepOptions, Stepper
from tests.routing.test_matrix import quantise
from tests.tiny import tiny_model

pytestmark = pytest.mark.gpu

GEOMETRY = {
    "hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16, "num_key_value_heads": 4,
    "num_hidden_layers": 8, "vocab_size": 50_000,
}  # fmt: skip
ROWS, COLUMNS = 4, 1024


def model_of(quantize, dropout):
    model = tiny_model(**GEOMETRY).requires_grad_(False).to("cuda", torch.bfloat16)
    if quantize == "nf4":
        quantise(model, torch.bfloat16)
    return fresh_lora(model, rank=32, alpha=16, dropout=dropout, targets=LINEARS).train()


def peak_and_plan(budget_gb, quantize, dropout):
    """(bytes at the peak, what the plan says) of four steps, after all that the model itself takes to make."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    stepper = Stepper(
        model_of(quantize, dropout), StepOptions(memory_budget_gb=budget_gb, dropout=dropout, quantize=quantize)
    )
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    for seed in range(4):
        ids = torch.randint(0, 40_000, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(seed))
        stepper.step([ids])
    return torch.cuda.max_memory_allocated() - before, stepper.describe()["memory"]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("quantize", ["nf4", "none"])
@pytest.mark.parametrize("budget_gb", [0.5, 1.8, 2.4, 3.2, 5.0])
def test_the_peak_is_what_was_planned(budget_gb, quantize, dropout):
    """0.5 GB is too little for anything, so the smallest plan runs; 5 GB holds all of it."""
    peak, plan = peak_and_plan(budget_gb, quantize, dropout)
    planned = plan["estimated_bytes"]
    assert 0.88 * planned < peak < 1.02 * planned, f"{peak / 1e9:.3f} GB, planned {planned / 1e9:.3f}: {plan}"


@pytest.mark.parametrize("compacts", [True, False])
def test_what_moved_to_the_host_is_given_back(compacts, monkeypatch):
    """From the one block that a loader took for all weights: what the embedding and six layers leave is holes in it."""
    monkeypatch.setattr(fast, "PIECES", 0 if compacts else 1 << 62)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    block = torch.empty(1_600_000_000, dtype=torch.uint8, device="cuda")
    del block
    model = model_of("nf4", 0.0)
    plans = fast.put_on_fast_path(model, tokens=ROWS * COLUMNS, length=COLUMNS, dtype=torch.bfloat16, budget=0)
    assert plans.memory.host_weights == 6 and plans.memory.host_embedding
    gc.collect()
    torch.cuda.empty_cache()
    left = torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - before
    assert left < 60_000_000 if compacts else left > 300_000_000, f"{left / 1e6:.0f} MB"
