"""LoRA's products under dropout against plain PyTorch on unpacked masks, in the same dtype and in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy
import pytest
import torch
import triton.language as tl

from qwen2tool.kernels import backend, masked
from qwen2tool.kernels.dropout import keep_bits
from qwen2tool.kernels.masked import (
    masked_grad_a,
    masked_grad_a_reference,
    masked_grad_x,
    masked_grad_x_reference,
    masked_product,
    masked_product_reference,
)
from qwen2tool.kernels.masked_kernels import batches_of, slots_of
from tests.kernels.device import DEVICE, nearest_bf16  # noqa: F401  (a fixture)
from tests.tolerances import assert_as_good

pytestmark = pytest.mark.usefixtures("nearest_bf16", "bf16_products")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
P = 0.3
# Tokens, columns, ranks: odd everything; q k v of one rank; one adapter of many columns (cut into parts); ranks past a
# launch (fp32: 64 in all, 16 bit: 256); one row; one of everything.
CASES = [
    (63, 217, (5, 3)),
    (70, 128, (16, 16, 16)),
    (33, 640, (8,)),
    (300, 72, (8, 24)),
    (17, 40, (130, 70, 90)),
    (17, 40, (300,)),
    (1, 123, (4, 4)),
    (1, 1, (1,)),
]


@pytest.fixture
def bf16_products(monkeypatch):
    """For one test, Triton's interpreter multiplies bf16 operands; by itself it multiplies their bits as integers."""
    if DEVICE == "cuda":
        return
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def widened(self, a, b, *rest):
        pair = (self.cast_impl(side, tl.float32) if side.dtype.scalar == tl.bfloat16 else side for side in (a, b))
        return dot(self, *pair, *rest)

    monkeypatch.setattr(builder, "create_dot", widened)


class Case(NamedTuple):
    x: torch.Tensor
    bits: torch.Tensor
    a: torch.Tensor
    dt: torch.Tensor
    ranks: tuple[int, ...]


def strided(generator, rows, columns, dtype):
    """Random rows that lie 8 elements further apart than they are long."""
    return torch.randn(rows, columns + 8, generator=generator).to(dtype).to(DEVICE)[:, :columns]


