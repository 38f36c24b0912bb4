"""Log-probabilities without logits: kernel and reference against torch's cross entropy in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2tool.kernels import backend, head
from qwen2tool.kernels.head import IGNORED, token_log_probs
from tests.kernels.device import DEVICE
from tests.tolerances import FLOOR, assert_as_good, relative_error

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
BACKENDS = pytest.mark.parametrize("chosen", ["triton", "reference"])


class Case(NamedTuple):
    hidden: torch.Tensor  # (N, H)
    weight: torch.Tensor  # (V, H)
    targets: torch.Tensor  # (N,)
    dy: torch.Tensor  # (N,) fp32


class Result(NamedTuple):
    log_probs: torch.Tensor
    d_hidden: torch.Tensor


def make(rows: int, vocabulary: int, width: int, dtype: torch.dtype, *, spread: float = 3.0) -> Case:
    """Logits of standard deviation `spread`, and a first, a last and (from six rows on) an ignored target."""
    torch.manual_seed(rows + vocabulary)
    hidden = spread * torch.randn(rows, width, device=DEVICE).to(dtype)
    weight = (torch.randn(vocabulary, width, device=DEVICE) / width**0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    for row, target in enumerate((vocabulary - 1, 0, IGNORED) if rows > 5 else (vocabulary - 1,)):
        targets[2 * row : 2 * row + 1] = target
    return Case(hidden, weight, targets, torch.randn(rows, device=DEVICE))


def ours(case: Case, chosen: backend.Backend, chunk_rows: int | None = 10) -> Result:
    hidden = case.hidden.detach().requires_grad_()
    with backend.use(chosen):
        log_probs = token_log_probs(hidden, case.weight, case.targets, chunk_rows=chunk_rows)
    (d_hidden,) = torch.autograd.grad(log_probs, hidden, case.dy.to(log_probs.dtype))
    return Result(log_probs.detach(), d_hidden)


def torchs(case: Case, dtype: torch.dtype) -> Result:
    """As transformers: logits in `dtype`, cross entropy in fp32 (fp64 for fp64)."""
    hidden = case.hidden.detach().to(dtype).requires_grad_()
    logits = hidden @ case.weight.to(dtype).t()
    log_probs = -F.cross_entropy(logits if dtype == FP64 else logits.float(), case.targets, reduction="none")
    (d_hidden,) = torch.autograd.grad(log_probs, hidden, case.dy.to(log_probs.dtype))
    return Result(log_probs.detach(), d_hidden)


def assert_same(first: Result, second: Result) -> None:
    assert torch.equal(first.log_probs, second.log_probs) and torch.equal(first.d_hidden, second.d_hidden)


def of_fp32_logits(case: Case) -> torch.Tensor:
    """Log-probs where only the product's accumulation is rounded: on a GPU a tensor core's, which is not quite fp32."""
    if DEVICE == "cpu" or case.hidden.dtype == FP32:
        return torchs(case, FP32).log_probs
    logits = torch.mm(case.hidden, case.weight.t(), out_dtype=FP32)
    return -F.cross_entropy(logits, case.targets, reduction="none")


def assert_right(result: Result, case: Case) -> None:
    """Log-probs as good as those of fp32 logits whatever the dtype; gradients as good as torch's in the dtype."""
    truth, dtype = torchs(case, FP64), case.hidden.dtype
    assert_as_good(result.log_probs, of_fp32_logits(case), truth.log_probs, FP32)
    assert_as_good(result.d_hidden, torchs(case, dtype).d_hidden, truth.d_hidden, dtype)


@BACKENDS
@DTYPES
@pytest.mark.parametrize(("rows", "vocabulary", "width"), [(37, 217, 24), (1, 63, 33), (7, 8255, 16), (12, 1, 8)])
def test_right(rows: int, vocabulary: int, width: int, dtype: torch.dtype, chosen: backend.Backend) -> None:
    """8255 columns need two blocks, the second of them nearly empty. Two runs are bitwise equal."""
    case = make(rows, vocabulary, width, dtype)
    result = ours(case, chosen)
    assert_right(result, case)
    assert_same(ours(case, chosen), result)


