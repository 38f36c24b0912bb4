"""Models for the tests of routing: a tiny Qwen2 whose biases matter under PEFT, and the gradients to compare."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from tests.tiny import TARGETS, tiny_model


def lora_model(
    *, seed: int = 0, rank: int = 4, alpha: int = 12, dropout: float = 0.0, dtype: torch.dtype = torch.float32,
    config: dict[str, Any] | None = None, **changes: Any,
) -> Any:  # fmt: skip
    """A PeftModel in training mode with random A and B of useful size; `changes` go to LoraConfig."""
    model = tiny_model(seed, **(config or {})).to(dtype)
    fields = {"target_modules": list(TARGETS), "task_type": "CAUSAL_LM"} | changes
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, **fields))
    fill_adapters(model)
    return model.train()


def fill_adapters(model: Any, seed: int = 7) -> None:
    """Random A and B: PEFT's own B is zero, and a lost adapter would not show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.dim() == 2:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)


def batch(rows: int = 3, columns: int = 17, vocabulary: int = 384, seed: int = 5) -> torch.Tensor:
    """(rows, columns) random ids."""
    return torch.randint(0, vocabulary, (rows, columns), generator=torch.Generator().manual_seed(seed))


def padding(side: str, rows: int = 3, columns: int = 17) -> torch.Tensor:
    """(rows, columns) mask of which row i lacks 3 i + 1 slots on `side`, the last row none."""
    mask = torch.ones(rows, columns, dtype=torch.int64)
    for row in range(rows - 1):
        lost = 3 * row + 1
        mask[row, :lost] = 0 if side == "left" else 1
        if side == "right":
            mask[row, -lost:] = 0
    return mask


def logits_and_gradients(model: Any, **inputs: Any) -> dict[str, torch.Tensor]:
    """Logits and the gradient of every trainable parameter for a random projection of the logits as loss.

    Slots of padding are left out of both: nobody reads them.
    """
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    mask = inputs.get("attention_mask")
    if mask is not None:
        logits = logits * mask[..., None]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(11)).to(logits)
    (logits.float() * weights.float() if logits.dtype != torch.float64 else logits * weights).sum().backward()
    found = {"logits": logits.detach()}
    found |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found
