"""Rows of an embedding table that may lie in pinned host memory: y_n = table[ids_n].

The GPU reads the rows it needs over the bus (2 H bytes a token; 67 MB for 8192 tokens of a 7B, 1.3 ms over PCIe 5), so
an untied table (1.2 GB at 151,936 x 4096 in bf16) need not be in its memory and no id travels to the host. Frozen
tables only: there is no backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwen2tool.kernels.backend import require

_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _gather_kernel(table: tl.tensor, ids: tl.tensor, out: tl.tensor, hidden: tl.tensor, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(ids + row).to(tl.int64) * hidden
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < hidden
        tl.store(out + row * hidden + column, tl.load(table + source + column, mask=inside, other=0.0), mask=inside)


def gather_rows(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(V, H) contiguous, (...) int64 -> (..., H) on the device of `ids`.

    Raises:
        ValueError: the table takes a gradient, or is neither on the ids' device nor pinned.
    """
    require(not table.requires_grad, "gather_rows", "the table takes a gradient, for which it must be on the GPU")
    if table.device == ids.device:
        return torch.nn.functional.embedding(ids, table)
    require(table.is_pinned() and table.is_contiguous(), "gather_rows", "the table on the host is not pinned")
    out = torch.empty(*ids.shape, table.shape[1], dtype=table.dtype, device=ids.device)
    flat = ids.contiguous().view(-1)
    if flat.numel():
        with torch.cuda.device_of(ids):  # type: ignore[no-untyped-call]
            _gather_kernel[(flat.numel(),)](table, flat, out, table.shape[1], BLOCK=_BLOCK)
    return out