@BACKENDS
@pytest.mark.parametrize("chunk_rows", [1, 9, 36, 37, 1000, None])
def test_chunk_boundaries(chunk_rows: int | None, chosen: backend.Backend) -> None:
    case = make(37, 63, 16, BF16)
    assert_right(ours(case, chosen, chunk_rows), case)


@BACKENDS
@DTYPES
def test_negative_controls(dtype: torch.dtype, chosen: backend.Backend) -> None:
    case = make(37, 217, 24, dtype)
    off_by_one = case.targets.clone()
    off_by_one[9:11] = case.targets[9:11].flip(0)  # the two rows beside the boundary at 10
    assert off_by_one[9] != off_by_one[10]
    weight = case.weight.clone()
    weight[case.targets[7]] = weight[case.targets[8]]
    lost_row = case.dy.clone()
    lost_row[10] = 0
    right, rounded = ours(case, chosen), torchs(case, dtype)
    wrong_inputs = [case._replace(targets=off_by_one), case._replace(weight=weight), case._replace(dy=lost_row)]
    wrong = [ours(wrong_input, chosen) for wrong_input in wrong_inputs]
    log_probs_to_fail = [result.log_probs for result in wrong[:2]] + [rounded.log_probs] * (dtype != FP32)
    assert_right(right, case)
    for log_probs in log_probs_to_fail:
        with pytest.raises(AssertionError, match="error"):
            assert_right(right._replace(log_probs=log_probs), case)
    for result in wrong:
        with pytest.raises(AssertionError, match="error"):
            assert_right(right._replace(d_hidden=result.d_hidden), case)


@BACKENDS
@DTYPES
def test_large_spread(dtype: torch.dtype, chosen: backend.Backend) -> None:
    case = make(24, 217, 32, dtype, spread=27.0)
    logits = case.hidden.double() @ case.weight.double().t()
    assert logits.max() > 80 and logits.min() < -80
    assert_right(ours(case, chosen), case)


@BACKENDS
def test_hidden_values_whose_logits_leave_fp16(chosen: backend.Backend) -> None:
    case = make(24, 217, 32, FP16, spread=9000.0)
    case = case._replace(weight=4 * case.weight)
    assert (case.hidden @ case.weight.t()).isinf().any()
    result, truth = ours(case, chosen), torchs(case, FP64)
    assert relative_error(result.log_probs, truth.log_probs) < FLOOR[FP32]
    # Among logits of 100,000 one share is 1 and the others 0: what is left is rounding W_t - W_j, and dy times it.
    assert relative_error(result.d_hidden, truth.d_hidden) < 3 * FLOOR[FP16]


@BACKENDS
@DTYPES
def test_a_token_the_model_is_sure_of_keeps_its_digits(dtype: torch.dtype, chosen: backend.Backend) -> None:
    """1 - p down to 1e-22; dy = 1 / (1 - p) makes every row's gradient of order 1, so that each one is seen."""
    torch.manual_seed(1)
    weight = torch.randn(63, 64, device=DEVICE).to(dtype)
    targets = torch.arange(20, device=DEVICE)
    strength = torch.linspace(15, 75, 20, device=DEVICE)[:, None]
    hidden = (strength * F.normalize(weight[targets].float(), dim=1) / 8).to(dtype)
    logits = hidden.double() @ weight.double().t()
    others = logits.clone().scatter_(1, targets[:, None], float("-inf")).logsumexp(1)
    complement = torch.sigmoid(others - logits.diagonal())
    assert complement.min() < 1e-20
    case = Case(hidden, weight, targets, (1 / complement).float())
    result = ours(case, chosen)
    truth = torch.log1p(-complement)
    torch.testing.assert_close(result.log_probs.double(), truth, rtol=1e-4, atol=0)
    naive = logits.float().diagonal() - logits.float().logsumexp(1)
    assert (naive[-10:] == 0).all()
    others_share = logits.scatter(1, targets[:, None], float("-inf")).softmax(1)
    bracket = (weight[targets].double() - others_share @ weight.double()) * (case.dy.double() * complement)[:, None]
    for row in range(20):
        assert relative_error(result.d_hidden[row], bracket[row]) < 6 * FLOOR[dtype] + 1e-4
    plain = (
        (F.one_hot(targets, 63) - logits.softmax(1).to(dtype).double()) @ weight.double() * case.dy.double()[:, None]
    )
    assert relative_error(plain[-1], bracket[-1]) > 0.5


