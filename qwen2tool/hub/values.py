"""The values that decide whether a push is worth making: biases and norms of a checkpoint, A and B of an adapter.

A checkpoint can have every tensor in the right shape and still be ruined: transformers fills lost biases with zeros,
and whoever saves that model again gets a complete one that answers gibberish. So biases and norms are read (4 MB of a
72B model); the matrices are not, and no claim is made about them. An adapter is read whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen2tool.checkpoint.adapter import ADAPTER_FILE, Adapter
from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.checkpoint.inventory import BIAS_NAME, QKV
from qwen2tool.errors import EXIT_FINDING, UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class BiasNorms:
    """L2 norms of the biases of one projection over the layers; `zeros` counts the layers whose bias is all zero."""

    count: int
    smallest: float
    largest: float
    zeros: int


def check_biases(checkpoint: Checkpoint) -> dict[str, BiasNorms]:
    """Reads all biases and norms of a whole checkpoint; returns projection ("q", "k", "v") -> its bias norms.

    Raises:
        UserError: a NaN or an infinity in one, or a projection whose biases are zero in every layer.
    """
    norms: dict[str, list[float]] = {projection: [] for projection in QKV}
    for name, info in checkpoint.tensors.items():
        bias = BIAS_NAME.fullmatch(name)
        if bias or name.endswith("norm.weight"):
            value = _read_finite(info)
            if bias:
                norms[bias[2]].append(float(value.norm()))
    lost = [projection for projection in QKV if not any(norms[projection])]
    if lost:
        count = sum(len(norms[projection]) for projection in lost)
        raise UserError(
            f"{checkpoint.path}: all {count} {'/'.join(lost)} biases are zero: re-initialised by a load that lost them",
            "Go back to the files before that load and convert or merge again",
            EXIT_FINDING,
        )
    return {
        projection: BiasNorms(count=len(found), smallest=min(found), largest=max(found), zeros=found.count(0.0))
        for projection, found in norms.items()
    }


def check_adapter(adapter: Adapter) -> int:
    """Reads A and B of every pair; returns how many of the B matrices are all zero.

    Raises:
        UserError: a NaN or an infinity, or an adapter whose every B is zero: it changes nothing.
    """
    zeros = 0
    for pair in adapter.pairs.values():
        _read_finite(pair.a)
        zeros += not bool(_read_finite(pair.b).any())
    if zeros == len(adapter.pairs):
        raise UserError(
            f"{adapter.path / ADAPTER_FILE}: all {zeros} B matrices are zero: this adapter was never trained",
            "Push the folder that a finished training run wrote",
            EXIT_FINDING,
        )
    return zeros


def _read_finite(info: TensorInfo) -> torch.Tensor:
    """The tensor in fp64: squares of fp32 extremes must not overflow into a norm of infinity."""
    from qwen2tool.checkpoint.reader import read_tensor

    value = read_tensor(info).double()
    bad = value.numel() - int(value.isfinite().sum())
    if bad:
        raise UserError(
            f"{info.file}: {info.name} has NaN or infinity in {bad} of {value.numel()} values",
            "Go back to the last sound checkpoint: this one answers nothing",
            EXIT_FINDING,
        )
    return value
