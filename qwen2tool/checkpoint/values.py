"""What the tensors of a checkpoint hold: norms, extremes, zeros, NaN and Inf, each tensor read once.

Headers cannot tell a trained bias from the zeros that a reader filled in, nor a good matrix from a hole in a broken
download. Costs one pass over the files in pieces of 1 MB; nothing larger is ever in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import fsum, isfinite, sqrt
from typing import TYPE_CHECKING, Any

from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.console import Advance, progress
from qwen2tool.errors import UserError

if TYPE_CHECKING:
    import torch

FLOATS = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2")
"""Packed weights of quantised formats are integers, whose norms mean nothing."""
FP16_MAX = 65504.0
SAFE_TO_SQUARE = 1e15
"""Sums of squares of larger numbers can leave fp32's range."""
BLOCK_BYTES = 1 << 20
RUN = 1024
WORST = 5


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Of one tensor: `l2` and `max_abs` over its finite entries, counts of exact zeros, NaN and Inf."""

    numel: int
    l2: float
    max_abs: float
    zeros: int
    nan: int
    inf: int

    @property
    def zero_fraction(self) -> float:
        return self.zeros / self.numel if self.numel else 0.0

    @property
    def all_zero(self) -> bool:
        return 0 < self.numel == self.zeros

    def to_json(self) -> dict[str, Any]:
        return {
            "l2": self.l2,
            "max_abs": self.max_abs,
            "zero_fraction": self.zero_fraction,
            "nan": self.nan,
            "inf": self.inf,
        }


def measure(checkpoint: Checkpoint) -> dict[str, Stats]:
    """Name -> statistics of every floating-point tensor, with a progress bar in bytes.

    Raises:
        UserError: a file ends inside a tensor.
    """
    infos = [info for info in checkpoint.tensors.values() if info.dtype in FLOATS]
    with progress("reading", sum(info.nbytes for info in infos)) as advance:
        return {info.name: measure_tensor(info, advance) for info in infos}


def measure_tensor(info: TensorInfo, advance: Advance | None = None) -> Stats:
    """The statistics of one tensor, accumulated over blocks that stay in a processor's cache.

    Extremes and zeros by numpy, which is three times faster at them than torch on one core.
    """
    import numpy as np
    import torch

    from qwen2tool.checkpoint.reader import TORCH_DTYPE

    squares, largest, zeros, nan, inf = [0.0], 0.0, 0, 0, 0
    for block in _blocks(info):
        x = torch.frombuffer(block, dtype=TORCH_DTYPE[info.dtype])
        x = x if info.dtype == "F64" else x.float()
        top = _largest(x)
        if not isfinite(top):
            nan += int(x.isnan().sum())
            inf += int(x.isinf().sum())
            x = x[x.isfinite()]
            top = _largest(x)
        zeros += int(np.count_nonzero(x.numpy() == 0))
        squares.append(_sum_of_squares(x, top))
        largest = max(largest, top)
        if advance is not None:
            advance(len(block))
    return Stats(numel=info.numel, l2=sqrt(fsum(squares)), max_abs=largest, zeros=zeros, nan=nan, inf=inf)


def _blocks(info: TensorInfo) -> Iterator[memoryview]:
    """The bytes of a tensor in pieces of `BLOCK_BYTES`, each of them in the memory of the one before it.

    Raises:
        UserError: the file ends inside the tensor.
    """
    memory, left = memoryview(bytearray(min(BLOCK_BYTES, info.nbytes))), info.nbytes
    with info.file.open("rb") as handle:
        handle.seek(info.start)
        while left:
            block = memory[: min(left, BLOCK_BYTES)]
            if handle.readinto(block) != len(block):
                raise UserError(f"{info.file}: ends inside tensor {info.name}", "Copy the file again: it is damaged")
            left -= len(block)
            yield block


def _largest(x: torch.Tensor) -> float:
    """Largest magnitude; NaN where there is any."""
    if x.numel() == 0:
        return 0.0
    numbers = x.numpy()
    return max(abs(float(numbers.min())), abs(float(numbers.max())))


def _sum_of_squares(x: torch.Tensor, top: float) -> float:
    """In fp32 over runs of 1024, in double across them: right to 1e-7, where fp32 alone loses 2e-4 in 8 M numbers."""
    import torch

    if top > SAFE_TO_SQUARE:
        return float(x.double().square().sum())
    whole = x.numel() - x.numel() % RUN
    runs = torch.linalg.vector_norm(x[:whole].view(-1, RUN), dim=1)
    return float(runs.double().square().sum() + x[whole:].double().square().sum())


def summarise(checkpoint: Checkpoint, stats: Mapping[str, Stats]) -> dict[str, Any]:
    """The `values` section of a report; `not_read` counts the tensors, by dtype, whose numbers are packed."""
    weights = {name: s for name, s in stats.items() if name.endswith(".weight")}
    matrices = {name: s for name, s in weights.items() if not name.endswith("norm.weight")}
    worst = sorted(matrices, key=lambda name: (-matrices[name].nan - matrices[name].inf, -matrices[name].max_abs))
    return {
        "matrices": _total(matrices.values()).to_json()
        | {"count": len(matrices), "worst": [{"name": name} | matrices[name].to_json() for name in worst[:WORST]]},
        "not_finite": [name for name, s in stats.items() if s.nan or s.inf],
        "beyond_fp16": [name for name, s in stats.items() if s.max_abs > FP16_MAX],
        "zero_weights": [name for name, s in weights.items() if s.all_zero],
        "not_read": dict(Counter(info.dtype for name, info in checkpoint.tensors.items() if name not in stats)),
    }


def _total(stats: Iterable[Stats]) -> Stats:
    """Several tensors as if they were one."""
    every = list(stats)
    return Stats(
        numel=sum(s.numel for s in every),
        l2=sqrt(fsum(s.l2**2 for s in every)),
        max_abs=max((s.max_abs for s in every), default=0.0),
        zeros=sum(s.zeros for s in every),
        nan=sum(s.nan for s in every),
        inf=sum(s.inf for s in every),
    )
