"""RMSNorm against transformers' Qwen2RMSNorm in the same dtype, beside a float64 truth; outputs start as NaN."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from qwen2tool.kernels import backend
from qwen2tool.kernels.rmsnorm import rms_norm, rms_norm_backward, rms_norm_forward, rms_norm_reference
from tests.kernels.device import DEVICE, nearest_bf16  # noqa: F401  (a fixture)
from tests.tolerances import assert_as_good, relative_error

pytestmark = pytest.mark.usefixtures("nearest_bf16")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(5, 63), (3, 123), (71, 217), (2, 896), (1, 1), (2, 8200)]  # the last is longer than a row block
EPS = 1e-5


class Case(NamedTuple):
    """Inputs of one check, their gradients by transformers in the same dtype, and the truth in float64."""

    x: torch.Tensor
    weight: torch.Tensor
    dy: torch.Tensor
    residual: torch.Tensor
    reference: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # y, dx (residual gradient added), dweight
    truth: tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def strided(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """(rows, columns) of NaN inside more NaN, at an odd offset: no 16-byte access is possible."""
    return torch.full((rows + 1, columns + 5), torch.nan, dtype=dtype, device=DEVICE)[:rows, 3 : 3 + columns]


def kept_inside(out: torch.Tensor) -> bool:
    """Whether every number of a `strided` output was written and nothing around it."""
    return int(out._base.isnan().sum()) == out._base.numel() - out.numel()


def formula(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()


def run(function, case_inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, weight, dy, residual = case_inputs
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight)
    dx, dweight = torch.autograd.grad([y, x], [x, weight], [dy, residual])
    return y.detach(), dx, dweight


def as_transformers(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    norm = Qwen2RMSNorm(weight.shape[0], eps=EPS).to(device=weight.device, dtype=weight.dtype)
    return torch.func.functional_call(norm, {"weight": weight}, (x,))


def make(shape: tuple[int, int], dtype: torch.dtype, view=strided, seed: int = 0) -> Case:
    """Rows of very different size, the first around sqrt(EPS); an outlier column; weights not 1; residuals like dx."""
    torch.manual_seed(seed)
    rows, hidden = shape
    size = torch.logspace(-2.5, 1, rows)[:, None] if rows > 1 else torch.ones(1, 1)
    x, dy, residual = torch.randn(rows, hidden) * size, torch.randn(rows, hidden), torch.randn(rows, hidden) / size
    x[:, hidden // 2] *= 30
    views = [view(rows, hidden, dtype) for _ in range(3)]
    x, dy, residual = (place.copy_(values) for place, values in zip(views, (x, dy, residual), strict=True))
    weight = (0.5 + 2 * torch.rand(hidden)).to(DEVICE, dtype)
    inputs = x, weight, dy, residual
    truth = run(formula, tuple(tensor.double() for tensor in inputs))
    return Case(*inputs, run(as_transformers, inputs), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape: tuple[int, int], dtype: torch.dtype):
    case = make(shape, dtype)
    out, copy = strided(*shape, dtype), strided(*shape, dtype)
    with backend.use("triton"):
        y, rstd = rms_norm_forward(case.x, case.weight, EPS, out=out)
        copied, _ = rms_norm_forward(case.x, case.weight, EPS, copy=copy)
        other, _ = rms_norm_forward(case.x, case.weight * 1.01, EPS)
        without_eps, _ = rms_norm_forward(case.x, case.weight, 0.0)
    assert y is out
    assert kept_inside(out) and kept_inside(copy)
    assert torch.equal(copied, y) and torch.equal(copy, case.x) and not torch.equal(copy, y)
    assert_as_good(y, case.reference[0], case.truth[0], dtype)
    wide = case.x.double()
    assert rstd.dtype == torch.float32
    assert relative_error(rstd, (wide.pow(2).mean(-1) + EPS).rsqrt()) < 1e-6
    with pytest.raises(AssertionError):
        assert_as_good(other, case.reference[0], case.truth[0], dtype)
    if shape[0] > 1:
        with pytest.raises(AssertionError):
            assert_as_good(without_eps[:1], case.reference[0][:1], case.truth[0][:1], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape: tuple[int, int], dtype: torch.dtype):
    case = make(shape, dtype)
    _, reference, reference_weight = case.reference
    _, truth, truth_weight = case.truth
    out = strided(*shape, dtype)
    before = case.dy.clone()
    with backend.use("triton"):
        _, rstd = rms_norm_forward(case.x, case.weight, EPS)
        given = case.dy, case.x, case.weight, rstd
        dx, dweight = rms_norm_backward(*given, residual_grad=case.residual, need_weight=True, out=out)
        bare, no_weight = rms_norm_backward(*given)
        again, _ = rms_norm_backward(*given, residual_grad=case.residual, out=case.residual)
    assert dx is out
    assert no_weight is None
    assert again is case.residual
    assert torch.equal(again, dx)
    assert torch.equal(case.dy, before)
    assert kept_inside(out)
    assert_as_good(dx, reference, truth, dtype)
    assert dweight.dtype == torch.float32
    assert_as_good(dweight, reference_weight, truth_weight, dtype)
    for wrong, right, true in (
        (bare, reference, truth),
        (dweight * 1.02, reference_weight, truth_weight),
    ):
        with pytest.raises(AssertionError):
            assert_as_good(wrong, right, true, dtype)


def test_a_wrong_weight_is_seen_in_dx():
    case = make((5, 63), torch.float32)
    wrong = case.weight.clone()
    wrong[31] = 0
    with backend.use("triton"):
        _, rstd = rms_norm_forward(case.x, case.weight, EPS)
        dx, _ = rms_norm_backward(case.dy, case.x, wrong, rstd, residual_grad=case.residual)
    with pytest.raises(AssertionError):
        assert_as_good(dx, case.reference[1], case.truth[1], torch.float32)


def test_rounds_once_into_another_dtype():
    case = make((3, 123), torch.bfloat16)
    out = strided(3, 123, torch.float32)
    with backend.use("triton"):
        rms_norm_forward(case.x, case.weight, EPS, out=out)
    assert relative_error(out, case.truth[0]) < 1e-6
    assert relative_error(case.reference[0], case.truth[0]) > 1e-4


@pytest.mark.parametrize("chosen", ["triton", "reference"])
def test_no_rows(chosen: backend.Backend):
    x, weight = torch.empty(0, 63, device=DEVICE), torch.ones(63, device=DEVICE)
    with backend.use(chosen):
        y, rstd = rms_norm_forward(x, weight, EPS)
        dx, dweight = rms_norm_backward(x, x, weight, rstd, need_weight=True)
    assert (y.shape, rstd.shape, dx.shape) == ((0, 63), (0,), (0, 63))
    assert torch.equal(dweight, torch.zeros(63, device=DEVICE))


@pytest.mark.parametrize("chosen", ["triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_autograd(dtype: torch.dtype, chosen: backend.Backend):
    """Three dimensions, through the public function; then an expanded gradient, as `sum` sends it."""
    case = make((6, 123), dtype)
    with backend.use(chosen):

        def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return rms_norm(x.view(2, 3, 123), weight, EPS).view(6, 123)

        found = run(ours, case[:4])
        x, weight = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
        rms_norm(x, weight, EPS).sum().backward()
    for out, reference, truth in zip(found, case.reference, case.truth, strict=True):
        assert out.dtype == dtype
        assert_as_good(out, reference, truth, dtype)
    inputs = case.x, case.weight, torch.ones_like(case.x), torch.zeros_like(case.x)
    right, true = run(as_transformers, inputs), run(formula, tuple(tensor.double() for tensor in inputs))
    assert_as_good(x.grad, right[1], true[1], dtype)
    assert_as_good(weight.grad, right[2], true[2], dtype)


def test_gradcheck():
    """The written-out backward, and the reference's by autograd, against finite differences in float64."""
    torch.manual_seed(0)
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    with backend.use("reference"):
        assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm_reference(x, w, EPS)[0], (x, weight))


