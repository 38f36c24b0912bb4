"""Attention within sequences against transformers and SDPA in float64, and what centred keys do to it in 16 bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward

from qwen2tool.kernels import attention, backend
from qwen2tool.kernels.attention import Sequences, attend, attend_ragged, attend_uniform, attention_reference
from qwen2tool.kernels.rope import key_centre, rope_forward, rope_reference
from tests.kernels.device import DEVICE
from tests.tolerances import assert_as_good, relative_error

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
NORMS = (0, 20, 100, 400, 1000)
LAYOUTS = [[9], [5, 1, 11], [1, 3, 1], [0, 7, 0, 4, 0, 0], [6, 6, 6]]  # plain, ragged, one token, empty, equal


def ragged(lengths, device="cpu"):
    offsets = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    return Sequences(offsets, max([1, *lengths]))


def uniform(batch, length, device="cpu"):
    return ragged([length] * batch, device)._replace(uniform=(batch, length))


def states(tokens, heads=4, kv_heads=2, width=16, seed=0, dtype=torch.float64, device="cpu"):
    """q, k, v and an incoming gradient; q and k are views into wider rows, as the engine's are."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, (heads + 2 * kv_heads) * width, generator=generator, dtype=torch.float64)
    rows = rows.to(device, dtype).view(tokens, heads + 2 * kv_heads, width)
    grad = torch.randn(tokens, heads, width, generator=generator, dtype=torch.float64).to(device, dtype)
    return *(x.detach().requires_grad_() for x in rows.split([heads, kv_heads, kv_heads], dim=1)), grad


def sequence_by_sequence(function, q, k, v, lengths):
    """`function` of each sequence alone: (1, heads, T, D) -> (1, hq, T, D); results joined to (N, hq, D)."""
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    outs = [function(*(x.transpose(0, 1)[None] for x in part))[0].transpose(0, 1) for part in parts if len(part[0])]
    return torch.cat(outs)


