"""What centred keys do to attention's gradients in 16 bit."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend

from qwen2tool.kernels import backend
from qwen2tool.kernels.attention import (
    _attend_masked,
    attend,
    attend_ragged,
    attend_uniform,
    attention_reference,
)
from qwen2tool.kernels.rope import key_centre, rope_forward, rope_reference
from tests.kernels.attention_cases import SIXTEEN_BIT, ragged, states, uniform, with_gradients
from tests.kernels.device import DEVICE
from tests.tolerances import relative_error

NORMS = (0, 20, 100, 400, 1000)


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
    """dq, dk, dv of `varlen_attn`, of one SDPA backend, or with a mask, which GPUs without FlashAttention need."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    if kernel == "masked":
        out = _attend_masked(*inputs, ragged([len(q), 0], q.device).offsets, None)
    elif kernel == "varlen":
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
@pytest.mark.parametrize("kernel", ["FLASH_ATTENTION", "MATH", "masked"])
def test_centred_keys_keep_dq_of_what_a_cpu_has(kernel, dtype):
    check_kernel_keeps_dq(kernel, dtype, 448, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("tokens", [448, 2048])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize(
    "kernel", ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH", "varlen", "masked"]
)
def test_centred_keys_keep_dq_of_every_kernel(kernel, dtype, tokens, width):
    check_kernel_keeps_dq(kernel, dtype, tokens, width)
