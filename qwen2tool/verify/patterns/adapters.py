"""How much of a known adapter a checkpoint holds: none, twice, at another scale, or not in every layer.

With D = scaling * B A and E = candidate - expected, least squares gives E = sum of c_i D_i over the adapters of a
module; the candidate then holds 1 + c_i times adapter i. The rounding of the sum to 16 bit is independent of D and
averages out: over 10**6 entries the factor is known to a thousandth, though single entries may be all rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import sqrt
from typing import NamedTuple

import torch

from qwen2tool.checkpoint.adapter import Adapter, LoraPair
from qwen2tool.checkpoint.reader import read_tensor
from qwen2tool.checkpoint.view import AnyTensor, Derived
from qwen2tool.verify.patterns.finding import Finding
from qwen2tool.verify.tensors import BLOCK

LITTLE = 0.02
"""Of the update: factors nearer to each other are one."""
ROUNDING = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
EXPLAINED = 0.5
"""Of the squared difference, which the update has to explain, or leave no more than a rounding."""
FEW_ROUNDINGS = 1.5
"""Times the largest rounding of an entry, which about eight roundings in turn add up to, and 8-bit integers exceed."""


class Held(NamedTuple):
    """How many times each update is held, and whether all that is left is a few roundings."""

    factors: list[float]
    exact: bool

    @property
    def is_right(self) -> bool:
        """Each once, and nothing else: what was rounded on the way may still differ."""
        return self.exact and all(abs(factor - 1) <= LITTLE for factor in self.factors)


def pairs_of(name: str, adapters: Sequence[Adapter]) -> list[tuple[int, LoraPair]]:
    """(which adapter, pair) for those that adapt the weight `name`."""
    module = name.removesuffix(".weight")
    return [(n, adapter.pairs[module]) for n, adapter in enumerate(adapters) if module in adapter.pairs]


def carries(tensor: AnyTensor, pair: LoraPair) -> bool:
    """Whether a view's tensor has this pair added already."""
    return isinstance(tensor, Derived) and any(s.file == pair.a.file and s.name == pair.a.name for s in tensor.sources)


def find_factors(
    mine: AnyTensor, reference: torch.Tensor, candidate: torch.Tensor, pairs: Sequence[tuple[int, LoraPair]]
) -> Held | None:
    """How many times the candidate holds each update; None where the updates do not explain the difference.

    Sums are taken over blocks of rows: no update stands whole. What the fit leaves is ||E||^2 - c . b, with b the
    products of E with the updates.

    Args:
        mine: the reference's tensor, to tell whether it holds the updates already.
    """
    count = len(pairs)
    system, right = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    before = size = 0.0
    sides = [(read_tensor(pair.a).float(), read_tensor(pair.b).float() * pair.scaling) for _, pair in pairs]
    step = max(1, BLOCK // reference.shape[1])
    for start in range(0, len(reference), step):
        rows = slice(start, start + step)
        found = candidate[rows].float()
        error = (found - reference[rows].float()).view(-1).double()
        updates = torch.stack([(b[rows] @ a).view(-1) for a, b in sides]).double()
        system += updates @ updates.T
        right += updates @ error
        before += float(error @ error)
        size += float(found.double().square().sum())
    if float(system.diagonal().min()) == 0 or not bool(right.isfinite().all()):
        return None
    solution = torch.linalg.lstsq(system, right[:, None]).solution[:, 0]
    left = max(0.0, before - float(solution @ right))
    rounding = ROUNDING.get(candidate.dtype, 2.0**-24) * sqrt(size)
    if sqrt(left) > 3 * rounding and left > (1 - EXPLAINED) * before:
        return None
    held = [float(carries(mine, pair)) for _, pair in pairs]
    factors = [h + c for h, c in zip(held, solution.tolist(), strict=True)]
    return Held(factors, exact=sqrt(left) <= FEW_ROUNDINGS * rounding)


def label_of(adapter: Adapter, adapters: Sequence[Adapter]) -> str:
    """By name where there are several, by path where two have one name."""
    if len(adapters) == 1:
        return "the adapter"
    alone = sum(other.path.name == adapter.path.name for other in adapters) == 1
    return f"the adapter {adapter.path.name if alone else adapter.path}"


def find_not_finite(names: Iterable[str], adapters: Sequence[Adapter]) -> list[Finding]:
    """Adapters whose own A or B holds NaN or Inf for one of the weights `names`."""
    found = []
    for name in names:
        for number, pair in pairs_of(name, adapters):
            if not all(bool(read_tensor(part).isfinite().all()) for part in (pair.a, pair.b)):
                label = label_of(adapters[number], adapters)
                found.append(Finding(code="adapter_not_finite", name=name, detail=label))
    return found


def findings_of(factors: dict[str, list[tuple[int, LoraPair, float]]], adapters: Sequence[Adapter]) -> list[Finding]:
    """Findings of all modules that hold another multiple of an adapter than one; those that differ elsewhere are none.

    Args:
        factors: weight name -> (which adapter, pair, how many times it is held).
    """
    found = []
    for number, adapter in enumerate(adapters):
        held = {name: (pair, f) for name, parts in factors.items() for n, pair, f in parts if n == number}
        label = label_of(adapter, adapters)
        nowhere = len(held) == len(adapter.pairs) and all(abs(factor) <= LITTLE for _, factor in held.values())
        for name, (pair, factor) in held.items():
            if abs(factor - 1) > LITTLE:
                rslora = bool(adapter.config.get("use_rslora"))
                found.append(_finding(name, pair, factor, label, nowhere, rslora))
    return found


def _finding(name: str, pair: LoraPair, factor: float, label: str, nowhere: bool, rslora: bool) -> Finding:
    if abs(factor) <= LITTLE:
        return Finding(code="adapter_not_applied" if nowhere else "adapter_missing", name=name, detail=label)
    if abs(factor - 2) <= 2 * LITTLE:
        return Finding(code="adapter_twice", name=name, detail=label)
    return Finding(code="adapter_scaling", name=name, detail=f"{label}|{_round(factor)}|{_known(pair, factor, rslora)}")


def _round(factor: float) -> str:
    """Two digits: factors of different modules scatter in the third."""
    return f"{factor:.2g}"


def _known(pair: LoraPair, factor: float, rslora: bool) -> str:
    """Where the factor comes from, if it is one of the usual mistakes."""
    root = sqrt(pair.rank)
    usual = {
        "as if there were no scaling": 1 / pair.scaling,
        "as if alpha were not divided": root if rslora else root**2,
        "as if it were taken away": -1.0,
    }
    if rslora:
        usual["as if alpha were divided by the rank, not its square root"] = 1 / root
    else:
        usual["as if alpha were divided by the rank's square root (rsLoRA)"] = root
    return next((words for words, value in usual.items() if abs(factor / value - 1) < LITTLE), "")