def sdpa(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def eager(q, k, v):
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
    mask = torch.full((q.shape[2], q.shape[2]), float("-inf"), dtype=q.dtype).triu(1)
    return eager_attention_forward(module, q, k, v, mask, q.shape[3] ** -0.5)[0].transpose(1, 2)


def with_gradients(function, inputs, grad):
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


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


# What centred keys do.


def centring_case(tokens, width, norm, *, centred, dtype, heads=2, kv_heads=1, device="cpu"):
    """((q, k, v, dout) in `dtype`, (q, k, v, dout) in float64 before any rounding of q and k).

    Random rows, biases of order 1 everywhere, and in each kv head a constant of `norm` in RoPE's three slowest pairs,
    where the large biases of Qwen2.5-0.5B lie; through bias, rotation and, if `centred`, centring.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(tokens, (heads + kv_heads) * width, generator=generator).to(device, dtype)
    v = torch.randn(tokens, kv_heads, width, generator=generator).to(device, dtype)
    dout = torch.randn(tokens, heads, width, generator=generator).to(device, dtype)
    bias = torch.randn((heads + kv_heads) * width, generator=generator)
    slow = torch.zeros(kv_heads, 2, width // 2)
    slow[..., -3:] = torch.randn(kv_heads, 2, 3, generator=generator)
    slow = torch.nn.functional.normalize(slow.flatten(1), dim=1).flatten()
    bias = (bias + torch.nn.functional.pad(norm * slow, (heads * width, 0))).to(device)
    inv_freq = 1e6 ** (-torch.arange(0, width, 2, device=device).double() / width)
    angle = torch.arange(tokens, device=device)[:, None] * inv_freq
    cos, sin = angle.cos().float(), angle.sin().float()
    centre = key_centre(bias[heads * width :], inv_freq, kv_heads=kv_heads) if centred else None
    geometry = {"heads": heads, "kv_heads": kv_heads}
    out = rope_forward(rows, bias, cos, sin, centre, **geometry)
    truth = rope_reference(rows.double(), bias, cos, sin, centre, **geometry)
    q_and_k = [x.view(tokens, -1, width).split([heads, kv_heads], dim=1) for x in (out, truth)]
    return (*q_and_k[0], v, dout), (*q_and_k[1], v.double(), dout.double())


def test_a_constant_on_all_keys_changes_nothing():
    *inputs, grad = states(40, heads=6, kv_heads=3)
    centre = 300 * torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for sequences in (ragged([11, 1, 28]), uniform(2, 20)):
        plain = with_gradients(lambda q, k, v, s=sequences: attend(q, k, v, s), inputs, grad)
        centred = with_gradients(lambda q, k, v, s=sequences: attend(q, k - centre, v, s), inputs, grad)
        uneven = torch.linspace(0, 1, 40, dtype=torch.float64)[:, None, None] * centre  # not the same for all keys
        wrong = with_gradients(lambda q, k, v, s=sequences, u=uneven: attend(q, k - u, v, s), inputs, grad)
        for a, b, c in zip(plain, centred, wrong, strict=True):
            assert relative_error(b, a) < 1e-9
            assert relative_error(c, a) > 1e-2


def fused_dq(q, k, v, dout):
    """dQ as fused backwards compute it: 16-bit operands, fp32 accumulation, dS rounded before it multiplies K."""
    dtype, scale = q.dtype, q.shape[2] ** -0.5
    q, k, v, dout = (x.float().transpose(0, 1) for x in (q, k, v, dout))  # (heads, T, D)
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    p = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, float("-inf")).softmax(-1)
    out = (p @ v).to(dtype).float()
    ds = p * (dout @ v.transpose(1, 2) - (dout * out).sum(-1, keepdim=True))
    return (ds.to(dtype).float() @ k * scale).to(dtype).transpose(0, 1)


def true_dq(q, k, v, dout):
    q = q.detach().requires_grad_()
    with backend.use("reference"):
        out = attention_reference(q, k, v, uniform(1, len(q), q.device))
    return torch.autograd.grad(out, q, dout)[0]


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_centred_keys_keep_dq(dtype, width):
    """Rounded as fused backwards round, dQ's error is that of a model without large biases; uncentred it grows."""
    centred, plain = {}, {}
    for errors in (centred, plain):
        for norm in NORMS:
            inputs, exact = centring_case(448, width, norm, centred=errors is centred, dtype=dtype)
            errors[norm] = relative_error(fused_dq(*inputs), true_dq(*exact))
    assert max(centred.values()) <= 1.3 * centred[0], centred
    assert all(plain[norm] > 1.3 * centred[0] for norm in NORMS[1:]), plain
    assert plain[1000] > 30 * centred[0], plain


def kernel_gradients(kernel, q, k, v, dout):
    """dq, dk, dv of `varlen_attn` or of one SDPA backend."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    if kernel == "varlen":
        out = attend_ragged(*inputs, ragged([len(q), 0], q.device))
    else:
        out = attend_uniform(*inputs, (1, len(q)), order=(getattr(SDPBackend, kernel),))
    return torch.autograd.grad(out, inputs, dout)


def check_kernel_keeps_dq(kernel, dtype, tokens, width):
    centred, plain = {}, {}
    shape = {"heads": 4, "kv_heads": 2, "device": DEVICE}
    for errors in (centred, plain):
        for norm in NORMS:
            inputs, exact = centring_case(tokens, width, norm, centred=errors is centred, dtype=dtype, **shape)
            gradients = kernel_gradients(kernel, *inputs)
            assert errors is plain or all(bool(x.isfinite().all()) for x in gradients)
            errors[norm] = relative_error(gradients[0], true_dq(*exact))
    assert max(centred.values()) <= 1.3 * centred[0], centred
    assert all(plain[norm] > 1.3 * centred[0] for norm in NORMS[1:]), plain
    assert plain[1000] > 10 * centred[0], plain


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_centred_keys_keep_dq_of_flash_attention(dtype):
    """SDPA's FlashAttention, which torch has for CPUs too."""
    check_kernel_keeps_dq("FLASH_ATTENTION", dtype, 448, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("tokens", [448, 2048])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("kernel", ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "varlen"])
def test_centred_keys_keep_dq_of_every_kernel(kernel, dtype, tokens, width):
    check_kernel_keeps_dq(kernel, dtype, tokens, width)


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