def test_reference_is_transformers_bitwise():
    case = make((5, 63), torch.bfloat16)
    assert torch.equal(rms_norm_reference(case.x, case.weight, EPS)[0], case.reference[0])
    assert not torch.equal(rms_norm_reference(case.x, case.weight, 1e-4)[0], case.reference[0])


def test_refusals():
    x, weight = torch.ones(4, 6, device=DEVICE), torch.ones(6, device=DEVICE)
    rstd = torch.ones(4, device=DEVICE)
    with backend.use("triton"):
        with pytest.raises(ValueError, match=r"rms_norm_forward: weight has shape \(5,\)"):
            rms_norm_forward(x, weight[:5], EPS)
        with pytest.raises(ValueError, match=r"rms_norm_forward: x has strides"):
            rms_norm_forward(torch.ones(6, 4, device=DEVICE).T, weight, EPS)
        with pytest.raises(ValueError, match=r"rms_norm_forward: x is torch\.float64"):
            rms_norm_forward(x.double(), weight, EPS)
        with pytest.raises(ValueError, match=r"rms_norm_forward: copy has another dtype"):
            rms_norm_forward(x, weight, EPS, copy=x.half())
        with pytest.raises(ValueError, match=r"rms_norm_backward: dy has shape \(3, 6\)"):
            rms_norm_backward(x[:3], x, weight, rstd)
        with pytest.raises(ValueError, match=r"rms_norm_backward: rstd has shape \(3,\)"):
            rms_norm_backward(x, x, weight, rstd[:3])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [896, 3584, 4096, 5120, 8192, 12288])
@pytest.mark.parametrize("extra", [0, 8, 64])
def test_real_sizes(hidden: int, extra: int, dtype: torch.dtype):
    """Rows of hidden + rank numbers, as the K-extended product reads them; the same bits twice."""

    def view(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows, columns + extra), torch.nan, dtype=dtype, device=DEVICE)[:, :columns]

    case = make((2049, hidden), dtype, view)
    y, rstd = rms_norm_forward(case.x, case.weight, EPS, out=view(2049, hidden, dtype))
    given = case.dy, case.x, case.weight, rstd
    dx, dweight = rms_norm_backward(*given, residual_grad=case.residual, need_weight=True)
    for out, reference, truth in zip((y, dx, dweight), case.reference, case.truth, strict=True):
        assert_as_good(out, reference, truth, dtype)
    assert torch.equal(rms_norm_backward(*given, need_weight=True)[1], dweight)


@pytest.mark.gpu
def test_graph_capture():
    """A captured forward and backward, replayed on other numbers in the same buffers."""
    first, second = (make((129, 896), torch.bfloat16, seed=seed) for seed in (0, 1))

    def step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y, rstd = rms_norm_forward(first.x, first.weight, EPS)
        dx, dweight = rms_norm_backward(
            first.dy, first.x, first.weight, rstd, residual_grad=first.residual, need_weight=True
        )
        return y, dx, dweight

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for place, values in zip(first[:4], second[:4], strict=True):
        place.copy_(values)
    graph.replay()
    for out, reference, truth in zip(captured, second.reference, second.truth, strict=True):
        assert_as_good(out, reference, truth, torch.bfloat16)
    with pytest.raises(AssertionError):
        assert_as_good(captured[0], first.reference[0], first.truth[0], torch.bfloat16)