@BACKENDS
def test_score_rows_elementwise(chosen: backend.Backend) -> None:
    """Strided logits and directions, NaN in every output before; the columns beside a strided output stay NaN."""
    torch.manual_seed(2)
    logits = (40 * torch.randn(20, 123, device=DEVICE))[:, :111]
    targets = torch.randint(0, 111, (20,), device=DEVICE)
    targets[3] = IGNORED
    log_probs, complement, wide = (torch.full(size, float("nan"), device=DEVICE) for size in ((20,), (20,), (20, 115)))
    with backend.use(chosen):
        head.score_rows(logits, targets, log_probs, complement, wide[:, :111])
    truth = -F.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(log_probs.double(), truth, rtol=5e-5, atol=1e-30)
    torch.testing.assert_close(complement.double(), -torch.expm1(truth), rtol=5e-5, atol=1e-15)
    scored = logits.double().requires_grad_()
    F.cross_entropy(scored, targets, reduction="none").neg().sum().backward()
    torch.testing.assert_close((complement[:, None] * wide[:, :111]).double(), scored.grad, rtol=5e-5, atol=1e-12)
    assert wide[:, 111:].isnan().all() and (wide[3, :111] == 0).all() and complement[3] == 0


@BACKENDS
def test_score_rows_around_even_odds(chosen: backend.Backend) -> None:
    """Two tokens, one of them at 0: log p = logsigmoid(z), where the series for log(1 + x) has its largest argument."""
    z = torch.linspace(-8, 8, 101, device=DEVICE)
    logits = torch.stack((torch.zeros_like(z), z), 1)
    log_probs, complement = torch.empty_like(z), torch.empty_like(z)
    with backend.use(chosen):
        head.score_rows(logits, torch.ones(101, dtype=torch.int64, device=DEVICE), log_probs, complement)
    torch.testing.assert_close(log_probs.double(), F.logsigmoid(z.double()), rtol=3e-6, atol=0)
    torch.testing.assert_close(complement.double(), torch.sigmoid(-z.double()), rtol=3e-6, atol=0)


@BACKENDS
def test_strided_hidden_and_weight(chosen: backend.Backend) -> None:
    case = make(21, 63, 40, BF16)
    strided = case._replace(hidden=case.hidden[:, :24], weight=case.weight[:, 16:], targets=case.targets.repeat(2)[::2])
    assert_right(ours(strided, chosen), strided)


@BACKENDS
@pytest.mark.parametrize("rows", [0, 8])
def test_no_row_counts(rows: int, chosen: backend.Backend) -> None:
    case = make(rows, 63, 16, BF16)._replace(targets=torch.full((rows,), IGNORED, device=DEVICE))
    result = ours(case, chosen)
    assert result.log_probs.shape == (rows,) and (result.log_probs == 0).all()
    assert result.d_hidden.shape == (rows, 16) and (result.d_hidden == 0).all()


@BACKENDS
@DTYPES
def test_what_an_ignored_row_holds_is_never_seen(dtype: torch.dtype, chosen: backend.Backend) -> None:
    """NaN in its hidden state and inf in its incoming gradient; beside it, the same NaN in a row that counts."""
    case = make(12, 63, 16, dtype)
    clean = ours(case, chosen)
    hidden, dy = case.hidden.clone(), case.dy.clone()
    hidden[4], dy[4] = float("nan"), float("inf")
    assert case.targets[4] == IGNORED
    result = ours(case._replace(hidden=hidden, dy=dy), chosen)
    assert result.log_probs[4] == 0 and (result.d_hidden[4] == 0).all()
    assert_same(result, clean)
    counted = ours(case._replace(hidden=hidden, targets=case.targets.clamp(min=0)), chosen)
    assert counted.log_probs[4].isnan() and counted.d_hidden[4].isnan().all()
    assert torch.equal(counted.d_hidden[5:], clean.d_hidden[5:])


