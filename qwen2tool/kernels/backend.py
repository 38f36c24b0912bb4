"""Which of an op's two implementations runs: its Triton kernel or its plain PyTorch reference.

CUDA tensors take the kernel, all others the reference, which is the op's definition. `use` overrules that inside a
block: tests run kernels on the CPU through Triton's interpreter (TRITON_INTERPRET=1, set before triton is imported),
and a comparison on a GPU runs the references.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch

Backend = Literal["triton", "reference"]
_forced: ContextVar[Backend | None] = ContextVar("qwen2tool_kernel_backend", default=None)

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes that every kernel takes; references take float64 as well."""


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether an op on `tensor` launches its Triton kernel."""
    forced = _forced.get()
    return tensor.is_cuda if forced is None else forced == "triton"


@contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Inside, every op runs on `backend`, whatever the device of its tensors."""
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def blank(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Room (rows, columns) for an operand of products, in dtype and on the device of `like`: uninitialised on a GPU.

    On a CPU it holds zeros. 16-bit products of a CPU with AMX read up to 31 columns past the end of a strided row and
    multiply them with zero (K > 32 and no multiple of 32: uxlfoundation/oneDNN#5717, in torch up to 2.13 at least), and
    memory that happens to hold NaN makes NaN of the result.
    """
    return like.new_empty(rows, columns) if like.is_cuda else like.new_zeros(rows, columns)


def require(passed: bool, op: str, what: str) -> None:
    """Refuses what a kernel cannot take.

    Raises:
        ValueError: naming the op and what is wrong with its argument.
    """
    if not passed:
        raise ValueError(f"{op}: {what}")


def require_float(op: str, **tensors: torch.Tensor | None) -> None:
    """Passes tensors (by argument name) that are bf16, fp16 or fp32 and whose last dimension is contiguous.

    Raises:
        ValueError: naming the op, the argument, and its dtype or strides.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        require(tensor.dtype in FLOATS, op, f"{name} is {tensor.dtype}; the kernel takes bf16, fp16 and fp32")
        require(
            tensor.dim() == 0 or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1,
            op,
            f"{name} has strides {tuple(tensor.stride())}; its last dimension must be contiguous",
        )
