"""How far one predicted distribution is from another, in float64 and in llama.cpp's vocabulary.

KL divergence of a token: sum over the vocabulary of p (log p - log q), p the reference's. fp32 sums go slightly
negative where the two are close, hence float64. The vocabulary comes in blocks, so that 151,936 columns never stand
whole: with a = l - max l of the reference's logits l, b of the candidate's, and sums over all blocks,

    KLD = sum e^a (a - b) / sum e^a - log sum e^a + log sum e^b,

where a block that holds a new maximum rescales what was summed before it (online logsumexp: Milakov and Gimelshein
2018, arXiv 1805.02867). The perplexity ratio is exp of the mean difference of the tokens' NLL, its standard error that
mean's times the ratio (the delta method, as llama.cpp's `--kl-divergence` reports it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import exp, floor, inf, isfinite, log10, nan
from typing import Any

import torch

TOP = 5


@dataclass(frozen=True, kw_only=True)
class TokenFigures:
    """One value a scored token, float64 (N,) on the CPU; `same_top` is bool.

    `same_top5` is the share of the reference's five likeliest tokens that are among the candidate's five.
    """

    kld: torch.Tensor
    max_abs: torch.Tensor
    same_top: torch.Tensor
    same_top5: torch.Tensor
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
    same_top5: float
    nll_reference: float
    nll_candidate: float
    ppl_ratio: float
    ppl_ratio_se: float

    @property
    def nll_difference(self) -> float:
        """Candidate's minus reference's, in nats a token."""
        return self.nll_candidate - self.nll_reference

    @property
    def nll_difference_se(self) -> float:
        """Its standard error, tokens paired."""
        return self.ppl_ratio_se / self.ppl_ratio if self.ppl_ratio else nan

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
        derived = ("nll_difference", "nll_difference_se", "ppl_reference", "ppl_candidate")
        values = asdict(self) | {name: getattr(self, name) for name in derived}
        return {key: value if isfinite(value) else None for key, value in values.items()}


def _exp(value: float) -> float:
    """exp that stays within a double's range."""
    return exp(max(-700.0, min(value, 700.0))) if isfinite(value) else nan


class Divergence:
    """Figures of several candidates against one reference at the same N positions, block by block of the vocabulary."""

    def __init__(self, targets: torch.Tensor, candidates: int) -> None:
        """`targets`: (N,) token ids, on the device of the logits."""
        self.reference = _Softmax(targets)
        self.candidates = [_Softmax(targets) for _ in range(candidates)]
        zero = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
        self.cross = [zero.clone() for _ in range(candidates)]
        self.max_abs = [zero.clone() for _ in range(candidates)]

    def add(self, first: int, reference: torch.Tensor, candidates: Sequence[torch.Tensor]) -> None:
        """Takes the columns from `first` on: logits (N, R) of the reference and of each candidate, any float dtype."""
        p, before = reference.double(), self.reference.total
        weights, there, scale = self.reference.add(first, p)
        sums = weights.sum(-1)
        for number, (side, logits) in enumerate(zip(self.candidates, candidates, strict=True)):
            q = logits.double()
            here = side.add(first, q)[1]
            apart = p - q
            # sum e^a (a - b): what was summed so far moves to the new maxima
            moved = scale * (self.cross[number] + before * (there - here))
            added = torch.linalg.vecdot(weights, apart) - (self.reference.peak - side.peak) * sums
            self.cross[number] = moved + added
            low, high = apart.aminmax(dim=-1)
            self.max_abs[number] = torch.maximum(self.max_abs[number], torch.maximum(-low, high))

    def finish(self) -> list[TokenFigures]:
        """What was added, one a candidate."""
        return [self._figures(*parts) for parts in zip(self.candidates, self.cross, self.max_abs, strict=True)]

    def _figures(self, side: _Softmax, cross: torch.Tensor, max_abs: torch.Tensor) -> TokenFigures:
        p = self.reference
        kld = cross / p.total - p.total.log() + side.total.log()
        common = (p.top[:, :, None] == side.top[:, None, :]).any(-1).double().mean(-1)
        return TokenFigures(
            kld=kld.cpu(),
            max_abs=max_abs.cpu(),
            same_top=(p.first == side.first).cpu(),
            same_top5=common.cpu(),
            nll_reference=p.nll.cpu(),
            nll_candidate=side.nll.cpu(),
        )


class _Softmax:
    """One side's running maximum, sum of exponentials, target's logit and five largest; NaN and Inf end up in all."""

    def __init__(self, targets: torch.Tensor) -> None:
        self.targets = targets
        self.peak = torch.full(targets.shape, -inf, dtype=torch.float64, device=targets.device)
        self.total = torch.zeros_like(self.peak)
        self.hit = torch.full_like(self.peak, nan)
        self.values = torch.empty(len(targets), 0, dtype=torch.float64, device=targets.device)
        self.top = torch.empty(len(targets), 0, dtype=torch.long, device=targets.device)

    def add(self, first: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(e^a of the block, old maximum minus new or 0 at the start, e^ of that): see the module's docstring."""
        peak = torch.maximum(self.peak, logits.amax(-1))
        moved = torch.where(self.total == 0, 0.0, self.peak - peak)
        weights, scale = (logits - peak[:, None]).exp_(), moved.exp()
        self.peak, self.total = peak, self.total * scale + weights.sum(-1)
        column = self.targets - first
        within = (column >= 0) & (column < logits.shape[1])
        picked = logits.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self.hit = torch.where(within, picked, self.hit)
        values, ids = logits.topk(min(TOP, logits.shape[1]), -1)
        values, ids = torch.cat([self.values, values], -1), torch.cat([self.top, ids + first], -1)
        self.values, order = values.topk(min(TOP, values.shape[1]), -1)
        self.top = ids.gather(1, order)
        return weights, moved, scale

    @property
    def first(self) -> torch.Tensor:
        """(N,) the likeliest token, the lowest id where several are (16-bit logits tie often)."""
        return torch.where(self.values == self.values[:, :1], self.top, self.top.max() + 1).amin(-1)

    @property
    def nll(self) -> torch.Tensor:
        return self.total.log() + self.peak - self.hit


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
        same_top5=figures.same_top5.mean().item(),
        nll_reference=figures.nll_reference.mean().item(),
        nll_candidate=figures.nll_candidate.mean().item(),
        ppl_ratio=ratio,
        ppl_ratio_se=ratio * _standard_error(log_ratio),
    )


def format_ratio(value: float, error: float) -> str:
    """A value near 1 with as many decimals as its standard error has: 1.000118 ± 0.000043, never 1 ± 4e-05."""
    if not isfinite(value):
        return "not finite"
    if value == 1 and error == 0:
        return "1 ± 0"
    if not (0 < error < 100 and 1e-6 <= value < 1e6):
        return f"{_plain(value)} ± {error:.1e}"
    places = min(max(1 - floor(log10(error)), 0), 12)
    return f"{value:,.{places}f} ± {error:,.{places}f}"


def _plain(value: float) -> str:
    return f"{value:.4g}" if 1e-3 <= value < 1e6 else f"{value:.2e}"


def _standard_error(values: torch.Tensor) -> float:
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else nan
