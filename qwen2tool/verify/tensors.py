"""Second stage: every tensor against its counterpart, one pair in memory at a time.

Biases and norms are always judged here. Zeroing the v bias of one layer of a real Qwen2.5-0.5B improves its perplexity
and moves the logits less than quantisation does: only the tensor itself tells.

Memory: one pair in its own dtype, the update of an adapted one in fp32, and blocks of 2**22 entries in float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, nan, sqrt
from typing import Literal

import torch

from qwen2tool.checkpoint.adapter import Adapter, delta
from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.checkpoint.reader import read_tensor
from qwen2tool.console import progress
from qwen2tool.verify.inventory import HEAD, TABLE, used_tensors
from qwen2tool.verify.limits import UPDATE_SLACK

Kind = Literal["identical", "one rounding", "different"]
BLOCK = 1 << 22
ORDERED = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class TensorComparison:
    """One tensor: how it compares, and where it differs by how much.

    `relative_error` is ||candidate - expected|| / ||expected||; `zeroed` means that the candidate is all zeros and the
    reference is not; `one_off` counts entries of an adapted weight that are one unit in the last place from the sum.
    """

    name: str
    kind: Kind
    max_abs: float = 0.0
    relative_error: float = 0.0
    cosine: float = 1.0
    zeroed: bool = False
    one_off: int = 0

    @property
    def is_vector(self) -> bool:
        """A bias or a norm: never quantised, never touched by LoRA, so never allowed to differ."""
        return self.name.endswith(".bias") or self.name.endswith("norm.weight")

    @property
    def is_table(self) -> bool:
        """Embedding or head: rows of tokens that a text does not use leave no trace in its logits."""
        return self.name in (TABLE, HEAD)


def compare_tensors(reference: Checkpoint, candidate: Checkpoint, adapter: Adapter | None) -> list[TensorComparison]:
    """Compares all tensors that both sides hold in one shape; with `adapter`, its update is added to the reference."""
    pairs = {f"{module}.weight": pair for module, pair in adapter.pairs.items()} if adapter else {}
    found = []
    with progress("comparing tensors", reference.nbytes) as advance:
        for name, mine, theirs in _counterparts(reference, candidate):
            update = delta(pairs[name]) if name in pairs else None
            found.append(compare_tensor(name, read_tensor(mine), read_tensor(theirs), update))
            advance(mine.nbytes)
    return found


def _counterparts(reference: Checkpoint, candidate: Checkpoint) -> Iterator[tuple[str, TensorInfo, TensorInfo]]:
    mine, theirs = used_tensors(reference), used_tensors(candidate)
    for name, info in mine.items():
        if name not in theirs or theirs[name].shape != info.shape:
            continue
        if name == HEAD and info is mine.get(TABLE) and theirs[name] is theirs.get(TABLE):
            continue  # tied and not stored on either side: the table speaks for it
        yield name, info, theirs[name]


def compare_tensor(
    name: str, reference: torch.Tensor, candidate: torch.Tensor, update: torch.Tensor | None = None
) -> TensorComparison:
    """Compares two contiguous tensors of one shape.

    Args:
        update: fp32, what LoRA adds to the reference; the candidate must then be the sum rounded once, give or take one
            unit in the last place, since the order of a sum is the implementation's own.
    """
    if update is None and reference.dtype == candidate.dtype and _same_bytes(reference, candidate):
        return TensorComparison(name=name, kind="identical")
    slack = UPDATE_SLACK * update.abs().max().item() if update is not None else 0.0
    tally = _Tally()
    mine, theirs, added = reference.view(-1), candidate.view(-1), None if update is None else update.view(-1)
    for start in range(0, candidate.numel(), BLOCK):
        rows = slice(start, start + BLOCK)
        tally.add(mine[rows], theirs[rows], None if added is None else added[rows], slack)
    return TensorComparison(
        name=name,
        kind="different" if tally.beyond else "one rounding",
        max_abs=tally.max_abs,
        relative_error=tally.relative_error,
        cosine=tally.cosine,
        zeroed=not candidate.any() and bool(reference.any()),
        one_off=tally.one_off,
    )


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bytes, not values: NaN equals itself, and -0.0 is not 0.0."""
    return torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


class _Tally:
    """Sums over the blocks of one tensor, in float64."""

    def __init__(self) -> None:
        self.beyond = self.one_off = 0
        self.max_abs = 0.0
        self.squared_error = self.squared_expected = self.squared_candidate = self.dot = 0.0

    def add(self, reference: torch.Tensor, candidate: torch.Tensor, update: torch.Tensor | None, slack: float) -> None:
        """One block, flat."""
        if update is None:
            expected, off = reference, ~_same_rounded(reference, candidate)
        else:
            expected = reference.float() + update
            off, one_off = _off_the_sum(expected.to(candidate.dtype), candidate, slack)
            self.one_off += int(one_off.sum())
        off |= ~candidate.isfinite() & expected.isfinite()  # an overflow is no rounding
        self.beyond += int(off.sum())
        want, have = expected.double(), candidate.double()
        error = have - want
        largest = error.abs().max().item()
        self.max_abs = largest if largest != largest else max(self.max_abs, largest)
        self.squared_error += error.square().sum().item()
        self.squared_expected += want.square().sum().item()
        self.squared_candidate += have.square().sum().item()
        self.dot += (want * have).sum().item()

    @property
    def relative_error(self) -> float:
        if self.squared_expected:
            return sqrt(self.squared_error / self.squared_expected)
        return inf if self.squared_error else 0.0

    @property
    def cosine(self) -> float:
        """NaN where one of the two is zero and has no direction."""
        product = sqrt(self.squared_expected) * sqrt(self.squared_candidate)
        return self.dot / product if product else nan


def _same_rounded(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Entry by entry: equal once both are in one of the two dtypes.

    Either will do: bf16 has the range and fp16 the digits, so that neither is the coarser one everywhere.
    """
    there, back = reference.to(candidate.dtype) == candidate, candidate.to(reference.dtype) == reference
    return there | back


def _off_the_sum(rounded: torch.Tensor, candidate: torch.Tensor, slack: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(further from the rounded sum than one unit in the last place and `slack`, off by no more than that)."""
    differs = rounded != candidate
    near = (_ordinal(rounded) - _ordinal(candidate)).abs() <= 1
    near |= (rounded.double() - candidate.double()).abs() <= slack
    return differs & ~near, differs & near


def _ordinal(values: torch.Tensor) -> torch.Tensor:
    """Floats as int64 in which neighbours are one apart, and both zeros are 0."""
    bits = values.view(ORDERED[values.element_size()]).long()
    return torch.where(bits < 0, -(bits & (2 ** (8 * values.element_size() - 1) - 1)), bits)


def count_kinds(found: list[TensorComparison]) -> Counter[str]:
    """How many tensors are of each kind."""
    return Counter(comparison.kind for comparison in found)