@BACKENDS
@pytest.mark.parametrize("target", [63, -1, 10**12])
def test_a_target_outside_the_vocabulary_is_loud(target: int, chosen: backend.Backend) -> None:
    case = make(12, 63, 16, FP32)
    clean = ours(case, chosen)
    case.targets[3] = target
    result = ours(case, chosen)
    assert result.log_probs[3].isnan() and result.d_hidden[3].isnan().all()
    assert torch.equal(result.log_probs.nan_to_num()[4:], clean.log_probs[4:])


def test_gradcheck_of_the_reference() -> None:
    case = make(7, 23, 5, FP64, spread=1.0)

    def op(hidden: torch.Tensor) -> torch.Tensor:
        with backend.use("reference"):
            return token_log_probs(hidden, case.weight, case.targets, chunk_rows=3)

    assert torch.autograd.gradcheck(op, case.hidden.requires_grad_())


def test_incoming_gradient_is_left_alone_and_backward_repeats() -> None:
    case = make(12, 63, 16, FP32)
    hidden, dy = case.hidden.requires_grad_(), case.dy.clone()
    log_probs = token_log_probs(hidden, case.weight, case.targets, chunk_rows=5)
    first, second = (torch.autograd.grad(log_probs, hidden, dy, retain_graph=True)[0] for _ in range(2))
    (summed,) = torch.autograd.grad(log_probs.sum(), hidden)  # an expanded gradient, of stride 0
    assert torch.equal(first, second) and torch.equal(dy, case.dy)
    torch.testing.assert_close(summed * dy[:, None], first)


