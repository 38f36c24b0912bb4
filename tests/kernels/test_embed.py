"""Rows of an embedding table against plain indexing, from the device and from pinned memory of the host."""

from __future__ import annotations

import pytest
import torch

from qwen2tool.kernels import embed
from qwen2tool.kernels.embed import gather_rows
from tests.kernels.device import DEVICE, nearest_bf16  # noqa: F401  (a fixture)

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
HIDDEN = pytest.mark.parametrize("hidden", [1, 63, 1024, 2100])  # less than a block, one, and more than two


def table_and_ids(hidden, dtype, tokens=9, rows=33):
    """A table and ids with its first and last row and a repeated one; every other row of the table is NaN."""
    generator = torch.Generator().manual_seed(hidden)
    table = torch.randn(rows, hidden, generator=generator).to(dtype)
    ids = torch.randint(0, rows // 2, (tokens,), generator=generator) * 2
    ids[:3] = torch.tensor([rows - 1, 0, 0])
    table[1::2] = float("nan")
    return table, ids


@DTYPES
@HIDDEN
def test_kernel(hidden, dtype):
    """The kernel itself, which otherwise only a table on another device reaches."""
    table, ids = (t.to(DEVICE) for t in table_and_ids(hidden, dtype))
    buffer = torch.full((len(ids) + 1, hidden), float("nan"), dtype=dtype, device=DEVICE)
    embed._gather_kernel[(len(ids),)](table, ids, buffer, hidden, BLOCK=1024)
    assert torch.equal(buffer[:-1], table[ids]) and bool(buffer[-1].isnan().all())
    assert not torch.equal(buffer[:-1], table[ids.roll(1)]), "a row off would show"


@DTYPES
@pytest.mark.parametrize("shape", [(9,), (3, 3), (1, 0), (0,)])
def test_on_the_device(shape, dtype):
    table, ids = (t.to(DEVICE) for t in table_and_ids(63, dtype))
    ids = ids[: torch.Size(shape).numel()].view(shape)
    rows = gather_rows(table, ids)
    assert rows.dtype == dtype and rows.shape == (*shape, 63)
    assert torch.equal(rows, table[ids])


def test_refusals():
    table, ids = table_and_ids(8, torch.float32)
    elsewhere = ids.cuda() if DEVICE == "cuda" else ids.to("meta")
    with pytest.raises(ValueError, match="gather_rows: the table on the host is not pinned"):
        gather_rows(table, elsewhere)
    with pytest.raises(ValueError, match="gather_rows: the table takes a gradient"):
        gather_rows(table.requires_grad_(), ids)


@pytest.mark.gpu
@DTYPES
@HIDDEN
@pytest.mark.parametrize("shape", [(9,), (3, 3), (1, 0)])
def test_pinned(shape, hidden, dtype):
    table, ids = table_and_ids(hidden, dtype)
    ids = ids[: torch.Size(shape).numel()].view(shape)
    rows = gather_rows(table.pin_memory(), ids.cuda())
    assert rows.is_cuda and rows.dtype == dtype
    assert torch.equal(rows.cpu(), table[ids])
    strided = gather_rows(table.pin_memory(), ids.cuda().repeat_interleave(2, -1)[..., ::2])
    assert torch.equal(strided, rows)
    if hidden > 1:
        with pytest.raises(ValueError, match="not pinned"):
            gather_rows(table.pin_memory()[:, 1:], ids.cuda())


@pytest.mark.gpu
def test_pinned_table_of_more_than_2_to_the_31_numbers():
    rows, hidden = 524_800, 4096
    table = torch.empty(rows, hidden, dtype=torch.float16, pin_memory=True)
    assert table.numel() > 2**31
    ids = torch.tensor([0, 524_287, 524_288, rows - 1])
    for place, row in enumerate(ids.tolist()):
        table[row] = torch.arange(hidden).half() + place
    assert torch.equal(gather_rows(table, ids.cuda()).cpu(), table[ids])


@pytest.mark.gpu
def test_captured_in_a_graph():
    """Replayed with other ids, and after the table changed: rows are read when the graph runs."""
    table, ids = table_and_ids(1024, torch.bfloat16)
    table, ids = table.pin_memory(), ids.cuda()
    gather_rows(table, ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = gather_rows(table, ids)
    ids.copy_(ids.flip(0))
    table[0] = 3.0
    graph.replay()
    assert torch.equal(rows.cpu(), table[ids.cpu()])
