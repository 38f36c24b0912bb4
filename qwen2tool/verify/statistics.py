"""How far one predicted distribution is from another, in float64 and in llama.cpp's vocabulary.

KL divergence of a token: sum over the vocabulary of p (log p - log q), p the reference's. fp32 sums go slightly
negative where the two are close, hence float64. The perplexity ratio is exp of the mean difference of the tokens' NLL,
its standard error that mean's times the ratio (the delta method, as llama.cpp's `--kl-divergence` reports it).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import exp, isfinite, nan
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class TokenFigures:
    """One value a scored token, float64 (N,) on the CPU; `same_top` is bool."""

    kld: torch.Tensor
    max_abs: torch.Tensor
    same_top: torch.Tensor
    nll_reference: torch.Tensor
    nll_candidate: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class LogitFigures:
    """What a comparison of logits says over `tokens` scored tokens; KLD and NLL in nats.

    NaN where a logit was not finite, and for a standard error over fewer than two tokens.
    """

    tokens: int
    kld_mean: float
    kld_mean_se: float
    kld_median: float
    kld_99: float
    kld_max: float
    max_abs: float
    same_top: float
    nll_reference: float
    nll_candidate: float
    ppl_ratio: float
    ppl_ratio_se: float

    @property
    def ppl_reference(self) -> float:
        return _exp(self.nll_reference)

    @property
    def ppl_candidate(self) -> float:
        return _exp(self.nll_candidate)

    @property
    def finite(self) -> bool:
        """Whether both sides predicted finite numbers everywhere."""
        return isfinite(self.kld_mean) and isfinite(self.max_abs)

    def to_json(self) -> dict[str, Any]:
        """Plain values, perplexities included; null where a value is not finite, which JSON cannot say."""
        values = asdict(self) | {"ppl_reference": self.ppl_reference, "ppl_candidate": self.ppl_candidate}
        return {key: value if isfinite(value) else None for key, value in values.items()}


def _exp(value: float) -> float:
    """exp that stays within a double's range."""
    return exp(max(-700.0, min(value, 700.0))) if isfinite(value) else nan


def token_figures(reference: torch.Tensor, candidate: torch.Tensor, targets: torch.Tensor) -> TokenFigures:
    """Compares logits (N, V) of any float dtype at N positions with their targets (N,)."""
    p, q = reference.double().log_softmax(-1), candidate.double().log_softmax(-1)
    rows = targets[:, None]
    return TokenFigures(
        kld=(p.exp() * (p - q)).sum(-1).cpu(),
        max_abs=(reference.double() - candidate.double()).abs().amax(-1).cpu(),
        same_top=(reference.argmax(-1) == candidate.argmax(-1)).cpu(),
        nll_reference=-p.gather(1, rows)[:, 0].cpu(),
        nll_candidate=-q.gather(1, rows)[:, 0].cpu(),
    )


def concatenate(parts: list[TokenFigures]) -> TokenFigures:
    """The figures of all chunks as one."""
    return TokenFigures(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def summarise(figures: TokenFigures) -> LogitFigures:
    """Means, quantiles and standard errors; a value that is not finite anywhere makes the mean NaN, never hides."""
    kld, count = figures.kld, len(figures.kld)
    log_ratio = figures.nll_candidate - figures.nll_reference
    ratio = _exp(log_ratio.mean().item())
    return LogitFigures(
        tokens=count,
        kld_mean=kld.mean().item(),
        kld_mean_se=_standard_error(kld),
        kld_median=kld.quantile(0.5).item(),
        kld_99=kld.quantile(0.99).item(),
        kld_max=kld.max().item(),
        max_abs=figures.max_abs.max().item(),
        same_top=figures.same_top.double().mean().item(),
        nll_reference=figures.nll_reference.mean().item(),
        nll_candidate=figures.nll_candidate.mean().item(),
        ppl_ratio=ratio,
        ppl_ratio_se=ratio * _standard_error(log_ratio),
    )


def _standard_error(values: torch.Tensor) -> float:
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else nan
