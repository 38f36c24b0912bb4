"""Attention within sequences against transformers and SDPA in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend

from qwen2tool.kernels import attention
from qwen2tool.kernels.attention import Sequences, attend, attend_ragged, attend_uniform, attention_reference
from tests.kernels.attention_cases import (
    LAYOUTS,
    SIXTEEN_BIT,
    eager,
    ragged,
    sdpa,
    sequence_by_sequence,
    states,
    uniform,
    with_gradients,
)
from tests.kernels.device import DEVICE
from tests.tolerances import assert_as_good, relative_error


def test_a_cpu_never_scores_one_sequence_against_another(monkeypatch):
    """The definition masks N^2 scores; what a CPU runs gives the same from the scores of each sequence alone."""
    lengths, seen = [5, 1, 0, 11], []
    q, k, v, _ = states(sum(lengths))
    whole = attention_reference(q, k, v, ragged(lengths))

    def count(q, *rest, **options):
        seen.append(len(q))
        return attention_reference(q, *rest, **options)

    monkeypatch.setattr(attention, "attention_reference", count)
    assert relative_error(attend(q, k, v, ragged(lengths)), whole) < 1e-13 and seen == lengths
    attend(q, k, v, uniform(1, sum(lengths)))
    assert seen[4:] == [sum(lengths)], "negative control: one sequence is scored whole"


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", LAYOUTS)
def test_each_sequence_alone_in_float64(lengths, kv_heads):
    *inputs, grad = states(sum(lengths), kv_heads=kv_heads)
    ours = with_gradients(lambda q, k, v: attend(q, k, v, ragged(lengths)), inputs, grad)
    one = with_gradients(lambda q, k, v: attend(q, k, v, ragged([sum(lengths)])), inputs, grad)
    # transformers' softmax is fp32 whatever goes in; SDPA's is float64.
    for theirs, tolerance in ((sdpa, 1e-13), (eager, 1e-6)):
        truth = with_gradients(lambda *x, f=theirs: sequence_by_sequence(f, *x, lengths), inputs, grad)
        for mine, expected in zip(ours, truth, strict=True):
            assert relative_error(mine, expected) < tolerance
        if sum(length > 0 for length in lengths) > 1:
            assert all(relative_error(wrong, expected) > 1e-2 for wrong, expected in zip(one, truth, strict=True))


@pytest.mark.parametrize("scale", [None, 0.7])
def test_uniform_is_ragged_of_equal_lengths(scale):
    *inputs, grad = states(18)
    one = with_gradients(lambda q, k, v: attend(q, k, v, uniform(3, 6), scale=scale), inputs, grad)
    two = with_gradients(lambda q, k, v: attend(q, k, v, ragged([6, 6, 6]), scale=scale), inputs, grad)
    other = with_gradients(lambda q, k, v: attend(q, k, v, uniform(2, 9), scale=scale), inputs, grad)
    unscaled = with_gradients(lambda q, k, v: attend(q * (scale or 1) * 4, k, v, uniform(3, 6)), inputs, grad)
    for a, b, c in zip(one, two, other, strict=True):
        assert relative_error(a, b) < 1e-13
        assert relative_error(c, b) > 1e-2
    assert (relative_error(one[0], unscaled[0]) < 1e-13) == (scale is not None)  # D^-0.5 = 1/4


@pytest.mark.parametrize("sequences", [ragged([1, 1, 0, 1]), uniform(3, 1)])
def test_a_token_alone_returns_its_value(sequences):
    *inputs, grad = states(3)
    out, dq, dk, dv = with_gradients(lambda q, k, v: attend(q, k, v, sequences), inputs, grad)
    assert relative_error(out, inputs[2].repeat_interleave(2, dim=1)) == 0
    assert relative_error(dv, grad.unflatten(1, (2, 2)).sum(2)) < 1e-15
    assert bool((dq == 0).all())
    assert bool((dk == 0).all())
    joined = with_gradients(lambda q, k, v: attend(q, k, v, ragged([2, 1])), inputs, grad)
    assert relative_error(joined[0], out) > 1e-2
    assert bool((joined[1] != 0).any())


def test_no_cross_talk():
    q, k, v, _ = states(17)
    sequences = ragged([5, 1, 11])
    out = attend(q, k, v, sequences)
    for changed in range(17):
        other = [x.detach().clone() for x in (q, k, v)]
        for x in other:
            x[changed] += 1
        moved = (attend(*other, sequences) != out).flatten(1).any(1).nonzero().flatten().tolist()
        end = next(end for end in (5, 6, 17) if changed < end)
        assert moved == list(range(changed, end))


def test_head_order():
    """Query head h reads kv head h // (hq / hk): with one kv head's values 0, its query heads' outputs are 0."""
    q, k, v, _ = states(5, heads=6, kv_heads=3)
    v = v.detach().clone()
    v[:, 1] = 0
    out = attend(q, k, v, ragged([5]))
    assert [bool((out[:, head] == 0).all()) for head in range(6)] == [False, False, True, True, False, False]


