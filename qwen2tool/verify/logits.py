"""Fourth level: the head over the last hidden states of all runs, in blocks of the vocabulary and of the text.

A block is at most `BLOCK_ROWS` rows of the head and `BLOCK_TOKENS` tokens, so that neither the head (72B: 5 GB in fp32)
nor the logits (4,096 tokens x 152,064: 5 GB in float64) ever stand whole; `statistics.Divergence` puts blocks together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwen2tool.checkpoint.load import quiet_transformers
from qwen2tool.checkpoint.view import read
from qwen2tool.console import progress
from qwen2tool.verify.inventory import HEAD, used_tensors
from qwen2tool.verify.sides import LowRank, Side
from qwen2tool.verify.statistics import Divergence, LogitFigures, concatenate, summarise
from qwen2tool.verify.stream import Matrix, Rows, Text

BLOCK_ROWS, BLOCK_TOKENS = 8192, 256
"""2 M logits: 17 MB in float64, of which five live at once."""
NORM = "model.norm.weight"


@dataclass(frozen=True, kw_only=True)
class LastStates:
    """What a run predicts from: its hidden states behind the last layer, whose they are, and the dtype it runs in."""

    side: Side
    rows: Rows
    dtype: torch.dtype


def compare_logits(reference: LastStates, others: list[LastStates], text: Text, device: str) -> list[LogitFigures]:
    """Figures of each of `others` against `reference` over all scored tokens; all have one vocabulary."""
    runs = [reference, *others]
    states = [_normed(run, text, device) for run in runs]
    heads = {id(run.side): _Head(run.side, device) for run in runs}
    chunks = [slice(start, start + BLOCK_TOKENS) for start in range(0, len(text.targets), BLOCK_TOKENS)]
    parts = [Divergence(text.targets[chunk].to(device), len(others)) for chunk in chunks]
    height = next(iter(heads.values())).height
    with torch.no_grad(), progress("comparing logits", height) as advance:
        for first in range(0, height, BLOCK_ROWS):
            block = slice(first, min(first + BLOCK_ROWS, height))
            for head in heads.values():
                head.turn_to(block)
            for part, chunk in zip(parts, chunks, strict=True):
                logits = [heads[id(r.side)].logits(s[chunk], r.dtype) for r, s in zip(runs, states, strict=True)]
                part.add(first, logits[0], logits[1:])
            advance(block.stop - first)
    finished = [part.finish() for part in parts]
    return [summarise(concatenate([part[number] for part in finished])) for number in range(len(others))]


def _normed(run: LastStates, text: Text, device: str) -> torch.Tensor:
    """(N, H) behind the last norm where a token is scored, in the run's dtype."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    shape = run.side.view.geometry
    with quiet_transformers(), torch.no_grad():
        norm = Qwen2RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        norm.weight.data = read(run.side.view.tensors[NORM]).to(device, run.dtype)
        chunks = torch.split(text.rows, BLOCK_TOKENS)
        return torch.cat([norm(run.rows.pick(chunk).to(device, run.dtype)) for chunk in chunks])


class _Head:
    """One side's head, a block of its rows at a time, in each dtype that asks for it."""

    def __init__(self, side: Side, device: str) -> None:
        self._matrix, self._device = Matrix(used_tensors(side.view)[HEAD]), device
        self._low_rank = side.low_rank("lm_head", device)
        self._blocks: dict[torch.dtype, torch.Tensor] = {}
        self._parts: list[LowRank] = []

    @property
    def height(self) -> int:
        return self._matrix.height

    def turn_to(self, rows: slice) -> None:
        self._blocks = {torch.float32: self._matrix.block(rows).to(self._device, torch.float32)}
        self._parts = [LowRank(a=part.a, b=part.b[rows], scaling=part.scaling) for part in self._low_rank]

    def logits(self, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(n, rows of the block), rounded to `dtype` as transformers' are."""
        if dtype not in self._blocks:
            self._blocks[dtype] = self._blocks[torch.float32].to(dtype)
        logits = torch.nn.functional.linear(states, self._blocks[dtype])
        for part in self._parts:
            logits = logits + part(states)
        return logits.to(dtype)
