"""Second stage: every tensor against its counterpart, one pair in memory at a time.

Biases and norms are always judged here. Zeroing the v bias of one layer of a real Qwen2.5-0.5B improves its perplexity
and moves the logits less than quantisation does: only the tensor itself tells.

Memory: one pair in its own dtype (stored ones beyond `LARGE` entries in blocks of rows), the update of an adapted one
in fp32, and blocks of 2**18 entries in float64, which stay in a core's cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf, isfinite, nan, sqrt
from typing import Literal

import torch

from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.checkpoint.reader import read_tensor, row_blocks, same_data
from qwen2tool.checkpoint.view import AnyTensor, View, read
from qwen2tool.console import progress
from qwen2tool.verify.inventory import HEAD, TABLE, used_tensors
from qwen2tool.verify.limits import UPDATE_SLACK

Kind = Literal["identical", "one rounding", "different"]
BLOCK = 1 << 18
LARGE = 1 << 26
PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""What a model is stored in without a scale of its own."""
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


def compare_tensors(
    reference: View, candidate: View, update_of: Callable[[str], torch.Tensor | None] = lambda name: None
) -> list[TensorComparison]:
    """Compares all tensors that both sides hold in one shape.

    Args:
        update_of: what adapters add to the reference's weight of that name, fp32, or None.
    """
    found = []
    with progress("comparing tensors", reference.nbytes) as advance:
        for name, mine, theirs in _counterparts(reference, candidate):
            found.append(_compare(name, mine, theirs, update_of(name)))
            advance(mine.nbytes)
    return found


def _counterparts(reference: View, candidate: View) -> Iterator[tuple[str, AnyTensor, AnyTensor]]:
    mine, theirs = used_tensors(reference), used_tensors(candidate)
    for name, tensor in mine.items():
        if name not in theirs or theirs[name].shape != tensor.shape:
            continue
        if name == HEAD and tensor is mine.get(TABLE) and theirs[name] is theirs.get(TABLE):
            continue  # tied and not stored on either side: the table speaks for it
        yield name, tensor, theirs[name]


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
    return tally.comparison(name)


def _compare(name: str, mine: AnyTensor, theirs: AnyTensor, update: torch.Tensor | None) -> TensorComparison:
    if update is None and isinstance(mine, TensorInfo) and isinstance(theirs, TensorInfo):
        if same_data(mine, theirs):
            return TensorComparison(name=name, kind="identical")
        if _is_large(mine):
            return _compare_stored(name, mine, theirs)
    return compare_tensor(name, read(mine), read(theirs), update)


def _is_large(tensor: TensorInfo) -> bool:
    return len(tensor.shape) == 2 and tensor.numel > LARGE


def _compare_stored(name: str, reference: TensorInfo, candidate: TensorInfo) -> TensorComparison:
    """Compares two large matrices in blocks of rows: the table of a 72B is 2.5 GB, and there would be two of it."""
    blocks = [
        (mine, theirs)
        for (_, mine), (_, theirs) in zip(row_blocks(reference, BLOCK), row_blocks(candidate, BLOCK), strict=True)
    ]
    tally = _Tally()
    for mine, theirs in blocks:
        tally.add(read_tensor(mine).view(-1), read_tensor(theirs).view(-1), None, 0.0)
    return tally.comparison(name)


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bytes, not values: NaN equals itself, and -0.0 is not 0.0."""
    return torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


class _Tally:
    """Sums over the blocks of one tensor, in float64."""

    def __init__(self) -> None:
        self.beyond = self.one_off = 0
        self.any_reference = self.any_candidate = False
        self.max_abs = 0.0
        self.squared_error = self.squared_expected = self.squared_candidate = self.dot = 0.0

    def add(self, reference: torch.Tensor, candidate: torch.Tensor, update: torch.Tensor | None, slack: float) -> None:
        """One block, flat."""
        expected = reference if update is None else reference.float() + update
        want, have = expected.double(), candidate.double()
        error = have - want
        low, high = error.aminmax()
        largest = torch.maximum(high, -low).item()
        self.max_abs = largest if largest != largest else max(self.max_abs, largest)
        self.squared_error += error.dot(error).item()
        self.squared_expected += want.dot(want).item()
        self.squared_candidate += have.dot(have).item()
        self.dot += want.dot(have).item()
        self.any_reference |= bool(reference.any())
        self.any_candidate |= bool(candidate.any())
        if update is None and reference.dtype == candidate.dtype and isfinite(largest):
            self.beyond += int(error.count_nonzero())
        else:
            self._count(reference, candidate, expected, update is not None, slack)

    def _count(
        self, reference: torch.Tensor, candidate: torch.Tensor, expected: torch.Tensor, added: bool, slack: float
    ) -> None:
        have = candidate if candidate.dtype in PLAIN else candidate.double()
        if added:
            off, one_off = _off_the_sum(expected.to(have.dtype), have, slack)
            self.one_off += int(one_off.sum())
        else:
            off = ~same_rounded(reference, candidate)
        off |= ~have.isfinite() & expected.isfinite()  # an overflow is no rounding
        self.beyond += int(off.sum())

    def comparison(self, name: str) -> TensorComparison:
        """What all blocks together say."""
        return TensorComparison(
            name=name,
            kind="different" if self.beyond else "one rounding",
            max_abs=self.max_abs,
            relative_error=self.relative_error,
            cosine=self.cosine,
            zeroed=self.any_reference and not self.any_candidate,
            one_off=self.one_off,
        )

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


def numbers(tensor: AnyTensor) -> torch.Tensor:
    """The numbers of a tensor in a dtype that torch computes with: 8-bit floats and whole numbers as fp32."""
    values = read(tensor)
    return values if values.dtype in PLAIN else values.float()


def same_rounded(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Entry by entry: equal once both are in one of the two dtypes.

    Either will do: bf16 has the range and fp16 the digits, so that neither is the coarser one everywhere.
    """
    if not {reference.dtype, candidate.dtype} <= {*PLAIN}:
        return reference.double() == candidate.double()  # whole numbers and 8-bit floats are codes, not roundings
    there, back = reference.to(candidate.dtype) == candidate, candidate.to(reference.dtype) == reference
    return there | back


def _off_the_sum(rounded: torch.Tensor, candidate: torch.Tensor, slack: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(further from the rounded sum than one unit in the last place and `slack`, off by no more than that)."""
    differs = rounded != candidate
    near = (ordinal(rounded) - ordinal(candidate)).abs() <= 1
    near |= (rounded.double() - candidate.double()).abs() <= slack
    return differs & ~near, differs & near


def ordinal(values: torch.Tensor) -> torch.Tensor:
    """Floats as int64 in which neighbours are one apart, and both zeros are 0."""
    bits = values.view(ORDERED[values.element_size()]).long()
    return torch.where(bits < 0, -(bits & (2 ** (8 * values.element_size() - 1) - 1)), bits)


def count_kinds(found: list[TensorComparison]) -> Counter[str]:
    """How many tensors are of each kind."""
    return Counter(comparison.kind for comparison in found)
