"""SwiGLU against plain PyTorch in the same dtype, as transformers' MLP writes it, beside a float64 truth."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import silu

from qwen2tool.kernels import backend
from qwen2tool.kernels.swiglu import swiglu, swiglu_backward, swiglu_forward, swiglu_reference
from tests.kernels.device import DEVICE, nearest_bf16  # noqa: F401  (a fixture)
from tests.tolerances import assert_as_good, relative_error

pytestmark = pytest.mark.usefixtures("nearest_bf16")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(5, 63), (3, 123), (71, 217), (1, 1), (3, 1100)]  # several programs in rows; in columns


class Case(NamedTuple):
    """Inputs of one check, PyTorch's answer in the same dtype, and the truth in float64: h and d_gate_up."""

    dh: torch.Tensor
    gate_up: torch.Tensor
    reference: tuple[torch.Tensor, torch.Tensor]
    truth: tuple[torch.Tensor, torch.Tensor]


def strided(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """(rows, columns) of NaN inside more NaN, at an odd offset: no 16-byte access is possible."""
    return torch.full((rows + 1, columns + 5), torch.nan, dtype=dtype, device=DEVICE)[:rows, 3 : 3 + columns]


def kept_inside(out: torch.Tensor) -> bool:
    """Whether every number of a `strided` output was written and nothing around it."""
    return int(out._base.isnan().sum()) == out._base.numel() - out.numel()


def as_transformers(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return silu(gate) * up


def run(function, dh: torch.Tensor, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up = gate_up.detach().requires_grad_()
    h = function(gate_up)
    return h.detach(), torch.autograd.grad(h, gate_up, dh)[0]


def make(shape: tuple[int, int], dtype: torch.dtype, view=strided, seed: int = 0) -> Case:
    """Gates of order 10 in the first row down to 0.1 in the last, up and dh of order 1."""
    torch.manual_seed(seed)
    rows, width = shape
    gate = torch.randn(shape) * torch.logspace(1, -1, rows)[:, None]
    dh = view(*shape, dtype).copy_(torch.randn(shape))
    gate_up = view(rows, 2 * width, dtype).copy_(torch.cat([gate, torch.randn(shape)], 1))
    return Case(dh, gate_up, run(as_transformers, dh, gate_up), run(as_transformers, dh.double(), gate_up.double()))


def refused(out: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> bool:
    try:
        assert_as_good(out, reference, truth, dtype)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape: tuple[int, int], dtype: torch.dtype):
    case = make(shape, dtype)
    out = strided(*shape, dtype)
    with backend.use("triton"):
        h = swiglu_forward(case.gate_up, out=out)
        swapped = swiglu_forward(case.gate_up.roll(shape[1], 1))
        largest = case.truth[0].abs().amax(0).argmax()
        one_lost = swiglu_forward(case.gate_up.clone().index_fill_(1, shape[1] + largest, 0))
    assert h is out
    assert kept_inside(out)
    assert_as_good(h, case.reference[0], case.truth[0], dtype)
    assert refused(swapped, case.reference[0], case.truth[0], dtype)
    assert refused(one_lost, case.reference[0], case.truth[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape: tuple[int, int], dtype: torch.dtype):
    case = make(shape, dtype)
    (rows, width), before = shape, case.dh.clone()
    h_out, out = strided(rows, width, dtype), strided(rows, 2 * width, dtype)
    with backend.use("triton"):
        h = swiglu_forward(case.gate_up)
        grad = swiglu_backward(case.dh, case.gate_up, h_out=h_out, out=out)
        bare = swiglu_backward(case.dh, case.gate_up)
        place = case.dh.clone()
        beside = swiglu_backward(place, case.gate_up, h_out=place)
        in_place = swiglu_backward(case.dh, case.gate_up, out=case.gate_up)
    assert grad is out
    assert in_place is case.gate_up
    assert torch.equal(in_place, grad)
    assert torch.equal(bare, grad)
    assert torch.equal(beside, grad)
    assert torch.equal(h_out, h)
    assert torch.equal(place, h)
    assert torch.equal(case.dh, before)
    assert kept_inside(out)
    assert kept_inside(h_out)
    halves = [tensor.chunk(2, 1) for tensor in (grad, case.reference[1], case.truth[1])]
    for out_half, reference, truth in zip(*halves, strict=True):
        assert_as_good(out_half, reference, truth, dtype)
        assert refused(out_half * 1.02, reference, truth, dtype)
    assert refused(grad.roll(width, 1), case.reference[1], case.truth[1], dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # by NumPy, in the interpreter: inf is meant here
@pytest.mark.parametrize("chosen", ["triton", "reference"])
def test_extreme_gates(chosen: backend.Backend):
    """exp(-gate) overflows fp32 at -100: silu there is -0, its slope 0; at 100 it is 100, its slope 1."""
    gate_up = torch.tensor([[-100.0, 0.0, 100.0, 2.0, 2.0, 2.0]], device=DEVICE)
    with backend.use(chosen):
        h = swiglu_forward(gate_up)
        grad = swiglu_backward(torch.ones(1, 3, device=DEVICE), gate_up)
    assert h.tolist() == [[0.0, 0.0, 200.0]]
    assert grad.tolist() == [[0.0, 1.0, 2.0, 0.0, 0.0, 100.0]]


def test_rounds_once():
    case = make((3, 123), torch.bfloat16)
    with backend.use("triton"):
        h = swiglu_forward(case.gate_up, out=strided(3, 123, torch.float32))
        assert torch.equal(swiglu_forward(case.gate_up), h.bfloat16())
    assert relative_error(h, case.truth[0]) < 1e-6
    assert relative_error(case.reference[0], case.truth[0]) > 1e-4


@pytest.mark.parametrize("chosen", ["triton", "reference"])
def test_no_rows(chosen: backend.Backend):
    gate_up = torch.empty(0, 126, device=DEVICE)
    with backend.use(chosen):
        assert swiglu_forward(gate_up).shape == (0, 63)
        assert swiglu_backward(torch.empty(0, 63, device=DEVICE), gate_up).shape == (0, 126)


@pytest.mark.parametrize("form", ["one tensor", "two tensors"])
@pytest.mark.parametrize("chosen", ["triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_autograd(dtype: torch.dtype, chosen: backend.Backend, form: str):
    """Three dimensions, through the public function; then an expanded gradient, as `sum` sends it."""
    case = make((6, 123), dtype)

    def ours(gate_up: torch.Tensor) -> torch.Tensor:
        cube = gate_up.view(2, 3, 246)
        return (swiglu(cube) if form == "one tensor" else swiglu(*cube.chunk(2, -1))).view(6, 123)

    def summed(gate_up: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(ours(gate_up).sum(), gate_up)[0]

    with backend.use(chosen):
        found = run(ours, case.dh, case.gate_up)
        total = summed(case.gate_up.detach().requires_grad_())
    for out, reference, truth in zip(found, case.reference, case.truth, strict=True):
        assert out.dtype == dtype
        assert_as_good(out, reference, truth, dtype)
    ones = torch.ones_like(case.dh)
    right, true = (run(as_transformers, ones.to(kind), case.gate_up.to(kind))[1] for kind in (dtype, torch.float64))
    assert_as_good(total, right, true, dtype)
    assert refused(found[1], right, true, dtype)


def test_gradcheck():
    """The written-out backward, and the reference's by autograd, against finite differences in float64."""
    torch.manual_seed(0)
    gate_up = (3 * torch.randn(3, 14, dtype=torch.float64)).requires_grad_()
    with backend.use("reference"):
        assert torch.autograd.gradcheck(swiglu, (gate_up,))
        assert torch.autograd.gradcheck(lambda both: swiglu(*both.chunk(2, 1)), (gate_up,))
    assert torch.autograd.gradcheck(lambda both: swiglu_reference(*both.chunk(2, 1)), (gate_up,))


def test_refusals():
    gate_up, dh = torch.ones(4, 12, device=DEVICE), torch.ones(4, 6, device=DEVICE)
    with backend.use("triton"):
        with pytest.raises(ValueError, match=r"swiglu_forward: gate_up has shape \(4, 11\)"):
            swiglu_forward(gate_up[:, :11])
        with pytest.raises(ValueError, match=r"swiglu_forward: out has shape \(4, 12\)"):
            swiglu_forward(gate_up, out=gate_up)
        with pytest.raises(ValueError, match=r"swiglu_forward: gate is torch\.float64"):
            swiglu_forward(gate_up.double())
        with pytest.raises(ValueError, match=r"swiglu_backward: dh has shape \(3, 6\)"):
            swiglu_backward(dh[:3], gate_up)
        with pytest.raises(ValueError, match=r"swiglu_backward: dh has strides"):
            swiglu_backward(torch.ones(6, 4, device=DEVICE).T, gate_up)
        with pytest.raises(ValueError, match=r"swiglu_forward: up has shape \(4, 6\)"):
            swiglu(gate_up, dh)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [4864, 11008, 18944, 1000])
@pytest.mark.parametrize("extra", [0, 8, 64])
def test_real_sizes(width: int, extra: int, dtype: torch.dtype):
    """Rows of width + rank numbers, as the K-extended product of `down` reads them."""

    def view(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows, columns + extra), torch.nan, dtype=dtype, device=DEVICE)[:, :columns]

    case = make((1025, width), dtype, view)
    h_out = view(1025, width, dtype)
    h = swiglu_forward(case.gate_up)
    grad = swiglu_backward(case.dh, case.gate_up, h_out=h_out)
    assert torch.equal(h_out, h)
    assert_as_good(h, case.reference[0], case.truth[0], dtype)
    assert_as_good(grad, case.reference[1], case.truth[1], dtype)
    assert torch.equal(swiglu_backward(case.dh, case.gate_up, h_out=case.dh, out=case.gate_up), grad)
    assert torch.equal(case.dh, h)


@pytest.mark.gpu
def test_graph_capture():
    """A captured forward and backward, replayed on other numbers in the same buffers."""
    first, second = (make((129, 4864), torch.bfloat16, seed=seed) for seed in (0, 1))

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        return swiglu_forward(first.gate_up), swiglu_backward(first.dh, first.gate_up)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for place, values in zip(first[:2], second[:2], strict=True):
        place.copy_(values)
    graph.replay()
    for out, reference, truth in zip(captured, second.reference, second.truth, strict=True):
        assert_as_good(out, reference, truth, torch.bfloat16)
    assert refused(captured[0], first.reference[0], first.truth[0], torch.bfloat16)
