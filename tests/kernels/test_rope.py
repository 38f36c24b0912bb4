"""Bias, rotation and centring against transformers' rotary embedding; the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from qwen2tool.kernels import backend
from qwen2tool.kernels import rope as kernels
from qwen2tool.kernels.rope import key_centre, rope, rope_backward, rope_forward, rope_reference
from tests.kernels.device import DEVICE, nearest_bf16  # noqa: F401  (a fixture)
from tests.tolerances import assert_as_good, relative_error

pytestmark = pytest.mark.usefixtures("nearest_bf16")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(4, 2, 64), (3, 3, 128), (14, 2, 64), (5, 1, 80)]  # GQA and MHA; 80 and 6 heads fill no power of two
EXACT = {torch.float32: 3e-7, torch.float64: 1e-13}


def embedding(width):
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return Qwen2RotaryEmbedding(Qwen2Config(hidden_size=width, num_attention_heads=1, rope_parameters=rope))


def angles(tokens, width, start=37):
    """cos and sin (N, D) of positions from `start` on, as transformers makes them."""
    cos, sin = embedding(width)(torch.zeros(1), torch.arange(start, start + tokens)[None])
    return cos[0], sin[0]


def inputs(tokens, heads, kv_heads, width, norm=None, seed=0):
    """qk, bias, cos, sin (N, D/2), centre in fp32; biases of order 1, or of `norm` in each kv head's slow pairs."""
    generator = torch.Generator().manual_seed(seed)
    qk = torch.randn(tokens, (heads + kv_heads) * width, generator=generator)
    bias = torch.randn(heads + kv_heads, width, generator=generator)
    if norm is not None:
        bias[heads:, width - 3 :] += norm / 3**0.5
    cos, sin = (table[:, : width // 2].contiguous() for table in angles(tokens, width))
    centre = key_centre(bias[heads:].flatten(), embedding(width).inv_freq, kv_heads=kv_heads)
    return [t.to(DEVICE) for t in (qk, bias.flatten(), cos, sin, centre)]


def transformers_rope(qk, bias, tokens, heads, kv_heads, width, dtype):
    """(N, (hq + hk) D) by apply_rotary_pos_emb in `dtype`, without centring."""
    states = (qk.to(dtype) + bias.to(dtype)).view(1, tokens, heads + kv_heads, width).transpose(1, 2)
    cos, sin = (table[None].to(qk.device, dtype) for table in angles(tokens, width))
    q, k = apply_rotary_pos_emb(states[:, :heads], states[:, heads:], cos, sin)
    return torch.cat((q, k), dim=1)[0].transpose(0, 1).flatten(1)


def strided(x, extra=5, fill=float("nan")):
    """A view equal to `x` whose rows lie further apart, NaN between them."""
    wide = torch.full((x.shape[0], x.shape[1] + extra), fill, dtype=x.dtype, device=x.device)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


@pytest.mark.parametrize("norm", [None, 200.0, 900.0])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotation_is_transformers(heads, kv_heads, width, norm, dtype):
    qk, bias, cos, sin, centre = inputs(7, heads, kv_heads, width, norm)
    where = {"heads": heads, "kv_heads": kv_heads}
    theirs = transformers_rope(qk, bias, 7, heads, kv_heads, width, dtype)
    with backend.use("triton" if dtype == torch.float32 else "reference"):
        ours = rope_forward(qk.to(dtype), bias, cos, sin, None, **where)
        centred = rope_forward(qk.to(dtype), bias, cos, sin, centre, **where)
        dropped = bias.clone()
        dropped[3] = 0
        wrong = [
            rope_forward(qk.to(dtype), dropped, cos, sin, None, **where),
            rope_forward(qk.to(dtype), bias, cos, -sin, None, **where),
            rope_forward(qk.to(dtype), bias, cos.roll(1, 0), sin.roll(1, 0), None, **where),
        ]
    assert relative_error(ours, theirs) < EXACT[dtype]
    assert relative_error(centred[:, : heads * width], theirs[:, : heads * width]) < EXACT[dtype]
    shift = theirs[:, heads * width :] - centre.to(dtype)
    assert float((centred[:, heads * width :] - shift).abs().max()) < EXACT[dtype] * float(theirs.abs().max())
    for other in wrong:
        assert relative_error(other, theirs) > 100 * EXACT[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 63])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
def test_kernel_forward_and_backward(heads, kv_heads, width, tokens, dtype):
    qk, bias, cos, sin, centre = inputs(tokens, heads, kv_heads, width, norm=200.0)
    qk, where = strided(qk.to(dtype)), {"heads": heads, "kv_heads": kv_heads}
    bias = bias.to(dtype)
    tables = strided(cos, 3), strided(sin, 2)
    truth = rope_reference(qk.double(), bias, cos, sin, centre, **where)
    back_truth = rope_reference(qk.double(), None, cos, -sin, None, **where)
    out, back = (strided(torch.full_like(truth, float("nan"), dtype=dtype), 9) for _ in range(2))
    with backend.use("triton"):
        assert rope_forward(qk, bias, *tables, centre, out=out, **where) is out
        assert rope_backward(qk, *tables, out=back, **where) is back
    assert_as_good(out, rope_reference(qk, bias, cos, sin, centre, **where), truth, dtype)
    assert_as_good(back, rope_reference(qk, None, cos, -sin, None, **where), back_truth, dtype)
    if tokens:
        gap = torch.as_strided(out, (tokens, 9), (out.stride(0), 1), out.shape[1])
        assert bool(gap.isnan().all()), "wrote between the rows"
        dropped = torch.cat((bias[:-1], torch.zeros_like(bias[:1])))
        with backend.use("triton"), pytest.raises(AssertionError, match="above"):
            wrong = rope_forward(qk, dropped, cos, sin, centre, **where)
            assert_as_good(wrong, rope_reference(qk, bias, cos, sin, centre, **where), truth, dtype)


def test_backward_is_the_transpose():
    qk, bias, cos, sin, _ = inputs(9, 4, 2, 64)
    cos, sin = cos * 1.2, sin * 1.2  # a scaled embedding is no rotation: its inverse would not do
    qk = qk.double().requires_grad_()
    dy = inputs(9, 4, 2, 64, seed=1)[0].double()
    truth = torch.autograd.grad(rope_reference(qk, bias, cos, sin, None, heads=4, kv_heads=2), qk, dy)[0]
    with backend.use("triton"):
        ours = rope_backward(dy.float(), cos, sin, heads=4, kv_heads=2)
        forward = rope_forward(dy.float(), None, cos, sin, None, heads=4, kv_heads=2)
    assert relative_error(ours, truth) < EXACT[torch.float32]
    assert relative_error(forward, truth) > 0.1


@pytest.mark.parametrize("used", ["triton", "reference"])
def test_in_place_and_halves_apart(used):
    qk, bias, cos, sin, centre = inputs(11, 4, 2, 64, norm=200.0)
    with backend.use(used):
        out = rope_forward(qk, bias, cos, sin, centre, heads=4, kv_heads=2)
        back = rope_backward(qk, cos, sin, heads=4, kv_heads=2)
        q_alone = rope_backward(qk[:, : 4 * 64], cos, sin, heads=4, kv_heads=0)
        k_alone = rope_forward(qk[:, 4 * 64 :], bias[4 * 64 :], cos, sin, centre, heads=0, kv_heads=2)
        for function, truth in ((rope_forward, out), (rope_backward, back)):
            rows = strided(qk)
            arguments = (bias, cos, sin, centre) if function is rope_forward else (cos, sin)
            assert function(rows, *arguments, heads=4, kv_heads=2, out=rows) is rows
            assert torch.equal(rows, truth)
    assert torch.equal(q_alone, back[:, : 4 * 64])
    assert torch.equal(k_alone, out[:, 4 * 64 :])
    assert not torch.equal(out, qk)


@pytest.mark.parametrize("tokens", [8, 11])
def test_four_tokens_a_program(tokens, monkeypatch):
    monkeypatch.setattr(kernels, "SHARE_FROM", 8)
    qk, bias, cos, sin, centre = inputs(tokens, 2, 1, 8)
    out = torch.full_like(qk, float("nan"))
    with backend.use("triton"):
        rope_forward(qk, bias, cos, sin, centre, heads=2, kv_heads=1, out=out)
    truth = rope_reference(qk.double(), bias, cos, sin, centre, heads=2, kv_heads=1)
    assert relative_error(out, truth) < EXACT[torch.float32]
    assert relative_error(out.roll(4, 0), truth) > 0.1


@pytest.mark.parametrize("function", [rope, rope_reference])
def test_gradcheck(function):
    qk, bias, cos, sin, centre = inputs(3, 2, 1, 8)
    qk, bias = qk.double().requires_grad_(), bias.double().requires_grad_()

    def run(qk, bias):
        return function(qk, bias, cos, sin, centre, heads=2, kv_heads=1)

    with backend.use("reference"):
        assert torch.autograd.gradcheck(run, (qk, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_through_the_kernel(dtype):
    qk, bias, cos, sin, centre = inputs(63, 4, 2, 64, norm=200.0)
    dy = torch.randn_like(qk)

    def gradients(function, kind):
        rows, b = qk.to(dtype).to(kind).requires_grad_(), bias.to(dtype).to(kind).requires_grad_()
        out = function(rows, b, cos, sin, centre, heads=4, kv_heads=2)
        return torch.autograd.grad(out, (rows, b), dy.to(dtype).to(kind))

    truths = gradients(rope_reference, torch.float64)
    with backend.use("triton"):
        ours = gradients(rope, dtype)
    for mine, theirs, truth in zip(ours, gradients(rope_reference, dtype), truths, strict=True):
        assert mine.dtype == dtype
        assert_as_good(mine, theirs, truth, dtype)
        with pytest.raises(AssertionError, match="above"):
            assert_as_good(mine * 1.05, theirs, truth, dtype)


def test_an_expanded_gradient_is_not_overwritten():
    qk, _, cos, sin, _ = inputs(5, 2, 1, 8)
    qk.requires_grad_()
    with backend.use("triton"):
        rope(qk, None, cos, sin, heads=2, kv_heads=1).sum().backward()
        ones = torch.ones_like(qk)
        truth = rope_backward(ones, cos, sin, heads=2, kv_heads=1)
    assert torch.equal(qk.grad, truth)
    assert bool((ones == 1).all())


@pytest.mark.parametrize(("kv_heads", "width"), [(2, 64), (3, 128)])
def test_centre_is_the_mean_rotated_bias(kv_heads, width):
    bias = torch.randn(kv_heads * width, generator=torch.Generator().manual_seed(2)) * 50
    cos, sin = (table.double() for table in angles(300, width, start=0))
    states = bias.double().view(1, kv_heads, 1, width).expand(-1, -1, 300, -1)
    truth = apply_rotary_pos_emb(states, states, cos[None], sin[None])[0].mean(2).flatten()
    inv_freq = embedding(width).inv_freq
    ours = key_centre(bias, inv_freq, kv_heads=kv_heads, positions=300)
    assert ours.dtype == torch.float32
    assert relative_error(ours, truth) < 1e-6  # transformers' angles are rounded to fp32
    scaled = key_centre(bias, inv_freq, kv_heads=kv_heads, positions=300, scaling=1.5)
    assert relative_error(scaled, 1.5 * truth) < 1e-6
    for wrong in (
        key_centre(bias, inv_freq, kv_heads=kv_heads, positions=299),
        key_centre(bias.roll(1), inv_freq, kv_heads=kv_heads, positions=300),
    ):
        assert relative_error(wrong, truth) > 1e-4


@pytest.mark.parametrize("tokens", [448, 2048])
def test_centre_takes_a_slow_bias_away(tokens):
    """Norm 900 in the three slowest pairs, as real k biases lie: under 1 % of it is left at these lengths."""
    bias = torch.zeros(2, 32)
    bias[:, -3:] = 900 / 6**0.5
    bias = bias.flatten()
    cos, sin = (table[:, :32] for table in angles(tokens, 64, start=0))
    centre = key_centre(bias, embedding(64).inv_freq, kv_heads=1)
    rotated = rope_reference(torch.zeros(tokens, 64), bias, cos, sin, None, heads=0, kv_heads=1)
    assert float(rotated.norm(dim=1).square().mean().sqrt()) == pytest.approx(900, rel=1e-3)
    assert float((rotated - centre).norm(dim=1).square().mean().sqrt()) < 9
    assert float((rotated + centre).norm(dim=1).square().mean().sqrt()) > 1700


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk": torch.zeros(3, 2, 4)}, "qk has shape"),
        ({"qk": torch.zeros(3, 25)}, "rows of 25"),
        ({"bias": torch.zeros(23)}, "bias has shape"),
        ({"cos": torch.zeros(2, 4)}, "cos has shape"),
        ({"sin": torch.zeros(3, 8)}, "sin has shape"),
        ({"centre": torch.zeros(24)}, "centre has shape"),
        ({"out": torch.zeros(3, 23)}, "out has shape"),
        ({"qk": torch.zeros(3, 24, dtype=torch.float64)}, "qk is torch.float64"),
        ({"qk": torch.zeros(24, 3).t()}, "qk has strides"),
        ({"cos": torch.zeros(3, 4, dtype=torch.bfloat16)}, "cos is torch.bfloat16"),
        ({"centre": torch.zeros(8, dtype=torch.float16)}, "centre is torch.float16"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    arguments = {
        "qk": torch.zeros(3, 24),
        "bias": torch.zeros(24),
        "cos": torch.zeros(3, 4),
        "sin": torch.zeros(3, 4),
        "centre": torch.zeros(8),
        "out": torch.zeros(3, 24),
    }
    on = {name: tensor.to(DEVICE) for name, tensor in (arguments | changes).items()}
    with backend.use("triton"), pytest.raises(ValueError, match=f"rope_forward: {message}"):
        rope_forward(heads=2, kv_heads=1, **on)


def test_a_centre_of_other_frequencies_is_refused():
    with pytest.raises(ValueError, match="key_centre: bias_k has shape"):
        key_centre(torch.zeros(64), torch.zeros(16), kv_heads=1)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(14, 2, 64), (28, 4, 128), (64, 8, 128), (32, 32, 128)])
@pytest.mark.parametrize("tokens", [1024, 8193])
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_shapes(heads, kv_heads, width, tokens, dtype):
    qk, bias, cos, sin, centre = inputs(tokens, heads, kv_heads, width, norm=900.0)
    qk, where = strided(qk.to(dtype), kv_heads * width), {"heads": heads, "kv_heads": kv_heads}
    truth = rope_reference(qk.double(), bias, cos, sin, centre, **where)
    reference = rope_reference(qk, bias, cos, sin, centre, **where)
    back = rope_backward(qk, cos, sin, **where)
    back_truth = rope_reference(qk.double(), None, cos, -sin, None, **where)
    assert_as_good(rope_forward(qk, bias, cos, sin, centre, out=qk, **where), reference, truth, dtype)
    assert_as_good(back, back_truth.to(dtype), back_truth, dtype)
