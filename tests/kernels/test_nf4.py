"""4-bit weights against bitsandbytes' own dequantisation, bit for bit."""

from __future__ import annotations

from copy import copy
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional as bnb

from qwen2tool.kernels import backend, nf4
from tests.kernels.device import DEVICE, nearest_bf16  # noqa: F401  (a fixture)

pytestmark = pytest.mark.usefixtures("nearest_bf16")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows that are whole blocks, rows cut by blocks, odd rows, one row, one column, one weight.
SHAPES = ((4, 128), (33, 96), (63, 217), (1, 4100), (5, 1), (1, 1))


def quantised(shape, *, kind="nf4", nested=True, blocksize=64, seed=0):
    """A weight whose blocks have very different scales, with bitsandbytes' packed bytes and state beside it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-3, 1, shape[0])[:, None]
    parameter = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, blocksize=blocksize, compress_statistics=nested, quant_type=kind
    ).to(DEVICE)
    return nf4.from_bnb(parameter), parameter


def truth(parameter, dtype):
    """What bitsandbytes gives, asked for one flat row of even length.

    Its AVX-512 path (0.50.2) takes the wrong scale where a row is not whole blocks; blocks run over the flat tensor
    anyway, and on CUDA the two questions have one answer.
    """
    state = copy(parameter.quant_state)
    rows, columns = state.shape
    count = rows * columns
    state.shape, state.dtype = torch.Size((1, count + count % 2)), dtype
    with torch.compiler.set_stance("force_eager"):
        flat = bnb.dequantize_4bit(parameter.data.reshape(-1, 1), state)
    return flat.reshape(-1)[:count].view(rows, columns)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def kernel(q, dtype, out=None):
    with backend.use("triton"):
        return nf4.dequantise(q, dtype, out=out)


@pytest.mark.parametrize("nested", [True, False], ids=["double", "plain"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_those_of_bitsandbytes(shape, kind, nested):
    q, parameter = quantised(shape, kind=kind, nested=nested)
    for dtype in DTYPES:
        expected = truth(parameter, dtype)
        assert same_bits(kernel(q, dtype), expected)
        assert same_bits(nf4.dequantise_reference(q, dtype), expected)


@pytest.mark.parametrize("blocksize", [32, 128, 256, 1024, 4096])
def test_every_block_size(blocksize):
    for shape in ((6, 2048), (9, 1111)):
        q, parameter = quantised(shape, blocksize=blocksize)
        assert q.blocksize == blocksize
        assert same_bits(kernel(q, torch.bfloat16), truth(parameter, torch.bfloat16))


@pytest.mark.parametrize("shape", [(8, 128), (33, 96), (7, 217), (130, 64), (3, 4160), (3, 4099)])
@pytest.mark.parametrize("extra", [1, 8, 64])
def test_rows_of_any_stride(shape, extra):
    """The buffer [W | B]: the first K columns are written whole, the others are not touched.

    The shapes hold many rows to a program and rows longer than a program, whole segments and none, one program and
    several.
    """
    q, parameter = quantised(shape)
    for dtype in DTYPES:
        buffer = torch.full((shape[0], shape[1] + extra), float("nan"), dtype=dtype, device=DEVICE)
        out = kernel(q, dtype, out=buffer[:, : shape[1]])
        assert out.data_ptr() == buffer.data_ptr()
        assert same_bits(out.contiguous(), truth(parameter, dtype))
        assert buffer[:, shape[1] :].isnan().all()


@pytest.mark.parametrize("nested", [True, False], ids=["double", "plain"])
@pytest.mark.parametrize("extra", [0, 8])
@pytest.mark.parametrize(
    ("rows", "columns", "launches"),
    [
        ((64, 32, 32), 128, 1),  # one program or two each
        ((8, 4, 7), 1024, 1),  # the last ends within a program
        ((4, 2, 6), 4096, 1),  # rows as long as a program
        ((32, 64), 128, 1),
        ((33, 32), 128, 2),  # the first ends within a program
        ((32, 32, 32, 32), 128, 4),  # more than the kernel takes
    ],
)
def test_weights_below_each_other(rows, columns, launches, extra, nested, monkeypatch):
    """q, k and v, or gate and up: each with its own scales and offset, in one launch where they fit."""
    pairs = [quantised((count, columns), nested=nested, seed=index + 1) for index, count in enumerate(rows)]
    weights = [weight for weight, _ in pairs]
    assert not nested or len({float(weight.offset) for weight in weights}) == len(rows)
    expected = torch.cat([truth(parameter, torch.bfloat16) for _, parameter in pairs])
    made, launch = [], nf4._launch
    monkeypatch.setattr(nf4, "_launch", lambda some, out: (made.append(len(some)), launch(some, out)))
    buffer = torch.full((sum(rows) + 1, columns + extra), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    out = kernel(weights, torch.bfloat16, out=buffer[:-1, :columns])
    assert same_bits(out.contiguous(), expected) and len(made) == launches and sum(made) == len(rows)
    assert buffer[-1].isnan().all() and buffer[:, columns:].isnan().all()
    assert not same_bits(kernel([weights[1], weights[0], *weights[2:]], torch.bfloat16), expected), "in their order"
    with backend.use("reference"):
        assert same_bits(nf4.dequantise(weights, torch.bfloat16), expected)


def test_weights_of_two_formats_below_each_other():
    pairs = [quantised((32, 128)), quantised((32, 128), nested=False), quantised((32, 128), blocksize=128)]
    expected = torch.cat([truth(parameter, torch.float16) for _, parameter in pairs])
    assert same_bits(kernel([weight for weight, _ in pairs], torch.float16), expected)


def test_plain_path_writes_into_strided_rows():
    q, parameter = quantised((7, 217))
    buffer = torch.full((7, 220), float("nan"), device=DEVICE)
    with backend.use("reference"):
        nf4.dequantise(q, torch.float32, out=buffer[:, :217])
    assert same_bits(buffer[:, :217].contiguous(), truth(parameter, torch.float32))


def test_bytes_that_start_off_a_word_boundary():
    """Read byte by byte, with the same result as by words."""
    q, parameter = quantised((8, 128))
    shifted = torch.zeros(q.packed.numel() + 1, dtype=torch.uint8, device=DEVICE)
    shifted[1:] = q.packed
    assert same_bits(kernel(q._replace(packed=shifted[1:]), torch.float32), truth(parameter, torch.float32))


def test_scales_are_rounded_twice():
    """Product, then sum: the weights of this test tell it from a fused multiply-add."""
    q, parameter = quantised((40, 640))
    outer = q.nested_absmax.repeat_interleave(q.nested_blocksize)[: q.absmax.numel()].double()
    fused = (q.nested_code[q.absmax.long()].double() * outer + q.offset.double()).float()
    assert (fused != nf4.scales(q)).any()
    plain = q._replace(absmax=fused, nested_absmax=None)
    expected = truth(parameter, torch.float32)
    assert same_bits(kernel(q, torch.float32), expected)
    assert not same_bits(kernel(plain, torch.float32), expected)


def test_wrong_inputs_are_seen():
    q, parameter = quantised((33, 96))
    expected = truth(parameter, torch.bfloat16)
    swapped = q._replace(packed=(q.packed >> 4) | (q.packed << 4))
    last = q.absmax.clone()
    last[-1] ^= 1
    for wrong in (swapped, q._replace(absmax=last), q._replace(offset=q.offset * 1.01), q._replace(blocksize=128)):
        assert not same_bits(kernel(wrong, torch.bfloat16), expected)


def test_no_rows():
    q, _ = quantised((2, 64))
    empty = q._replace(packed=q.packed[:0], absmax=q.absmax[:0], shape=(0, 64))
    assert kernel(empty, torch.bfloat16).shape == (0, 64)


def test_storage_of_another_dtype():
    """FSDP users keep the bytes as bf16; they are read as bytes all the same."""
    weight = torch.randn(16, 64)
    parameters = [
        bitsandbytes.nn.Params4bit(weight, requires_grad=False, blocksize=64, quant_type="nf4", quant_storage=storage)
        for storage in (torch.uint8, torch.bfloat16)
    ]
    first, second = (nf4.from_bnb(parameter.to(DEVICE)) for parameter in parameters)
    assert torch.equal(first.packed, second.packed)
    assert same_bits(kernel(second, torch.float32), truth(parameters[0].to(DEVICE), torch.float32))


def test_refusals():
    q, _ = quantised((4, 64))
    with pytest.raises(ValueError, match=r"dequantise: dtype is torch\.float64"):
        nf4.dequantise(q, torch.float64)
    with pytest.raises(ValueError, match=r"out is \(64, 4\)"):
        nf4.dequantise(q, torch.float32, out=torch.empty(64, 4))
    with pytest.raises(ValueError, match=r"not torch\.bfloat16"):
        nf4.dequantise(q, torch.bfloat16, out=torch.empty(4, 64))
    with pytest.raises(ValueError, match="last dimension must be contiguous"):
        nf4.dequantise(q, torch.float32, out=torch.empty(64, 4).t())
    with pytest.raises(ValueError, match=r"weights of \[64, 96\] columns"):
        nf4.dequantise([q, quantised((4, 96))[0]], torch.float32)
    with pytest.raises(ValueError, match="not quantised"):
        nf4.from_bnb(torch.nn.Parameter(torch.zeros(4, 4)))
    with pytest.raises(ValueError, match="repacked"):
        nf4.from_bnb(SimpleNamespace(quant_state=SimpleNamespace(packing_format_for_cpu=True)))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3584, 18944), (4864, 896), (512, 3584), (1111, 2049)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_real_shapes(shape, kind):
    for nested in (True, False):
        q, parameter = quantised(shape, kind=kind, nested=nested)
        for dtype in DTYPES:
            expected = bnb.dequantize_4bit(parameter.data, copy_as(parameter.quant_state, dtype))
            assert same_bits(kernel(q, dtype), expected)
            for extra in (5, 8, 64):
                buffer = torch.full((shape[0], shape[1] + extra), float("nan"), dtype=dtype, device=DEVICE)
                assert torch.equal(kernel(q, dtype, out=buffer[:, : shape[1]]), expected)
                assert buffer[:, shape[1] :].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "columns"), [((3584, 512, 512), 3584), ((4096, 4096, 4096), 4096), ((4864, 4864), 896)]
)
def test_real_groups(rows, columns):
    pairs = [quantised((count, columns), seed=index + 1) for index, count in enumerate(rows)]
    weights = [weight for weight, _ in pairs]
    assert nf4._in_one_launch(weights)
    states = [copy_as(parameter.quant_state, torch.bfloat16) for _, parameter in pairs]
    each = [bnb.dequantize_4bit(parameter.data, state) for (_, parameter), state in zip(pairs, states, strict=True)]
    for extra in (0, 64, 192):
        buffer = torch.full((sum(rows), columns + extra), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        assert torch.equal(kernel(weights, torch.bfloat16, out=buffer[:, :columns]), torch.cat(each))
        assert buffer[:, columns:].isnan().all()


def copy_as(state, dtype):
    """The quantisation state, asking for another output dtype."""
    state = copy(state)
    state.dtype = dtype
    return state
