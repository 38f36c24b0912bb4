"""One tensor against its counterpart: how many entries differ, and whether a scale, a shift or an order explains them.

Two passes over the pair in blocks of 2**22 entries, sums in float64; orders and grids look at samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite, sqrt

import torch

from qwen2tool.checkpoint.geometry import Geometry
from qwen2tool.verify.patterns.finding import Finding, layer_of, noun
from qwen2tool.verify.patterns.grids import SAMPLE, find_grid, find_roundings, sample_blocks
from qwen2tool.verify.patterns.orders import find_order, heads_of, near
from qwen2tool.verify.tensors import BLOCK, ordinal, same_rounded

EXACT = 2.0**-8
"""Relative error that a rounding of the result to bf16 leaves of an exact relation."""
UNLIKE = 0.1
"""Cosine below which two tensors have nothing to do with each other."""
CHANCE = 4.0
"""Standard deviations of the cosine of N random numbers, which is 1 / sqrt(N)."""
INITIAL = 0.1
"""Deviation from what an initialisation has, relative."""
COLUMNS = 8
FEW_ROWS = 0.5
MOST_ROWS = 1024
"""Rows that are looked at for being zero."""


@dataclass
class Sums:
    """Over all entries of a pair, float64; `rows` (M,): which rows differ; `first`: the first entry that does."""

    count: int = 0
    differing: int = 0
    first: int = -1
    not_finite: int = 0
    overflown: int = 0
    rows: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    rr: float = 0.0
    rc: float = 0.0
    cc: float = 0.0
    r: float = 0.0
    c: float = 0.0

    @property
    def scale(self) -> float:
        """Least squares: candidate = scale * reference."""
        return self.rc / self.rr if self.rr else 0.0

    @property
    def scale_residual(self) -> float:
        """Of the candidate's norm, what the scaled reference leaves; 1 where either is zero."""
        return sqrt(max(0.0, 1 - self.rc**2 / (self.rr * self.cc))) if self.rr and self.cc else 1.0

    @property
    def shift(self) -> float:
        """Least squares: candidate = reference + shift."""
        return (self.c - self.r) / self.count

    @property
    def shift_residual(self) -> float:
        """Of the candidate's norm, what the shifted reference leaves."""
        error = self.cc - 2 * self.rc + self.rr - self.count * self.shift**2
        return sqrt(max(0.0, error) / self.cc) if self.cc else 1.0

    @property
    def rms(self) -> float:
        """Of the reference."""
        return sqrt(self.rr / self.count)

    @property
    def cosine(self) -> float:
        return self.rc / sqrt(self.rr * self.cc) if self.rr and self.cc else 0.0


