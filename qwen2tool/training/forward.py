"""Logits only where a token is scored, from any causal LM of transformers, PEFT or a wrapper around them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from qwen2tool.training.batches import IGNORED
from qwen2tool.training.losses import sequence_log_probs, token_log_probs


class Scored(NamedTuple):
    """Logits (B, K, V) with their targets (B, K) and mask (B, K) at the K positions that score in any row."""

    logits: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor


def score(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Scored:
    """One forward pass; the head is applied only at positions that predict a scored token of some row.

    Args:
        input_ids, attention_mask, labels: (B, T) int64, labels IGNORED where nothing counts.
    """
    positions = (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]
    output = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=positions, use_cache=False)
    targets = labels[:, 1:][:, positions]
    return Scored(output.logits, targets.clamp(min=0), targets != IGNORED)


def sum_nll(scored: Scored) -> torch.Tensor:
    """Sum of -log p over all scored tokens, a scalar in fp32."""
    return -(token_log_probs(scored.logits, scored.targets) * scored.mask).sum()


def answer_log_probs(scored: Scored) -> torch.Tensor:
    """Sum of log p over the scored tokens of each row, (B,) fp32."""
    return sequence_log_probs(scored.logits, scored.targets, scored.mask)