class Seen(TorchDispatchMode):
    """Counts products and keeps the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        if isinstance(out, torch.Tensor) and out._base is None:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize(("gradient", "products"), [(True, 8), (False, 4)])
def test_one_chunk_of_logits_and_no_product_too_many(gradient: bool, products: int) -> None:
    case = make(38, 217, 6, FP32)
    with Seen() as seen:
        token_log_probs(case.hidden.requires_grad_(gradient), case.weight, case.targets, chunk_rows=10)
    assert (seen.products, seen.largest) == (products, 10 * 217)
    with Seen() as full:
        torchs(case, FP32)
    assert full.largest == 38 * 217


def test_no_graph_without_gradients_and_a_trainable_head_may_be_evaluated() -> None:
    case = make(12, 63, 16, FP32)
    weight = case.weight.clone().requires_grad_()
    with torch.no_grad():
        log_probs = token_log_probs(case.hidden.requires_grad_(), weight, case.targets)
    assert not log_probs.requires_grad
    assert_as_good(log_probs, torchs(case, FP32).log_probs, torchs(case, FP64).log_probs, FP32)


@BACKENDS
def test_autocast_does_not_round_the_logits(chosen: backend.Backend) -> None:
    case = make(12, 63, 16, FP32)
    with torch.autocast(DEVICE, BF16):
        inside = ours(case, chosen)
        rounded = case.hidden @ case.weight.t()
    assert rounded.dtype == BF16
    assert_same(inside, ours(case, chosen))


@pytest.mark.parametrize("vocabulary", [152064, 151936, 92416, 32003])
def test_chunk_size_on_cuda(vocabulary: int) -> None:
    for rows in (0, 1, 128, 1023, 1100, 3000, 8192, 32768):
        chunk = head.chunk_size(rows, vocabulary, cuda=True)
        assert chunk >= 128 and chunk % 128 == 0 and chunk * vocabulary * 4 <= 640e6
    assert head.chunk_size(8192, 152064, cuda=True) == 1024
    assert head.chunk_size(1100, 152064, cuda=True) == 640  # two equal chunks, not 1024 and 76
    assert head.chunk_size(8192, 10_000_000, cuda=True) == 128
    assert head.chunk_size(8192, vocabulary, cuda=False) == 64


def test_refusals() -> None:
    hidden, weight, targets, _ = make(12, 63, 16, FP32)
    wrong = [
        ("weight requires a gradient", (hidden, weight.clone().requires_grad_(), targets), 1),
        ("weight torch.bfloat16", (hidden, weight.bfloat16(), targets), 1),
        (r"hidden \(12, 15\)", (hidden[:, :15], weight, targets), 1),
        (r"targets \(11,\)", (hidden, weight, targets[:11]), 1),
        ("targets are torch.int32", (hidden, weight, targets.int()), 1),
        ("has no rows", (hidden, weight[:0], targets), 1),
        ("weight on meta", (hidden, weight.to("meta"), targets), 1),
        ("weight has strides", (hidden, weight.t().contiguous().t(), targets), 1),
        ("hidden is torch.int64", (targets[:, None], weight, targets), 1),
        ("chunk_rows is 0", (hidden, weight, targets), 0),
    ]
    for message, arguments, chunk_rows in wrong:
        with pytest.raises(ValueError, match=f"token_log_probs: .*{message}"):
            token_log_probs(*arguments, chunk_rows=chunk_rows)


@pytest.mark.gpu
@pytest.mark.parametrize("gradient", [True, False])
def test_memory_at_a_real_size(gradient: bool) -> None:
    """Peak above the inputs: one chunk of fp32 logits, its gradient in bf16, and the (N, H) row gradient."""
    case = make(3000, 152064, 3584, BF16)
    hidden = case.hidden.requires_grad_(gradient)
    token_log_probs(hidden, case.weight, case.targets)  # cuBLAS takes its workspace once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    token_log_probs(hidden, case.weight, case.targets)
    peak = torch.cuda.max_memory_allocated() - before
    chunk = head.chunk_size(3000, 152064, cuda=True) * 152064
    planned = chunk * 4 + (chunk * 2 + 3000 * 3584 * 2 if gradient else 0)
    assert planned * 0.99 < peak < planned * 1.1
    assert planned < 3000 * 152064 * 4  # the whole logits would not pass


@pytest.mark.gpu
@DTYPES
def test_values_at_a_real_size(dtype: torch.dtype) -> None:
    """Against fp64 in slices of the rows, so that the truth fits beside it."""
    case = make(3000, 152064, 3584, dtype)
    result = ours(case, "triton", None)
    rows = torch.cat((torch.arange(0, 64), torch.arange(1000, 1064), torch.arange(2950, 3000))).to(DEVICE)
    part = Case(case.hidden[rows], case.weight, case.targets[rows], case.dy[rows])
    assert_right(Result(result.log_probs[rows], result.d_hidden[rows]), part)
    with pytest.raises(AssertionError, match="error"):
        assert_right(Result(result.log_probs[rows].roll(1), result.d_hidden[rows]), part)
    assert_same(ours(case, "triton", None), result)


@pytest.mark.gpu
def test_chunks_of_more_than_2_to_the_31_logits() -> None:
    case = make(16384, 152064, 64, BF16)
    large, small = ours(case, "triton", 16384), ours(case, "triton", 1024)
    assert relative_error(large.log_probs[-1024:], small.log_probs[-1024:]) < FLOOR[FP32]
    assert relative_error(large.d_hidden[-1024:], small.d_hidden[-1024:]) < FLOOR[BF16]


@pytest.mark.gpu
def test_graph_capture_follows_its_inputs() -> None:
    """Targets and hidden states change between replays, ignored rows too."""
    case, other = make(300, 9001, 64, BF16), make(300, 9001, 64, BF16, spread=1.0)
    other = other._replace(targets=other.targets.roll(7))
    buffer = Case(*(t.clone() for t in case))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours(buffer, "triton", 128)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours(buffer, "triton", 128)
    for current in (case, other):
        for mine, theirs in zip(buffer, current, strict=True):
            mine.copy_(theirs)
        graph.replay()
        assert_right(captured, current)