def measure(reference: torch.Tensor, candidate: torch.Tensor) -> Sums:
    """The sums of two contiguous tensors of one shape."""
    found = Sums(count=reference.numel(), rows=torch.zeros(len(reference), dtype=torch.bool))
    width = reference.shape[-1] if reference.dim() > 1 else reference.numel()
    mine, theirs = reference.view(-1), candidate.view(-1)
    for start in range(0, found.count, BLOCK):
        a, b = mine[start : start + BLOCK], theirs[start : start + BLOCK]
        off = (~same_rounded(a, b)).nonzero().flatten()
        if len(off):
            found.first = found.first if found.differing else start + int(off[0])
            found.differing += len(off)
            found.rows[(off + start) // width] = True
        bad = ~b.isfinite() & a.isfinite()
        found.not_finite += int(bad.sum())
        found.overflown += int((bad & (a.float().abs() > 65504)).sum())
        x, y = a.double(), b.double()
        found.rr += float(x @ x)
        found.rc += float(x @ y)
        found.cc += float(y @ y)
        found.r += float(x.sum())
        found.c += float(y.sum())
    return found


def examine_plainly(name: str, reference: torch.Tensor, candidate: torch.Tensor) -> Finding | None:
    """What sums alone tell of a pair that differs: not finite, zero, one entry, a factor, a shift; else None."""
    return _plain(name, reference, candidate, measure(reference, candidate))


def examine(name: str, reference: torch.Tensor, candidate: torch.Tensor, shape: Geometry, std: float) -> Finding | None:
    """What is known about one pair that differs, None where nothing is.

    Args:
        std: the deviation that new weights of this architecture start with (`initializer_range`).
    """
    sums = measure(reference, candidate)
    if (found := _plain(name, reference, candidate, sums)) is not None:
        return found
    for code, detail in _relations(name, reference, candidate, sums, shape, std):
        return Finding(code=code if "_" in code else f"{noun(name)}_{code}", name=name, detail=detail)
    return None


def _plain(name: str, reference: torch.Tensor, candidate: torch.Tensor, sums: Sums) -> Finding | None:
    part = noun(name)
    if not sums.not_finite and not (isfinite(sums.rr) and isfinite(sums.r)):
        return Finding(code="reference_not_finite", name=name)
    if sums.not_finite:
        why = "overflow" if sums.overflown == sums.not_finite else ""
        return Finding(code="not_finite", name=name, detail=why)
    if not candidate.any():
        return Finding(code=f"{part}_zero", name=name)
    if sums.differing == 1:
        one_unit = reference.dtype == candidate.dtype and _units(reference, candidate, sums.first) == 1
        code = "entry_rounded" if one_unit else "entry_changed"
        return Finding(code=code, name=name, detail=_entry(reference, candidate, sums.first))
    if sums.scale_residual <= EXACT and abs(sums.scale - 1) > EXACT:
        return Finding(code=f"{part}_scaled", name=name, detail=f"{sums.scale:.3g}")
    if sums.shift_residual <= EXACT and abs(sums.shift) > EXACT * sums.rms:
        off_by_one = part == "norm" and abs(abs(sums.shift) - 1) < INITIAL
        return Finding(
            code="norm_off_by_one" if off_by_one else f"{part}_shifted", name=name, detail=f"{sums.shift:+.3g}"
        )
    return None


def _units(reference: torch.Tensor, candidate: torch.Tensor, position: int) -> int:
    """Units in the last place between two entries."""
    one, other = (ordinal(x.reshape(-1)[position : position + 1]) for x in (reference, candidate))
    return int((one - other).abs())


def _entry(reference: torch.Tensor, candidate: torch.Tensor, position: int) -> str:
    width = reference.shape[-1]
    where = f"[{position}]" if reference.dim() == 1 else f"[{position // width}, {position % width}]"
    return f"{where} is {candidate.view(-1)[position].item():.6g} instead of {reference.view(-1)[position].item():.6g}"


def _relations(
    name: str, reference: torch.Tensor, candidate: torch.Tensor, sums: Sums, shape: Geometry, std: float
) -> Iterator[tuple[str, str]]:
    """(code, detail) of the relations that hold, the most certain first."""
    matrix = reference.dim() == 2
    if roundings := find_roundings(*(x.reshape(-1)[:SAMPLE] for x in (reference, candidate))):
        yield "rounded_weights", "|".join(roundings)
    if matrix and reference.shape[0] == reference.shape[1] and near(reference.T.float(), candidate.float()):
        yield "weight_transposed", ""
    if (order := _order(name, reference, candidate, shape)) is not None:
        yield "permuted", order
    if matrix and int(sums.rows.sum()) <= FEW_ROWS * len(reference):
        yield "rows_changed", _rows(sums, candidate)
    if matrix:
        grid, before = (find_grid(sample_blocks(x), x.shape[1]) for x in (candidate, reference))
        if (grid or before) and grid != before:
            yield "quantised_weights", f"{before or ''}|{grid or ''}"
    if noun(name) == "norm" and bool((candidate == 1).all()):
        yield "reinitialised", "all ones"
    if (
        abs(sums.cosine) < max(UNLIKE, CHANCE / sqrt(sums.count))
        and (start := _initial(name, candidate, sums, shape, std)) is not None
    ):
        yield "reinitialised", start


def _order(name: str, reference: torch.Tensor, candidate: torch.Tensor, shape: Geometry) -> str | None:
    """The permutation of entries, rows or columns that explains the candidate."""
    placed = layer_of(name)
    heads = heads_of(placed[1], shape) if placed else 1
    if reference.dim() == 1:
        return find_order(reference, candidate, heads)
    by_columns = heads if ".o_proj." in name else 1
    by_rows = 1 if ".o_proj." in name else heads
    if (rows := find_order(reference[:, :COLUMNS], candidate[:, :COLUMNS], by_rows)) is not None:
        return f"by rows, {rows}"
    columns = find_order(reference[:COLUMNS].T, candidate[:COLUMNS].T, by_columns)
    return None if columns is None else f"by columns, {columns}"


def _rows(sums: Sums, candidate: torch.Tensor) -> str:
    from qwen2tool.console import format_ranges

    rows = sums.rows.nonzero().flatten().tolist()
    shown = format_ranges(rows) if len(rows) <= 64 else f"{rows[0]} to {rows[-1]}"
    zero = ", which are zero" if not any(candidate[row].any() for row in rows[:MOST_ROWS]) else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown} ({len(rows)} of {len(candidate)}){zero}"


def _initial(name: str, candidate: torch.Tensor, sums: Sums, shape: Geometry, std: float) -> str | None:
    """How a new module would have been filled, where the candidate looks like one."""
    deviation = sqrt(max(0.0, sums.cc / sums.count - (sums.c / sums.count) ** 2))
    if noun(name) == "bias":
        largest = float(candidate.abs().max())
        bound = shape.hidden_size**-0.5
        uniform = largest <= bound * 1.01 and abs(deviation * 3**0.5 / bound - 1) < 2 * INITIAL
        return "uniform as torch starts a linear layer" if uniform else None
    if noun(name) == "weight" and abs(deviation / std - 1) < INITIAL:
        return f"normal with deviation {std:g} as transformers starts a layer"
    return None
