"""The reference's own noise: what its rounding, and the way a batch is put together, do to its function.

The bar is a range, not one number: the model runs in the dtype it is meant for once as the truth runs (batches padded
behind the text, no mask), and once in batches of another size padded before the text, with a mask and shifted
positions, which takes other kernels. Both go through scaled_dot_product_attention: 16-bit eager attention rounds scores
that real k biases make larger than 1,000, and is itself wrong (a Qwen2-7B: perplexity 8.00 instead of 7.13). Where the
dtype is fp32 there is no rounding to measure, and eager attention is another order of the same sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from qwen2tool.checkpoint.load import Dtype
from qwen2tool.verify.stream import BATCH_TOKENS, Batch, Text

Attention = Literal["sdpa", "eager"]
OWN_TOKENS = 1024
"""Tokens on which the noise of a single layer is measured: a norm over so many rows hardly moves with more."""


@dataclass(frozen=True, kw_only=True)
class NoiseRun:
    """One way of running the reference that is as right as any other."""

    name: str
    dtype: torch.dtype
    attention: Attention
    batch_tokens: int
    left: bool

    def batches(self, text: Text) -> list[Batch]:
        return text.batches(self.batch_tokens, self.left)


def noise_runs(dtype: Dtype) -> tuple[NoiseRun, ...]:
    """The runs for a model that is meant to run in `dtype`; the first one differs from the truth least."""
    precision = getattr(torch, dtype)
    plain = (
        NoiseRun(
            name="eager against sdpa, float32",
            dtype=precision,
            attention="eager",
            batch_tokens=BATCH_TOKENS,
            left=False,
        )
        if dtype == "float32"
        else NoiseRun(
            name=f"{dtype} against float32", dtype=precision, attention="sdpa", batch_tokens=BATCH_TOKENS, left=False
        )
    )
    other = NoiseRun(
        name=f"{dtype}, other batches", dtype=precision, attention="sdpa", batch_tokens=2 * BATCH_TOKENS, left=True
    )
    return plain, other


def first_tokens(batches: list[Batch], most: int = OWN_TOKENS) -> list[Batch]:
    """The first batches, until they hold `most` tokens."""
    found, tokens = [], 0
    for batch in batches:
        if tokens >= most:
            break
        found.append(batch)
        tokens += batch.tokens
    return found
