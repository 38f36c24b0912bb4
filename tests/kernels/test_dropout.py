"""Dropout masks: the generator against published vectors, the kernel against the reference, and their statistics."""

from __future__ import annotations

import numpy
import pytest
import torch

from qwen2tool.kernels import backend
from qwen2tool.kernels.dropout import keep_bits, philox_reference, unpack_bits
from tests.kernels.device import DEVICE


def draw(seed=7, stream=3, p=0.1, rows=9, columns=123, masks=3, run="triton", out=None):
    with backend.use(run):
        return keep_bits(torch.tensor(seed, device=DEVICE), stream, p, rows, columns, masks, device=DEVICE, out=out)


def kept(**arguments):
    """The masks as float64 zeros and ones (P, N, K), unpacked by numpy."""
    columns = arguments["columns"]
    bits = draw(**arguments).cpu().numpy()
    return torch.from_numpy(numpy.unpackbits(bits, axis=-1, bitorder="little")[..., :columns]).double()


def words(*values):
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "expected"),
    [
        (10, (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (10, (2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (7, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ],
)
def test_the_generator_is_philox(rounds, counter, key, expected):
    """Known answers of the Random123 distribution."""
    assert tuple(int(word) for word in philox_reference(words(*counter), words(*key), rounds)) == expected


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, -1, 2**63 - 1])
@pytest.mark.parametrize(("rows", "columns", "masks"), [(1, 1, 1), (9, 123, 3), (5, 512, 2), (70, 217, 7)])
def test_kernel_draws_the_bits_of_the_reference(seed, rows, columns, masks):
    shape = {"rows": rows, "columns": columns, "masks": masks}
    for stream in (0, 1, 2**31 - 1):
        assert torch.equal(draw(seed, stream, **shape), draw(seed, stream, **shape, run="reference"))


def test_same_seed_same_masks_and_no_other():
    """Replay, and that seed (low and high half), stream and projection each matter."""
    first = draw()
    assert torch.equal(first, draw())
    for other in (draw(seed=8), draw(seed=7 + 2**32), draw(stream=4), first[[1, 0, 2]]):
        assert not torch.equal(first, other)


def test_a_row_does_not_depend_on_how_many_follow():
    assert torch.equal(draw(rows=9)[:, :4], draw(rows=4))


def test_bits_are_written_where_asked():
    out = torch.full((3, 9, 16), 0xAA, dtype=torch.uint8, device=DEVICE)
    assert draw(out=out) is out
    assert torch.equal(out, draw())


def test_unpacking():
    bits = torch.tensor([[[0b00000101, 0b10000000]]], dtype=torch.uint8)
    assert unpack_bits(bits, 16)[0, 0].nonzero().flatten().tolist() == [0, 2, 15]
    assert unpack_bits(bits, 15)[0, 0].nonzero().flatten().tolist() == [0, 2]
    drawn = draw()
    expected = numpy.unpackbits(drawn.cpu().numpy(), axis=-1, bitorder="little")[..., :123]
    assert numpy.array_equal(unpack_bits(drawn, 123).cpu().numpy(), expected)


def rate_is(masks, p):
    """Whether the share of ones, in all and at each of the eight bit places, is 1 - p within five sigma."""
    parts = [masks, *(masks[..., place::8] for place in range(8))]
    return all(abs(float(part.mean()) - (1 - p)) < 5 * (p * (1 - p) / part.numel()) ** 0.5 for part in parts)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_keep_rate(p):
    masks = kept(p=p, rows=256, columns=512, masks=2, run="reference")
    if p == 0:
        assert bool((masks == 1).all())
        return
    assert rate_is(masks, p)
    assert not rate_is(masks, p + 0.01)
    assert not rate_is(masks, p - 0.01)


def correlated(a, b, p):
    """Whether two masks of rate 1 - p agree by more than five sigma of chance."""
    score = ((a - (1 - p)) * (b - (1 - p))).mean() / (p * (1 - p))
    return bool(score.abs() > 5 / a.numel() ** 0.5)


def test_masks_are_independent():
    """Between projections, streams and seeds, between the two halves of a word, neighbours, rows; with controls."""
    p, shape = 0.3, {"rows": 256, "columns": 512, "masks": 3, "p": 0.3, "run": "reference"}
    q, k, v = kept(**shape)
    others = [k, v, kept(**shape, stream=4)[0], kept(**shape, seed=8)[0], kept(**shape, seed=7 + 2**32)[0]]
    assert not any(correlated(q, other, p) for other in others)
    assert not correlated(k, v, p)
    for shift in (1, 2, 7, 8, 16):
        assert not correlated(q[:, shift:], q[:, :-shift], p)
    assert not correlated(q[1:], q[:-1], p)
    mixed = torch.where(torch.arange(512) < 32, q, k)  # one column in sixteen shared with the other projection
    assert correlated(q, q, p)
    assert correlated(mixed, q, p)


@pytest.mark.parametrize("shape", [{"rows": 0}, {"masks": 0}, {"columns": 0}])
def test_nothing_to_draw(shape):
    assert draw(**shape).numel() == 0


def test_refusals():
    seed = torch.tensor(0, device=DEVICE)
    for arguments, message in (
        ((seed, 0, 1.0, 2, 8, 1), "p is 1.0"),
        ((seed, 0, -0.1, 2, 8, 1), "p is -0.1"),
        ((seed, 2**31, 0.1, 2, 8, 1), "stream is 2147483648"),
        ((seed.int(), 0, 0.1, 2, 8, 1), "seed is torch.int32"),
        ((seed[None], 0, 0.1, 2, 8, 1), "seed is torch.int64 of shape"),
    ):
        with pytest.raises(ValueError, match="keep_bits: " + message):
            keep_bits(*arguments, device=DEVICE)
    for wrong in (torch.empty(1, 2, 2, dtype=torch.uint8, device=DEVICE), torch.empty(1, 2, 1, device=DEVICE)):
        with pytest.raises(ValueError, match="keep_bits: out is"):
            keep_bits(seed, 0, 0.1, 2, 8, 1, device=DEVICE, out=wrong)


@pytest.mark.gpu
def test_real_shape_and_graph_replay():
    """8192 tokens of a 7B's qkv; inside a CUDA graph the seed's tensor decides, not the value it had at capture."""
    shape = {"rows": 8192, "columns": 3584, "masks": 3}
    assert torch.equal(draw(**shape), draw(**shape, run="reference"))
    seed = torch.tensor(1, device=DEVICE)
    out = torch.empty(2, 64, 32, dtype=torch.uint8, device=DEVICE)
    keep_bits(seed, 5, 0.1, 64, 256, 2, device=DEVICE, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep_bits(seed, 5, 0.1, 64, 256, 2, device=DEVICE, out=out)
    seed.fill_(99)
    graph.replay()
    assert torch.equal(out, draw(seed=99, stream=5, rows=64, columns=256, masks=2))
