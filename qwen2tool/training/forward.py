"""Log-probabilities of the scored tokens of a packed batch, without logits for any other token.

The routed inner model runs the tokens of all sequences in one row; the head is applied to scored rows alone, a chunk of
them at a time. A head that is trained or adapted goes through its own forward, with the logits of scored rows held.
"""

from __future__ import annotations

from typing import Any

import torch

from qwen2tool.kernels.attention import Sequences
from qwen2tool.kernels.head import token_log_probs
from qwen2tool.routing.examine import NotFused, examine_head
from qwen2tool.routing.sequences import Flat
from qwen2tool.routing.stack import RoutedStack
from qwen2tool.training.batches import IGNORED
from qwen2tool.training.losses import token_log_probs as log_probs_of_logits


def log_probs(model: Any, batch: Any, labels: torch.Tensor) -> torch.Tensor:
    """log p of each scored token, (M,) fp32; 0 where the label is IGNORED.

    Args:
        model: a routed Qwen2 for causal language modelling, under PEFT or not.
        batch: see `batches.Packed`, on the model's device.
        labels: (M,).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    stack: RoutedStack = base.model
    lengths = batch["offsets"]
    count, longest = len(lengths) - 1, batch["longest"]
    tokens = batch["input_ids"].shape[0]
    uniform = (count, longest) if count * longest == tokens else None
    flat = Flat(None, batch["positions"], Sequences(lengths, longest, uniform))
    hidden = stack.run(stack.embed(batch["input_ids"]), flat)[batch["rows"]]
    head: Any = base.lm_head
    try:
        weight = examine_head(head)
    except NotFused:
        scored = log_probs_of_logits(head(hidden), labels.clamp(min=0))
        return torch.where(labels == IGNORED, 0.0, scored)
    rows = stack.memory.head_rows if stack.memory else None
    return token_log_probs(hidden.to(weight.dtype), weight, labels, chunk_rows=rows)


def sum_by_owner(values: torch.Tensor, owners: torch.Tensor, count: int) -> torch.Tensor:
    """(M,) values of `count` sequences -> (count,) sums, in the same order on every run (no atomics)."""
    return torch.where(owners == torch.arange(count, device=owners.device)[:, None], values, 0.0).sum(1)
