"""The two losses as plain functions of logits; fp32 inside, shapes in every docstring.

Legend: B sequences, T positions, V vocabulary. Logits at position t predict token t + 1, so the functions take logits
and targets that are already shifted against each other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


def token_log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) at each position, fp32.

    Args:
        logits: (..., V), any float dtype.
        targets: (...), int64; values outside the vocabulary are an error of the caller.
    """
    return -F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


class DpoTerms(NamedTuple):
    """Loss a pair and the implicit rewards, each (B,) fp32; rewards carry no gradient."""

    loss: torch.Tensor
    rewards_chosen: torch.Tensor
    rewards_rejected: torch.Tensor


def reward_accuracy(terms: DpoTerms) -> torch.Tensor:
    """(B,): 1 where the chosen side has the higher reward, 0.5 for a tie (which is what a coin would score), else 0."""
    return (1 + torch.sign(terms.rewards_chosen - terms.rewards_rejected)) / 2


def dpo_sigmoid(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
) -> DpoTerms:
    """Rafailov et al. 2023 (arXiv 2305.18290), eq. 7: -log sigmoid(beta ((c - c_ref) - (r - r_ref))).

    Args:
        chosen, rejected: sequence log-probs under the policy, (B,).
        reference_chosen, reference_rejected: the same under the reference, (B,).
        beta: the strength of the pull towards the reference.
    """
    rewards_chosen = beta * (chosen - reference_chosen)
    rewards_rejected = beta * (rejected - reference_rejected)
    return DpoTerms(
        -F.logsigmoid(rewards_chosen - rewards_rejected), rewards_chosen.detach(), rewards_rejected.detach()
    )