@pytest.mark.parametrize("sequences", [ragged([2, 0, 3, 0]), uniform(1, 5)])
def test_gradcheck(sequences):
    *inputs, _ = states(5, heads=2, kv_heads=1, width=4)
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, sequences), inputs)


@pytest.mark.parametrize("sequences", [ragged([0, 0]), uniform(2, 0)])
def test_no_tokens(sequences):
    *inputs, grad = states(0)
    results = with_gradients(lambda q, k, v: attend(q, k, v, sequences), inputs, grad)
    assert [tuple(x.shape) for x in results] == [(0, 4, 16), (0, 4, 16), (0, 2, 16), (0, 2, 16)]


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_sixteen_bit_is_rounded_once(dtype):
    *inputs, _ = states(17, dtype=dtype)
    out = attend(*inputs, ragged([5, 1, 11]))
    wide = attend(*(x.double() for x in inputs), ragged([5, 1, 11]))
    assert out.dtype == dtype
    assert_as_good(out, wide.to(dtype), wide, dtype)
    with pytest.raises(AssertionError, match="above"):
        assert_as_good(out * 1.05, wide.to(dtype), wide, dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(6, 64)}, "q has shape"),
        ({"k": torch.zeros(6, 2, 16, dtype=torch.bfloat16)}, "k is torch.bfloat16 and q is torch.float32"),
        ({"v": torch.zeros(6, 1, 16)}, "k has shape"),
        ({"q": torch.zeros(5, 4, 16)}, "q has shape"),
        ({"q": torch.zeros(6, 3, 16)}, "q has shape"),
        ({"sequences": uniform(2, 4)}, "uniform .* is not 6 tokens"),
        ({"sequences": Sequences(torch.tensor([0, 6]), 6)}, "offsets are torch.int64"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    right = {"q": torch.zeros(6, 4, 16), "k": torch.zeros(6, 2, 16), "v": torch.zeros(6, 2, 16)}
    with pytest.raises(ValueError, match=f"attend: {message}"):
        attend(**(right | {"sequences": ragged([6])} | changes))


def flash(q, k, v, offsets, _, longest, __, *, causal, gqa, **options):
    """What FlashAttention computes, from the definition; records how it was asked."""
    assert causal, "not causal"
    assert gqa or q.shape[1] == k.shape[1], "grouped queries"
    return attention_reference(q, k, v, Sequences(offsets, longest), **options)


def flash_by_window(*args, window_size=(-1, -1), scale=None):
    return flash(*args, causal=window_size == (-1, 0), gqa=False, scale=scale)


def flash_by_window_grouped(*args, window_size=(-1, -1), scale=None, enable_gqa=False):
    return flash(*args, causal=window_size == (-1, 0), gqa=enable_gqa, scale=scale)


def flash_by_flag(*args, is_causal=False, scale=None):
    return flash(*args, causal=is_causal, gqa=False, scale=scale)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("signature", [flash_by_window, flash_by_window_grouped, flash_by_flag])
def test_ragged_asks_every_torch_for_causal_groups(signature, scale, monkeypatch):
    """The signatures of `varlen_attn` from torch 2.10 on, with arithmetic that runs without a GPU behind them."""
    *inputs, grad = states(17)
    sequences = ragged([5, 1, 11])
    truth = with_gradients(lambda q, k, v: attend(q, k, v, sequences, scale=scale), inputs, grad)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", signature)
    attention._varlen_options.cache_clear()
    try:
        ours = with_gradients(lambda q, k, v: attend_ragged(q, k, v, sequences, scale=scale), inputs, grad)
        with pytest.raises(AssertionError, match="not causal"):
            signature(*inputs, sequences.offsets, None, 11, 11)
    finally:
        attention._varlen_options.cache_clear()
    for mine, expected in zip(ours, truth, strict=True):
        assert relative_error(mine, expected) < 1e-13


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("order", [(SDPBackend.MATH,), attention.FASTEST, attention.EFFICIENT])
def test_sdpa_is_given_the_same_attention(order, scale):
    """The shapes, heads and masks handed to SDPA, in float64 on its math backend."""
    *inputs, grad = states(18)
    equal, unequal = uniform(3, 6), ragged([5, 0, 13, 0])
    truth = with_gradients(lambda q, k, v: attend(q, k, v, equal, scale=scale), inputs, grad)
    ours = with_gradients(lambda q, k, v: attend_uniform(q, k, v, (3, 6), scale=scale, order=order), inputs, grad)
    other = with_gradients(lambda q, k, v: attend(q, k, v, unequal, scale=scale), inputs, grad)
    masked = with_gradients(
        lambda q, k, v: attention._attend_masked(q, k, v, unequal.offsets, scale=scale), inputs, grad
    )
    for a, b, c, d in zip(ours, truth, masked, other, strict=True):
        assert relative_error(a, b) < 1e-13
        assert relative_error(c, d) < 1e-13
        assert relative_error(a, d) > 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*SIXTEEN_BIT, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 64), (4, 4, 128), (14, 2, 64)])
