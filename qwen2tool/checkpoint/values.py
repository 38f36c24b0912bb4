"""What the tensors of a checkpoint hold: norms, extremes, zeros, NaN and Inf, each tensor read once.

Headers cannot tell a trained bias from the zeros that a reader filled in, nor a good matrix from a hole in a broken
download. Costs one pass over the files in pieces of 1 MB; nothing larger is ever in memory.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from math import hypot, isfinite, sqrt
from typing import TYPE_CHECKING, Any

from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.console import Advance, progress
from qwen2tool.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Numbers = npt.NDArray[np.floating]

FLOATS = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2")
"""Packed weights of quantised formats are integers, whose norms mean nothing."""
FP16_MAX = 65504.0
SAFE_TO_SQUARE = 1e15
"""Sums of squares of larger numbers can leave fp32's range."""
BLOCK_BYTES = 1 << 20
AT_ONCE = min(4, os.cpu_count() or 1)
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

    A few tensors at a time, each on one core: threads that share one block wait for each other at its end, on a busy
    machine nine tenths of the time.

    Raises:
        UserError: a file ends inside a tensor.
    """
    infos = [info for info in checkpoint.tensors.values() if info.dtype in FLOATS]
    with progress("reading", sum(info.nbytes for info in infos)) as advance, ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            found = pool.map(lambda info: measure_tensor(info, advance), infos)
            return {info.name: stats for info, stats in zip(infos, found, strict=True)}
        finally:
            pool.shutdown(cancel_futures=True)


def measure_tensor(info: TensorInfo, advance: Advance | None = None) -> Stats:
    """The statistics of one tensor, accumulated over blocks that stay in a processor's cache; by numpy, on one core."""
    import numpy as np

    norms, largest, zeros, nan, inf = [0.0], 0.0, 0, 0, 0
    for block in _blocks(info):
        x = _numbers(block, info.dtype)
        top = _largest(x)
        if not isfinite(top):
            nan += int(np.isnan(x).sum())
            inf += int(np.isinf(x).sum())
            x = x[np.isfinite(x)]
            top = _largest(x)
        zeros += int(np.count_nonzero(x == 0))
        norms.append(_norm(x, top))
        largest = max(largest, top)
        if advance is not None:
            advance(len(block))
    return Stats(numel=info.numel, l2=hypot(*norms), max_abs=largest, zeros=zeros, nan=nan, inf=inf)


def _numbers(block: memoryview, dtype: str) -> Numbers:
    """The numbers in a block, in fp32 or wider."""
    import numpy as np

    if dtype == "BF16":  # the upper half of a float32
        x: Numbers = np.left_shift(np.frombuffer(block, "<u2"), 16, dtype="<u4", casting="unsafe").view("<f4")
    elif dtype.startswith("F8"):
        x = _eight_bits(dtype)[np.frombuffer(block, np.uint8)]
    else:
        x = np.frombuffer(block, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])
    return x.astype(np.float32) if dtype == "F16" else x


@cache
def _eight_bits(dtype: str) -> Numbers:
    """The number of each of the 256 codes, which torch knows and numpy does not."""
    import torch

    from qwen2tool.checkpoint.reader import TORCH_DTYPE

    codes: Numbers = torch.arange(256, dtype=torch.uint8).view(TORCH_DTYPE[dtype]).float().numpy()
    return codes


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


def _largest(x: Numbers) -> float:
    """Largest magnitude; NaN where there is any."""
    return max(abs(float(x.min())), abs(float(x.max()))) if x.size else 0.0


def _norm(x: Numbers, top: float) -> float:
    """In fp32 over runs of 1024, in double across them: right to 1e-7, where fp32 alone loses 2e-4 in 8 M numbers."""
    import numpy as np

    if top > SAFE_TO_SQUARE:
        return top * float(np.linalg.norm(x.astype(np.float64) / top))
    whole = x.size - x.size % RUN
    runs = x[:whole].reshape(-1, RUN)
    rest = np.square(x[whole:], dtype=np.float64).sum()
    return sqrt(np.einsum("ij,ij->i", runs, runs).sum(dtype=np.float64) + rest)


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
        l2=hypot(*(s.l2 for s in every)),
        max_abs=max((s.max_abs for s in every), default=0.0),
        zeros=sum(s.zeros for s in every),
        nan=sum(s.nan for s in every),
        inf=sum(s.inf for s in every),
    )
