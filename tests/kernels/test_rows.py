"""Row copies and the operands of adapters, against indexing in plain torch; buffers hold NaN before."""

from __future__ import annotations

import pytest
import torch

from qwen2tool.kernels import backend
from qwen2tool.kernels.group import Adapter, Group, Projection, assemble
from qwen2tool.kernels.lora import new_rows, rows_of
from qwen2tool.kernels.rows import copy_rows, fill_adapters
from tests.kernels.device import DEVICE, nearest_bf16  # noqa: F401
from tests.kernels.poison import nan_memory  # noqa: F401

pytestmark = pytest.mark.usefixtures("nearest_bf16")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def nans(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "pad"), [(3, 63, 0), (5, 64, 8), (1, 5000, 3), (0, 7, 1)])
def test_copy_rows(dtype, rows, columns, pad):
    x = torch.randn(rows, columns + pad, device=DEVICE).to(dtype)[:, :columns]
    whole = nans(rows, columns + 2 * pad + 1, dtype=dtype)
    with backend.use("triton"):
        copy_rows(x, whole[:, :columns])
    assert torch.equal(whole[:, :columns], x) and whole[:, columns:].isnan().all()


@pytest.mark.parametrize("turned", ["x", "out", "both"])
def test_rows_that_are_not_contiguous(turned):
    """A weight that was stored transposed, say."""
    x, out = torch.randn(7, 5, device=DEVICE), nans(7, 5, dtype=torch.float32)
    x = x.t().contiguous().t() if turned in ("x", "both") else x
    out = out.t().contiguous().t() if turned in ("out", "both") else out
    with backend.use("triton"):
        copy_rows(x, out)
    assert torch.equal(out, x) and not torch.equal(x, x.flip(0))


def test_copy_rows_refuses_another_shape():
    with pytest.raises(ValueError, match="copy_rows"):
        copy_rows(torch.zeros(2, 3), torch.zeros(3, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [(4,), (1,), (3, 5), (7, 2, 4), (8, 8, 8), (2, 1, 3, 2)])
def test_fill_adapters(dtype, ranks, own):
    """More than three adapters go the plain way; all agree with indexing. 16-bit adapters are scaled in fp32."""
    k, outs = 37, [11, 5, 20, 6][: len(ranks)]
    width = -(-sum(ranks) // 8) * 8
    adapters, row = [], 0
    for rank, out in zip(ranks, outs, strict=True):
        a, b = (torch.randn(size, device=DEVICE).to(own) for size in ((rank, k), (out, rank)))
        adapters.append((a, b, 0.7 * rank, slice(row, row + out)))
        row += out
    found = {}
    for kind in ("triton", "reference"):
        whole = nans(row + width, k + width, dtype=dtype)
        with backend.use(kind):
            fill_adapters(whole[row:, :k], whole[:row, k:], adapters)
        found[kind] = whole
        assert whole[:row, :k].isnan().all() and whole[row:, k:].isnan().all(), "nothing else is written"
    expected_a, expected_b = torch.zeros(width, k, device=DEVICE), torch.zeros(row, width, device=DEVICE)
    column = 0
    for a, b, scale, rows in adapters:
        expected_a[column : column + len(a)] = a
        expected_b[rows, column : column + len(a)] = b.float() * scale
        column += len(a)
    for whole in found.values():
        assert torch.equal(whole[row:, :k], expected_a.to(dtype))
        torch.testing.assert_close(
            whole[:row, k:], expected_b.to(dtype), rtol=1e-6 if dtype == torch.float32 else 0, atol=0
        )
    assert not torch.equal(expected_b, expected_b.roll(1, 0)), "a block one row off would show"


@pytest.mark.parametrize("extended", [True, False])
def test_b_is_scaled_before_its_one_rounding(extended):
    b = torch.randn(24, 4, device=DEVICE).bfloat16()
    adapter = Adapter(torch.randn(4, 40, device=DEVICE), b, 0.7)
    group = Group((Projection(torch.randn(24, 40, device=DEVICE), None, (adapter,)),))
    with backend.use("reference"):
        (scaled,) = assemble(group, torch.float32, extended=extended).scaled_b
    assert torch.equal(scaled, b.float() * 0.7) and not torch.equal(scaled, (b * 0.7).float())


def test_without_b_only_a_is_written():
    a = nans(8, 12, dtype=torch.float32)
    source = torch.randn(5, 12, device=DEVICE)
    with backend.use("triton"):
        fill_adapters(a, None, [(source, torch.randn(3, 5, device=DEVICE), 2.0, slice(0, 3))])
    assert torch.equal(a[:5], source) and not a[5:].any()


@pytest.mark.usefixtures("nan_memory")
def test_products_on_a_cpu_meet_no_memory_that_nobody_wrote():
    """oneDNN on CPUs with AMX multiplies what lies behind a row with zero; the fixture fills such memory with NaN."""
    assert bool(torch.empty(8, device=DEVICE).isnan().all())
    x, weight = (torch.randn(size, device=DEVICE).bfloat16() for size in ((9, 40), (24, 40)))
    adapter = Adapter(torch.randn(3, 40, device=DEVICE), torch.randn(24, 3, device=DEVICE), 2.0)
    weights = assemble(Group((Projection(weight, None, (adapter,)),)), x.dtype, extended=True)
    rooms = [weights.matrix, new_rows(9, 40, 8, weights).whole, rows_of(x, 8).tail]
    assert [bool(room.isfinite().all()) for room in rooms] == [DEVICE == "cpu"] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(dtype):
    """Rows as long as a 7B's, with room for LoRA's columns behind them; ranks and adapters as on the CPU."""
    for rows, columns, pad in ((8192, 4096, 64), (2049, 18944, 192), (5, 63, 0), (3, 5000, 3), (0, 7, 1)):
        test_copy_rows(dtype, rows, columns, pad)
    for ranks in ((64, 64, 64), (1,), (3, 5), (7, 2, 4), (2, 1, 3, 2)):
        for own in (torch.float32, torch.bfloat16):
            test_fill_adapters(dtype, ranks, own)
    test_without_b_only_a_is_written()


@pytest.mark.gpu
@pytest.mark.parametrize("turned", ["x", "out", "both"])
def test_rows_that_are_not_contiguous_on_a_gpu(turned):
    test_rows_that_are_not_contiguous(turned)