@pytest.mark.parametrize("lengths", [[300, 1, 210, 0, 0], [256, 256]])
def test_gpu_against_the_reference(lengths, heads, kv_heads, width, dtype):
    sequences = uniform(2, 256, DEVICE) if lengths[0] == 256 else ragged(lengths, DEVICE)
    *inputs, grad = states(sum(lengths), heads, kv_heads, width, dtype=dtype, device=DEVICE)
    exact = [x.detach().double().requires_grad_() for x in inputs]

    def reference(q, k, v):
        return attention_reference(q, k, v, sequences)

    truth = with_gradients(reference, exact, grad.double())
    theirs = with_gradients(lambda *x: sequence_by_sequence(sdpa, *x, lengths), inputs, grad)
    ours = with_gradients(lambda q, k, v: attend(q, k, v, sequences), inputs, grad)
    wrong = with_gradients(lambda q, k, v: attend(q, k, v, ragged([sum(lengths)], DEVICE)), inputs, grad)
    for mine, other, expected, bad in zip(ours, theirs, truth, wrong, strict=True):
        assert mine.dtype == dtype
        assert_as_good(mine, other, expected, dtype)
        with pytest.raises(AssertionError, match="above"):
            assert_as_good(bad, other, expected, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_captured_with_new_offsets(dtype):
    """One captured graph serves any packing of the same tokens; capture also fails on any read of the device."""
    *inputs, grad = states(512, dtype=dtype, device=DEVICE)
    sequences = ragged([512, 0, 0], DEVICE)._replace(max_length=512)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        with_gradients(lambda q, k, v: attend(q, k, v, sequences), inputs, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = with_gradients(lambda q, k, v: attend(q, k, v, sequences), inputs, grad)
    for lengths in ([200, 312, 0], [1, 500, 11]):
        sequences.offsets.copy_(ragged(lengths, DEVICE).offsets)
        graph.replay()
        truth = with_gradients(lambda q, k, v: attend(q, k, v, sequences), inputs, grad)
        stale = with_gradients(lambda q, k, v: attend(q, k, v, ragged([512], DEVICE)), inputs, grad)
        for captured, now, old in zip(results, truth, stale, strict=True):
            assert relative_error(captured, now) < 1e-2
            assert relative_error(captured, old) > 5e-2


@pytest.mark.gpu
def test_gpu_before_ampere_takes_no_flash_kernel(monkeypatch):
    """A T4's path (16 bit, no FlashAttention) on whatever GPU there is: the memory-efficient kernel."""
    monkeypatch.setattr(attention, "_capability", lambda device: (7, 5))
    monkeypatch.setattr(attention, "attend_ragged", None)
    *inputs, grad = states(512, dtype=torch.float16, device=DEVICE)
    for sequences, lengths in ((ragged([200, 312, 0], DEVICE), [200, 312]), (uniform(4, 128, DEVICE), [128] * 4)):
        exact = [x.detach().double().requires_grad_() for x in inputs]
        truth = with_gradients(lambda q, k, v, s=sequences: attention_reference(q, k, v, s), exact, grad.double())
        theirs = with_gradients(lambda *x, n=lengths: sequence_by_sequence(sdpa, *x, n), inputs, grad)
        ours = with_gradients(lambda q, k, v, s=sequences: attend(q, k, v, s), inputs, grad)
        for mine, other, expected in zip(ours, theirs, truth, strict=True):
            assert_as_good(mine, other, expected, torch.float16)
            with pytest.raises(AssertionError, match="above"):
                assert_as_good(mine.roll(1, 0), other, expected, torch.float16)
