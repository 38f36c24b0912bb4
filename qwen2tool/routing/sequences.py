"""A batch without its padding: the real tokens in a row, where each sequence ends, and the position of each token.

A mask costs fused attention its speed and, with Qwen2's biases, cuDNN its gradient; a token that is not there needs no
mask. Legend: B rows, T columns, N real tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from qwen2tool.kernels.attention import Sequences
from qwen2tool.kernels.backend import require


class Flat(NamedTuple):
    """What is left of a (B, T) batch: `slots` (N,) into its B T slots (None: all of them), positions (N,) int64."""

    slots: torch.Tensor | None
    positions: torch.Tensor
    sequences: Sequences


def flatten(
    rows: int,
    columns: int,
    device: torch.device,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> Flat:
    """Reads a batch as transformers' Qwen2 does; synchronises with the device unless neither tensor is given.

    Args:
        attention_mask: (B, T), 0 where a slot is padding, left, right or between.
        position_ids: (B, T) or (1, T). Without a mask, a step other than +1 starts a new packed sequence.

    Raises:
        ValueError: the mask has another shape.
    """
    positions = torch.arange(columns, device=device).expand(rows, -1) if position_ids is None else position_ids
    positions = positions.to(device).expand(rows, columns)
    if attention_mask is not None:
        shape = tuple(attention_mask.shape)
        require(shape == (rows, columns), "flatten", f"attention_mask is {shape}, not {(rows, columns)}")
        kept = attention_mask.to(device) != 0
        if not bool(kept.all()):
            return _padded(kept, positions)
    elif position_ids is not None:
        breaks = positions[:, 1:] - positions[:, :-1] != 1
        if bool(breaks.any()):
            starts = torch.nn.functional.pad(breaks, (1, 0), value=True)
            return _ragged(starts.flatten(), positions.flatten())
    offsets = torch.arange(rows + 1, dtype=torch.int32, device=device) * columns
    return Flat(None, positions.flatten(), Sequences(offsets, columns, (rows, columns)))


def _padded(kept: torch.Tensor, positions: torch.Tensor) -> Flat:
    lengths = kept.sum(1)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    index = kept.flatten().nonzero()[:, 0]
    return Flat(index, positions.flatten()[index], Sequences(offsets, int(lengths.max()), None))


def _ragged(starts: torch.Tensor, positions: torch.Tensor) -> Flat:
    begins = starts.nonzero()[:, 0]
    offsets = torch.cat([begins, begins.new_tensor([starts.numel()])]).to(torch.int32)
    longest = int((offsets[1:] - offsets[:-1]).max())
    return Flat(None, positions, Sequences(offsets, longest, None))
