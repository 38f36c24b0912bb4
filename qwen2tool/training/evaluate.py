"""What a model scores on held-out records, without gradients and with dropout off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp
from typing import Any, TypeVar

import torch

from qwen2tool.console import progress
from qwen2tool.data.samples import Sample
from qwen2tool.routing.attention import safe_attention
from qwen2tool.training.batches import Packed, pack
from qwen2tool.training.forward import log_probs, sum_by_owner
from qwen2tool.training.losses import dpo_sigmoid, reward_accuracy
from qwen2tool.training.model import Placement

Pair = tuple[Sample, Sample]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SftScore:
    """Mean negative log-likelihood (nats) over `tokens` scored tokens."""

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return exp(min(self.nll, 700.0))


@dataclass(frozen=True, kw_only=True)
class DpoScore:
    """Over `pairs`: mean loss, share with the higher reward on the chosen side (a tie counts half), mean margin.

    Before training every reward is 0: accuracy 0.5 and margin 0 by definition. `preferred` does not look at the
    reference: the share of pairs whose chosen answer has the higher log-prob per token.
    """

    loss: float
    accuracy: float
    margin: float
    preferred: float
    pairs: int


def sft_score(
    model: Any, samples: Sequence[Sample], placement: Placement, batch_size: int, most: int | None = None
) -> SftScore:
    """Scores `samples`, `batch_size` at once or fewer where they have more than `most` tokens; each needs a scored
    token."""
    total, tokens = 0.0, sum(sum(sample.scored[1:]) for sample in samples)
    with _scoring(model, placement), progress("evaluating", len(samples)) as advance:
        for chunk in _chunks(_longest_first(samples), batch_size, most, lambda sample: len(sample.ids)):
            batch = _on_device(pack(chunk), placement)
            total -= log_probs(model, batch, batch["labels"]).double().sum().item()
            advance(len(chunk))
    return SftScore(nll=total / tokens, tokens=tokens)


def pair_log_probs(
    model: Any, pairs: Sequence[Pair], placement: Placement, batch_size: int, most: int | None = None
) -> list[tuple[float, float]]:
    """Sequence log-probs (chosen, rejected) of each pair under `model` as it stands, dropout off; `batch_size` pairs at
    once or fewer where they have more than `most` tokens.

    Called before the first step this is the reference of DPO: a fresh adapter has B = 0 and is the base with its
    adapter off, a continued one is that adapter as it was.
    """
    found: dict[int, tuple[float, float]] = {}
    order = sorted(range(len(pairs)), key=lambda i: -max(len(s.ids) for s in pairs[i]))
    with _scoring(model, placement), progress("log-probs", len(pairs)) as advance:
        for chunk in _chunks(order, batch_size, most, lambda i: sum(len(side.ids) for side in pairs[i])):
            rows = [pairs[i][0] for i in chunk] + [pairs[i][1] for i in chunk]
            batch = _on_device(pack(rows), placement)
            scored = log_probs(model, batch, batch["labels"])
            chosen, rejected = sum_by_owner(scored, batch["owners"], len(rows)).chunk(2)
            found |= dict(zip(chunk, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True))
            advance(len(chunk))
    return [found[i] for i in range(len(pairs))]


def dpo_score(
    policy: Sequence[tuple[float, float]], reference: Sequence[tuple[float, float]], pairs: Sequence[Pair], beta: float
) -> DpoScore:
    """Rewards of `policy` against `reference`, both as `pair_log_probs` gives them."""
    mine, theirs = torch.tensor(policy), torch.tensor(reference)
    terms = dpo_sigmoid(mine[:, 0], mine[:, 1], theirs[:, 0], theirs[:, 1], beta)
    margins = terms.rewards_chosen - terms.rewards_rejected
    lengths = torch.tensor([[sum(side.scored[1:]) for side in pair] for pair in pairs])
    per_token = mine / lengths
    return DpoScore(
        loss=terms.loss.mean().item(),
        accuracy=reward_accuracy(terms).mean().item(),
        margin=margins.mean().item(),
        preferred=(per_token[:, 0] > per_token[:, 1]).float().mean().item(),
        pairs=len(pairs),
    )


@contextmanager
def _scoring(model: Any, placement: Placement) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), safe_attention(), placement.autocast:
            yield
    finally:
        model.train(was_training)


def _on_device(batch: Packed, placement: Placement) -> dict[str, Any]:
    return {n: v.to(placement.device) if torch.is_tensor(v) else v for n, v in batch.items()}


def _longest_first(samples: Sequence[Sample]) -> list[Sample]:
    """The largest batch comes first, so that too little memory shows at once."""
    return sorted(samples, key=lambda sample: -len(sample.ids))


def _chunks(items: Sequence[T], size: int, most: int | None, tokens: Callable[[T], int]) -> Iterator[list[T]]:
    chunk: list[T] = []
    held = 0
    for item in items:
        if chunk and (len(chunk) == size or (most is not None and held + tokens(item) > most)):
            yield chunk
            chunk, held = [], 0
        chunk.append(item)
        held += tokens(item)
    if chunk:
        yield chunk
