"""On a GPU: what a run takes at its peak is what the memory plan said it would, whatever the plan keeps where."""

from __future__ import annotations

import gc

import pytest
import torch

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


def peak_and_plan(budget_gb, quantize, dropout):
    """(bytes at the peak, what the plan says) of four steps, after all that the model itself takes to make."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = tiny_model(**GEOMETRY).requires_grad_(False).to("cuda", torch.bfloat16)
    if quantize == "nf4":
        quantise(model, torch.bfloat16)
    model = fresh_lora(model, rank=32, alpha=16, dropout=dropout, targets=LINEARS).train()
    stepper = Stepper(model, StepOptions(memory_budget_gb=budget_gb, dropout=dropout, quantize=quantize))
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
