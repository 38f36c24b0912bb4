"""What stands together in one product: linears of one input with their biases and adapters, and their operands.

    M = [ W  | s B ]   O rows      forward  [x | T] M[:O]^T + b        T = x A^T
        [ A  |  -  ]   R rows      backward dx = [dy | dy s B] M[:, :K]

Legend: N tokens, K input columns, O = sum O_p output columns of the projections p, r_j rank of adapter j, R the sum of
ranks rounded up to a multiple of 8 (16-byte rows), the pad being zeros. Filling M costs 4 O K bytes (2.5 O K from NF4,
which has to be unpacked somewhere anyway).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from qwen2tool.kernels.backend import blank
from qwen2tool.kernels.nf4 import Quantised, dequantise
from qwen2tool.kernels.rows import copy_rows, fill_adapters, scaled


class Adapter(NamedTuple):
    """One LoRA: a (r, K), b (O, r), and the factor of their product (alpha / r, or alpha / sqrt(r))."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


class Projection(NamedTuple):
    """One linear: weight (O, K) or its quantised form, bias (O,) or None, the adapters that are on."""

    weight: torch.Tensor | Quantised
    bias: torch.Tensor | None
    adapters: tuple[Adapter, ...] = ()


def padded(rank: int) -> int:
    """Columns of M for adapters of so many ranks together: a multiple of 8, for aligned rows."""
    return -(-rank // 8) * 8


@dataclass(frozen=True)
class Group:
    """Projections of one input, dropout's probability, and which masks are drawn (the same for all of them)."""

    projections: tuple[Projection, ...]
    dropout: float = 0.0
    stream: int = 0

    @property
    def columns(self) -> int:
        """K."""
        return int(self.projections[0].weight.shape[1])

    @property
    def outs(self) -> tuple[int, ...]:
        """O_p of each projection."""
        return tuple(int(p.weight.shape[0]) for p in self.projections)

    @property
    def rows(self) -> int:
        """O."""
        return sum(self.outs)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """All adapters, projection by projection."""
        return tuple(adapter for projection in self.projections for adapter in projection.adapters)

    @property
    def ranks(self) -> tuple[int, ...]:
        """r_j of each adapter."""
        return tuple(int(adapter.a.shape[0]) for adapter in self.adapters)

    @property
    def width(self) -> int:
        """R: the sum of ranks, `padded`."""
        return padded(sum(self.ranks))

    @property
    def parameters(self) -> list[torch.Tensor]:
        """A and B of every adapter, in the order in which `group_backward` returns their gradients."""
        return [tensor for adapter in self.adapters for tensor in (adapter.a, adapter.b)]

    def blocks(self) -> list[tuple[Adapter, slice, slice]]:
        """Each adapter with its rows of y's columns (O) and its columns of T (R)."""
        found, row, column = [], 0, 0
        for projection, out in zip(self.projections, self.outs, strict=True):
            for adapter in projection.adapters:
                rank = int(adapter.a.shape[0])
                found.append((adapter, slice(row, row + out), slice(column, column + rank)))
                column += rank
            row += out
        return found


def plain_weight(weight: torch.Tensor | Quantised, dtype: torch.dtype) -> torch.Tensor:
    """The frozen weight (O, K) in `dtype`; no copy where it is there already."""
    return dequantise(weight, dtype) if isinstance(weight, Quantised) else weight.to(dtype)


class Weights(NamedTuple):
    """A group's operands in one dtype: M (O + R, K + R) in the extended form, else None; A (R, K); s B as blocks."""

    matrix: torch.Tensor | None
    a: torch.Tensor
    scaled_b: list[torch.Tensor]


def prefers_extended(group: Group, tokens: int) -> bool:
    """Whether filling M, in the forward and again in the backward (8 O K bytes), is cheaper than adding LoRA to y in
    fp32 (24 N O). Without adapters there is nothing to add: weights serve where they lie, unless they are packed."""
    quantised = all(isinstance(projection.weight, Quantised) for projection in group.projections)
    return quantised or (bool(group.adapters) and 3 * tokens > group.columns)


def unpack(group: Group, dtype: torch.dtype, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """M (O + R, K + R), new or in `out`, with the frozen weights in their place; that of the adapters is left alone."""
    weight = group.projections[0].weight
    device = weight.packed.device if isinstance(weight, Quantised) else weight.device
    like, width = torch.empty(0, dtype=dtype, device=device), group.width
    matrix = blank(like, group.rows + width, group.columns + width) if out is None else out
    base = matrix[: group.rows, : group.columns]
    weights = [projection.weight for projection in group.projections]
    quantised = [weight for weight in weights if isinstance(weight, Quantised)]
    if len(quantised) == len(weights):
        dequantise(quantised, dtype, out=base)
        return matrix
    for weight, rows in zip(weights, torch.split(base, list(group.outs)), strict=True):
        if isinstance(weight, Quantised):
            dequantise(weight, dtype, out=rows)
        else:
            copy_rows(weight.detach().to(dtype), rows)
    return matrix


def assemble(group: Group, dtype: torch.dtype, *, extended: bool, unpacked: torch.Tensor | None = None) -> Weights:
    """Unpacks or copies the frozen weights and the adapters, cast to `dtype` with one rounding (s B included).

    Args:
        unpacked: of `unpack`, kept from an earlier pass: adapters alone are filled in anew.
    """
    k, width = group.columns, group.width
    adapters = [(x.a.detach(), x.b.detach(), x.scale, rows) for x, rows, _ in group.blocks()]
    if not extended:
        weight = group.projections[0].weight
        device = weight.packed.device if isinstance(weight, Quantised) else weight.device
        a = torch.empty(width, k, dtype=dtype, device=device)
        fill_adapters(a, None, adapters)
        return Weights(None, a, [scaled(b, scale).to(dtype) for _, b, scale, _ in adapters])
    matrix = unpack(group, dtype) if unpacked is None else unpacked
    a, scaled_b = matrix[group.rows :, :k], matrix[: group.rows, k:]
    fill_adapters(a, scaled_b, adapters)
    return Weights(matrix, a, [scaled_b[rows, columns] for _, rows, columns in group.blocks()])