def make(rows, columns, ranks, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(ranks)
    bits = keep_bits(torch.tensor(seed, device=DEVICE), 1, P, rows, columns, len(ranks), device=DEVICE)
    shapes = [(rows, columns), (total, columns), (rows, total)]
    x, a, dt = (strided(generator, *shape, dtype) for shape in shapes)
    return Case(x, bits, a, dt, ranks)


def masks(case, dtype):
    """keep / (1 - p) of each adapter, (P, N, K), unpacked by numpy."""
    kept = numpy.unpackbits(case.bits.cpu().numpy(), axis=-1, bitorder="little")[..., : case.x.shape[1]]
    return torch.from_numpy(kept).to(DEVICE).to(dtype) / (1 - P)


def plain(case, dtype):
    """The three results in plain PyTorch, every step in `dtype`."""
    x, a, dt = (tensor.to(dtype) for tensor in (case.x, case.a, case.dt))
    m = masks(case, dtype)
    parts = list(zip(m, a.split(case.ranks), dt.split(case.ranks, dim=1), strict=True))
    t = torch.cat([(x * keep) @ part.T for keep, part, _ in parts], dim=1)
    grad_a = torch.cat([d.T @ (x * keep) for keep, _, d in parts])
    return t, grad_a, sum(keep * (d @ part) for keep, part, d in parts)


def run(case, which="triton"):
    with backend.use(which):
        t = masked_product(case.x, case.bits, case.a, case.ranks, P)
        grad_a = masked_grad_a(case.dt, case.x, case.bits, case.ranks, P)
        out = torch.full_like(case.x, float("nan"))
        dx = masked_grad_x(case.dt, case.a, case.bits, case.ranks, P, out=out)
    return t, grad_a, dx


def assert_all_as_good(results, case, dtype):
    for out, reference, truth in zip(results, plain(case, dtype), plain(case, torch.float64), strict=True):
        assert_as_good(out, reference, truth, dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("rows", "columns", "ranks"), CASES)
def test_kernels_are_as_good_as_plain_pytorch(rows, columns, ranks, dtype):
    case = make(rows, columns, ranks, dtype)
    t, grad_a, dx = run(case)
    assert (t.dtype, grad_a.dtype, dx.dtype) == (dtype, FP32, dtype)
    assert_all_as_good((t, grad_a, dx), case, dtype)


@pytest.mark.parametrize("which", ["triton", "reference"])
def test_the_right_mask_for_each_projection(which):
    """Controls: masks of two projections swapped, one mask for all, an adapter or the factor 1/(1-p) left out."""
    case = make(63, 217, (5, 3), FP32)
    assert_all_as_good(run(case, which), case, FP32)
    a = case.a.clone()
    a[5:] = 0
    dt = case.dt.clone()
    dt[:, 5:] = 0
    swapped = case._replace(bits=case.bits[[1, 0]].contiguous())
    shared = case._replace(bits=case.bits[[0, 0]].contiguous())
    for wrong in (swapped, shared, case._replace(a=a, dt=dt)):
        for out, truth in zip(run(wrong, which), plain(case, torch.float64), strict=True):
            with pytest.raises(AssertionError, match="error"):
                assert_as_good(out, truth, truth, FP32)
    unscaled = [out * (1 - P) for out in run(case, which)]
    for out, truth in zip(unscaled, plain(case, torch.float64), strict=True):
        with pytest.raises(AssertionError, match="error"):
            assert_as_good(out, truth, truth, FP32)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_results_are_written_where_asked(dtype):
    """t into the last columns of a wider buffer that held NaN, as fp32 too; dx between rows that stay NaN."""
    case = make(33, 640, (5, 4), dtype)
    for out_dtype in (dtype, FP32):
        buffer = torch.full((33, 649), float("nan"), dtype=out_dtype, device=DEVICE)
        with backend.use("triton"):
            out = masked_product(case.x, case.bits, case.a, case.ranks, P, out=buffer[:, 640:])
        assert out.data_ptr() == buffer[:, 640:].data_ptr()
        assert buffer[:, :640].isnan().all()
        assert_as_good(out, plain(case, dtype)[0], plain(case, torch.float64)[0], dtype)
    buffer = torch.full((33, 650), float("nan"), dtype=dtype, device=DEVICE)
    with backend.use("triton"):
        masked_grad_x(case.dt, case.a, case.bits, case.ranks, P, out=buffer[:, :640])
    assert buffer[:, 640:].isnan().all()
    assert_as_good(buffer[:, :640], plain(case, dtype)[2], plain(case, torch.float64)[2], dtype)


def test_nan_around_the_inputs_is_never_read():
    """Columns behind x, A and dt, and bits behind the last column, reach no result."""
    case = make(19, 77, (3, 6), FP32)
    for tensor in (case.x, case.a, case.dt):
        tensor._base[:, tensor.shape[1] :] = float("nan")
    before = run(case)
    case.bits[..., -1] ^= 0b11100000  # columns 77, 78 and 79
    for out, same in zip(run(case), before, strict=True):
        assert bool(out.isfinite().all())
        assert torch.equal(out, same)


def test_operands_of_another_dtype_are_rounded_to_that_of_x():
    """fp32 adapters over bf16 activations, as PEFT keeps them: the same as casting them before."""
    case = make(30, 96, (8, 8), BF16)
    wide = case._replace(a=case.a.float() * (1 + 2**-12), dt=case.dt.float() * (1 + 2**-12))
    for out, same in zip(run(wide), run(case), strict=True):
        assert torch.equal(out, same)


def test_same_inputs_same_bits():
    case = make(300, 72, (8, 24), BF16)
    for first, second in zip(run(case), run(case), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("ranks", [(4,), (4, 4)])
def test_no_rows_and_no_columns(ranks):
    total = sum(ranks)
    t, grad_a, dx = run(make(0, 16, ranks, BF16))
    assert t.shape == (0, total)
    assert dx.shape == (0, 16)
    assert torch.equal(grad_a, torch.zeros(total, 16, device=DEVICE))
    with backend.use("triton"):
        empty = make(3, 0, ranks, BF16)
        t = masked_product(empty.x, empty.bits, empty.a, ranks, P)
    assert torch.equal(t, torch.zeros(3, total, dtype=BF16, device=DEVICE))


def test_gradients_are_those_of_autograd():
    """In float64 the two backward products are the derivatives of the forward, which passes gradcheck."""
    case = make(6, 21, (3, 2), torch.float64)
    x, a = (tensor.clone().requires_grad_() for tensor in (case.x, case.a))
    assert torch.autograd.gradcheck(lambda x, a: masked_product_reference(x, case.bits, a, case.ranks, P), (x, a))
    masked_product_reference(x, case.bits, a, case.ranks, P).backward(case.dt)
    grad_a = masked_grad_a_reference(case.dt, case.x, case.bits, case.ranks, P)
    grad_x = masked_grad_x_reference(case.dt, case.a, case.bits, case.ranks, P)
    torch.testing.assert_close(grad_a, a.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_x, x.grad, rtol=1e-12, atol=1e-12)
    wrong = masked_grad_x_reference(case.dt, case.a, case.bits[[1, 0]], case.ranks, P)
    assert not torch.allclose(wrong, x.grad)


# Few rows of many columns, for which masked_product cuts the columns into parts: no multiples of a block, ranks that
# are no powers of two, more parts than are added at a time, several launches into the same parts.
SPLIT = [(7, 1100, (5,)), (70, 2090, (3, 20, 64)), (3, 4200, (24, 24)), (65, 900, (130, 70, 90))]


@pytest.fixture
def poisoned(monkeypatch):
    """Parts hold NaN before they are written; returns how many each product had."""
    counts, original = [], masked._parts_of

    def parts_of(out, parts):
        found = original(out, parts)
        counts.append(parts)
        return found if parts == 1 else found.fill_(float("nan"))

    monkeypatch.setattr(masked, "_parts_of", parts_of)
    return counts


def product(case, out=None):
    with backend.use("triton"):
        return masked_product(case.x, case.bits, case.a, case.ranks, P, out=out)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("rows", "columns", "ranks"), SPLIT)
def test_columns_in_parts(rows, columns, ranks, dtype, poisoned, monkeypatch):
    """Into the middle of wider rows, whose rest stays; control: a product that loses its last part is not as good."""
    case, total = make(rows, columns, ranks, dtype), sum(ranks)
    buffer = torch.full((rows, total + 24), float("nan"), dtype=dtype, device=DEVICE)
    out = product(case, buffer[:, 8 : total + 8])
    assert poisoned[0] > 2
    expected = plain(case, dtype)[0], plain(case, torch.float64)[0]
    assert_as_good(out, *expected, dtype)
    assert buffer[:, :8].isnan().all()
    assert buffer[:, total + 8 :].isnan().all()
    add = masked._add_parts
    monkeypatch.setattr(masked, "_add_parts", lambda parts, out: add(parts[:-1], out))
    lossy = product(case)
    with pytest.raises(AssertionError, match="error"):
        assert_as_good(lossy, *expected, dtype)


def test_tall_blocks(poisoned, monkeypatch):
    """What thousands of rows take, on fewer."""
    case = make(150, 1100, (5, 20), BF16)
    monkeypatch.setattr(masked, "_product_tile", lambda *_: {"BN": 128, "BK": 64, "num_warps": 8})
    assert_as_good(product(case), plain(case, BF16)[0], plain(case, torch.float64)[0], BF16)
    assert poisoned == [4]


def test_parts_depend_on_the_shape_alone(poisoned):
    """Other strides, another dtype of the result and other neighbours in memory: the same parts and the same bits."""
    case = make(33, 1100, (5, 20), BF16)
    first = product(case)
    wide = torch.full((33, 1300), float("nan"), dtype=BF16, device=DEVICE)
    wide[:, 100:1200] = case.x
    moved = case._replace(x=wide[:, 100:1200], a=case.a.contiguous())
    assert torch.equal(product(moved), first)
    assert torch.equal(product(moved, torch.empty(33, 25, device=DEVICE)).to(BF16), first)
    assert poisoned == [4, 4, 4]


@pytest.mark.parametrize(
    ("rows", "columns", "ranks", "parts"),
    [
        (128, 4096, (64, 64, 64), 16),
        (512, 4096, (64, 64, 64), 16),
        (1024, 4096, (64, 64, 64), 8),
        (1024, 4096, (8, 8, 8), 8),
        (1024, 11008, (64,), 16),
        (1024, 896, (64, 64, 64), 3),
        (128, 18944, (64,), 30),
        (2048, 4096, (64, 64, 64), 4),
        (8192, 4096, (64, 64, 64), 2),
        (8192, 896, (64, 64, 64), 1),
        (16384, 4096, (64, 64, 64), 1),
        (20000, 18944, (64,), 1),
        (1, 1, (1,), 1),
        (1, 0, (1,), 1),
    ],
)
def test_how_many_parts(rows, columns, ranks, parts):
    """They cover the columns, none is empty, and they fill the GPU once: two programs each where those are small."""
    tile = masked._product_tile(BF16, rows, columns)
    batches = batches_of(ranks, 256, 64)
    count, span = masked._product_parts(rows, columns, tile, batches)
    assert count == parts
    assert (count - 1) * span * tile["BK"] < max(columns, 1) <= count * span * tile["BK"]
    blocks = -(-rows // tile["BN"])
    assert count == 1 or count * blocks <= 132 * (2 if ranks == (64,) else 1)


@pytest.mark.parametrize("count", [2, 8, 19])
def test_parts_are_added_first_to_last(count):
    generator = torch.Generator().manual_seed(count)
    parts = torch.randn(count, 37, 23, generator=generator).to(DEVICE)
    buffer = torch.full((37, 30), float("nan"), device=DEVICE)
    masked._add_parts(parts, buffer[:, 3:26])
    expected = torch.zeros(37, 23, device=DEVICE)
    for part in parts:
        expected += part
    assert torch.equal(buffer[:, 3:26], expected)
    assert buffer[:, [0, 1, 2, 26, 27, 28, 29]].isnan().all()
    backwards = parts.flip(0).cumsum(0)[-1]
    assert count == 2 or not torch.equal(backwards, expected)


def test_ranks_are_cut_and_packed_into_launches():
    assert slots_of((8, 24), 256) == [(0, 0, 8, 16), (1, 8, 24, 32)]
    assert slots_of((8, 100), 256, 64) == [(0, 0, 8, 64), (1, 8, 100, 128)]
    assert slots_of((300,), 256) == [(0, 0, 256, 256), (0, 256, 44, 64)]
    assert [len(batch) for batch in batches_of((64, 64, 64), 256)] == [3]
    assert [len(batch) for batch in batches_of((128, 128, 1), 256)] == [2, 1]
    assert [len(batch) for batch in batches_of((8,) * 5, 256, 64)] == [4, 1]
    assert [slot[0] for batch in batches_of((300, 16), 256) for slot in batch] == [0, 0, 1]


def test_refusals():
    case = make(4, 16, (2, 3), BF16)
    x, bits, a, dt, ranks = case
    for call, message in (
        (lambda: masked_product(x, bits[:1], a, ranks, P), "masked_product: bits is"),
        (lambda: masked_product(x, bits[..., :1], a, ranks, P), "masked_product: bits is"),
        (lambda: masked_product(x, bits, a[:4], ranks, P), "masked_product: a is"),
        (lambda: masked_product(x, bits, a, (5, 0), P), "ranks are"),
        (lambda: masked_product(x, bits, a, ranks, 1.0), r"p is 1\.0"),
        (lambda: masked_product(x, bits, a, ranks, P, out=x), "out is"),
        (lambda: masked_grad_a(dt[:, :4], x, bits, ranks, P), "masked_grad_a: dt is"),
        (lambda: masked_grad_x(dt, a[:, :8], bits, ranks, P, out=x), "masked_grad_x: a is"),
        (lambda: masked_product(x.double(), bits, a, ranks, P), r"x is torch\.float64"),
        (lambda: masked_grad_a(dt.T.contiguous().T, x, bits, ranks, P), "dt has strides"),
    ):
        with backend.use("triton"), pytest.raises(ValueError, match=message):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(
    ("rows", "columns", "ranks"),
    [
        (8192, 3584, (64, 64, 64)),
        (1024, 4096, (8, 8, 8)),
        (1024, 4096, (64, 64, 64, 64)),
        (512, 11008, (64,)),
        (128, 18944, (128, 24)),
        (4097, 2056, (64, 128)),
        (2000, 18944, (64,)),
        (1111, 896, (16, 16)),
        (512, 896, (512,)),
    ],
)
def test_real_shapes(rows, columns, ranks, dtype):
    case = make(rows, columns, ranks, dtype)
    assert_all_as_good(run(case), case, dtype)
    for first, second in zip(run(case), run(case), strict=True):
        assert torch.equal(first, second)
