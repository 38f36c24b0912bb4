"""Attention backends that are safe for Qwen2's biases, as a context around our own calls.

Real k biases reach 211 in a 0.5B model and norms of 900 in a 7B, so scores pass 1,000. With a mask, cuDNN's backward
then returns NaN rows in dQ (https://github.com/pytorch/pytorch/issues/196678: torch 2.11 to 2.13 on H100 and H200,
where it is what torch picks for a mask): a stock trainer gets a NaN gradient and trains on. Flash, memory-efficient and
plain attention stay finite on the same tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel

SAFE_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def safe_attention() -> Iterator[None]:
    """Inside, scaled_dot_product_attention never picks cuDNN; afterwards the process is as before.

    Put it around forward and backward alike: gradient checkpointing runs attention again in the backward.
    """
    with sdpa_kernel(SAFE_BACKENDS):
        yield
