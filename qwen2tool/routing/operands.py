"""What one group of a fused layer works with: its weights, masks and rows; and what all layers of a pass share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qwen2tool.kernels.attention import Sequences
from qwen2tool.kernels.backend import blank
from qwen2tool.kernels.group import Group, Weights, assemble, prefers_extended, unpack
from qwen2tool.kernels.lora import (
    Rows,
    adapter_grads,
    draw_bits,
    gradient_rows,
    group_backward,
    group_forward,
    low_rank,
    new_rows,
)
from qwen2tool.kernels.nf4 import Quantised
from qwen2tool.routing.examine import LayerSpec
from qwen2tool.routing.weights import HostWeights


class Handed:
    """The gradient that one fused layer leaves for the one below it, with room for LoRA's columns behind each row.

    Autograd passes on the tensor that a backward returns; `take` knows it again by its memory, which is then ours to
    overwrite: the gradient of the residual stream goes through all layers in one buffer, and nothing copies it.
    """

    def __init__(self) -> None:
        self._rows: Rows | None = None
        self._layer = -1

    def give(self, rows: Rows, layer: int) -> torch.Tensor:
        """The gradient of the input of `layer`, to be returned to autograd."""
        self._rows, self._layer = rows if layer else None, layer  # below the first one nobody would take it
        return rows.plain

    def take(self, dy: torch.Tensor, layer: int) -> Rows | None:
        """dy as rows of our own, None if it is not what the layer above gave: somebody else's, or a sum."""
        rows, above, self._rows = self._rows, self._layer, None
        if rows is None or above != layer + 1:
            return None
        same = rows.plain.data_ptr() == dy.data_ptr() and rows.plain.stride() == dy.stride()
        return rows if same and rows.plain.shape == dy.shape else None


class Unpacked:
    """4-bit weights that stay unpacked between passes, [W | s B; A] a group; passes fill in A and s B anew.

    A captured graph knows them by their address, so a matrix once made stays where it is.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[list[Any], tuple[int, ...], torch.Tensor]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model begins with nothing."""
        return type(self), ()

    def matrix(self, group: Group, dtype: torch.dtype) -> torch.Tensor | None:
        """(O + R, K + R) with the frozen weights in place, written again where those were exchanged or written to.

        None where another shape or dtype is asked for than first, no adapter is on, or tensors have no versions
        (`torch.inference_mode`): such passes unpack for themselves.
        """
        if torch.is_inference_mode_enabled():
            return None
        weights = [projection.weight for projection in group.projections]
        state = tuple(number for weight in weights for number in _state(weight))
        if group.width and group.stream not in self._kept:
            self._kept[group.stream] = weights, state, unpack(group, dtype)
        _, before, matrix = self._kept.get(group.stream, (weights, state, None))
        if matrix is None or matrix.shape[1] != group.columns + group.width or matrix.dtype != dtype:
            return None
        if before != state:
            self._kept[group.stream] = weights, state, unpack(group, dtype, out=matrix)
        return matrix


def _state(weight: torch.Tensor | Quantised) -> tuple[int, ...]:
    """Tells a weight from others while somebody holds it: its address is nobody else's then."""
    parts = (weight.packed, weight.absmax) if isinstance(weight, Quantised) else (weight,)
    return tuple(number for part in parts for number in (part.data_ptr(), part._version))


@dataclass(frozen=True)
class Call:
    """What all layers of one pass share.

    Attributes:
        sequences: where attention may look.
        cos, sin: (N, head_dim / 2) fp32, one row a token.
        dtype: of products; x itself may be fp32.
        seed: () int64 on the device, or None where no dropout is on.
        frugal: unpack weights again rather than hold them from the recomputation to the backward.
        tails: keep T = drop(x) A^T for the backward rather than make it again.
        handed: what backwards of neighbouring layers pass on.
        unpacked: holds the layer's weights, None: they are unpacked for each use.
        weights: brings weights that wait on the host, None: none does.
        specs: of all layers of the pass, for who comes next; None stands for a layer that is not fused.
    """

    sequences: Sequences
    cos: torch.Tensor
    sin: torch.Tensor
    dtype: torch.dtype
    seed: torch.Tensor | None = None
    frugal: bool = False
    tails: bool = True
    handed: Handed = field(default_factory=Handed)
    unpacked: Unpacked | None = None
    weights: HostWeights | None = None
    specs: Sequence[LayerSpec | None] = ()

    def at_work(self, spec: LayerSpec, following: int | None) -> LayerSpec:
        """`spec` with its weights on the device, while those of the layer that comes next start on their way."""
        if self.weights is None:
            return spec
        here = self.weights.bring(spec)
        later = self.specs[following] if following is not None and following < len(self.specs) else None
        if later is not None:
            self.weights.fetch(later)
        return here


class Operands:
    """A group with its weights, its masks, its input rows, and whether T stands in the rows already."""

    def __init__(self, group: Group, tokens: int, call: Call, *, extended: bool, known: bool) -> None:
        self.group, self.known, self._call, self._extended = group, known, call, extended
        self.bits = draw_bits(group, tokens, call.seed)
        self._weights: Weights | None = None
        self.rows: Rows

    @property
    def weights(self) -> Weights:
        if self._weights is None:
            kept = self._call.unpacked if self._extended else None
            matrix = kept.matrix(self.group, self._call.dtype) if kept is not None else None
            self._weights = assemble(self.group, self._call.dtype, extended=self._extended, unpacked=matrix)
        return self._weights

    def pause(self) -> None:
        """Called where the weights are not needed for a while."""
        if self._call.frugal:
            self._weights = None

    def fill_tail(self) -> None:
        if not self.known:
            low_rank(self.rows, self.group, self.weights, self.bits)

    def forward(self, **options: Any) -> torch.Tensor:
        y = group_forward(self.rows, self.group, self.weights, self.bits, known=self.known, **options)
        self.known = True
        return y

    def gradient(self, dy: torch.Tensor, own: Rows | None) -> Rows:
        """`gradient_rows` of dy (N, O), or `own` if that is dy, ours to write behind, with room of this width."""
        typed = dy.to(self._call.dtype)
        one_product = self.weights.matrix is not None and self.bits is None
        if one_product and own is not None and own.tail.shape[1] == self.group.width and typed is dy:
            return own
        return gradient_rows(typed, self.group, self.weights, self.bits)

    def backward(self, dy: Rows) -> torch.Tensor:
        return group_backward(dy, self.group, self.weights, self.bits)

    def grads(self, dy: Rows) -> list[torch.Tensor]:
        return adapter_grads(dy, self.rows, self.group, self.bits)


def prepare(group: Group, tokens: int, call: Call, tail: torch.Tensor | None) -> Operands:
    """Operands with uninitialised rows for the input; T as it was, where it was kept."""
    operands = Operands(group, tokens, call, extended=prefers_extended(group, tokens), known=tail is not None)
    operands.rows = new_rows(tokens, group.columns, group.width, operands.weights)
    if tail is not None:
        operands.rows.tail.copy_(tail)
    return operands


def with_room(like: torch.Tensor, width: int) -> Rows:
    """Rows of the size and dtype of `like` (N, K), with room for `width` columns behind each."""
    rows, columns = like.shape
    whole = blank(like, rows, columns + width)
    return Rows(whole[:, :columns], whole[:, columns:], whole)
