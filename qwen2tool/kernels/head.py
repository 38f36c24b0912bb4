"""Head and log-probability without logits: log p(target) of each row from hidden states, one chunk of rows at a time.

Legend: N rows (tokens), H hidden, V vocabulary. With z = W h (V,), t the target and m = z_t - logsumexp of the *other*
logits, p_t = sigmoid(m), so

    log p_t      = logsigmoid(m)
    dlog p_t/dh  = (1 - p_t) (W_t - sum_{j != t} q_j W_j),    1 - p_t = sigmoid(-m),    q_j = p_j / (1 - p_t)

Leaving the target out of the sum is what keeps small numbers: nothing is computed as a difference from one, so a token
that the model is sure of keeps the digits of its loss and of its gradient (the usual z_t - logsumexp(z) is exactly 0
from m = 17 on in fp32). And the row gradient is kept as the bracket, whose coefficients are 1 and -q_j in [-1, 0]: in
fp16 nothing overflows or needs a scale, and the factor 1 - p_t stays in fp32 until the backward's one rounding.

The frozen head gets no gradient, so the backward needs only (N, H) numbers that the forward chunk can make while its
logits exist (as in Hsu et al. 2024, arXiv 2410.10989): per chunk of R rows a product into fp32 logits (R, V), one
kernel that reads each row twice (online log-sum-exp: Milakov and Gimelshein 2018, arXiv 1805.02867) and writes
onehot - q in the compute dtype, and a product with W into R rows of the saved (N, H). The backward is one elementwise
pass over it. Alternative: transformers' full logits, which at 8192 x 152064 are 2.5 GB in bf16 and 5 GB more in fp32.

Cost: 2 products of 2 N H V flops each (1 where hidden needs no gradient). Bytes per logit in 16 bit: 4 written and 2
read by the products, 4 + 4 read and 2 written by the kernel (what L2 still holds of the second 4 is free), and W read
twice a chunk. At 3 TB/s and 700 TFLOP/s and H = 3584 the kernel's 10 bytes are a sixth of the two products' time.
Memory in 16 bit: R V (4 + 2) bytes while it runs, at most 0.96 GB on CUDA (for V up to 1.25 million), and N H elements
for the backward.
Deterministic: every sum has a fixed order, no atomics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from qwen2tool.kernels import backend

IGNORED = -100
"""The target of a row that counts for nothing (PyTorch's `ignore_index`)."""

_OP = "token_log_probs"
_CUDA_LOGIT_BYTES = 640_000_000  # large enough that a product fills the GPU, small beside a 7B's activations
_ROW_MULTIPLE = 128  # a GEMM tile: chunks that end inside one waste the rest of it
_CPU_ROWS = 64  # 39 MB of logits at V = 152064
_HALVES = (torch.bfloat16, torch.float16)


def chunk_size(rows: int, vocabulary: int, *, cuda: bool) -> int:
    """Rows per chunk for (rows, vocabulary) logits: as few chunks as the memory bound allows, all about equal."""
    if not cuda:
        return _CPU_ROWS
    fit = _CUDA_LOGIT_BYTES // (4 * vocabulary)
    most = max(fit // _ROW_MULTIPLE, 1) * _ROW_MULTIPLE
    chunks = max(triton.cdiv(rows, most), 1)
    even = triton.cdiv(triton.cdiv(rows, chunks), _ROW_MULTIPLE) * _ROW_MULTIPLE
    return max(int(even), _ROW_MULTIPLE)


def score_rows_reference(
    logits: torch.Tensor,
    targets: torch.Tensor,
    log_probs: torch.Tensor,
    complement: torch.Tensor,
    direction: torch.Tensor | None,
) -> None:
    """What `score_rows` computes, in plain PyTorch in the dtype of `logits`."""
    vocabulary = logits.shape[1]
    ignored = targets == IGNORED
    column = targets.clamp(0, vocabulary - 1)[:, None]
    target_logit = logits.gather(1, column)[:, 0].masked_fill((targets < 0) | (targets >= vocabulary), float("nan"))
    others = logits.scatter(1, column, float("-inf"))
    margin = (target_logit - others.logsumexp(1)).masked_fill(ignored, float("inf"))  # p = 1: log p and 1 - p are 0
    log_probs.copy_(F.logsigmoid(margin))
    complement.copy_(torch.sigmoid(-margin))
    if direction is not None:
        share = others.softmax(1)  # NaN in a vocabulary of one, which the scatter overwrites
        direction.copy_((-share).scatter(1, column, 1.0).masked_fill(ignored[:, None], 0.0))


@triton.jit  # type: ignore[untyped-decorator]
def _log1p(x: tl.tensor) -> tl.tensor:
    """log(1 + x) for x in [0, 1] to fp32 rounding: 2 atanh(x / (2 + x)), whose argument is at most 1/3."""
    w = x / (2.0 + x)
    w2 = w * w
    series = 1.0 / 13 + w2 * (1.0 / 15)
    series = 1.0 / 11 + w2 * series
    series = 1.0 / 9 + w2 * series
    series = 1.0 / 7 + w2 * series
    series = 1.0 / 5 + w2 * series
    series = 1.0 / 3 + w2 * series
    return 2.0 * w * (1.0 + w2 * series)


@triton.jit  # type: ignore[untyped-decorator]
def _others(row: tl.tensor, target: tl.tensor, vocabulary: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """(maximum, sum of exp(z - maximum)) of a row without its target; lanes run on their own and meet once."""
    lanes = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -3.0e38, tl.float32)  # finite: -inf - -inf would be NaN in lanes that see nothing
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + lanes
        z = tl.load(row + columns, mask=columns < vocabulary, other=float("-inf"), eviction_policy="evict_last")
        z = tl.where(columns == target, float("-inf"), z)  # not in the mask, which would split the 16-byte loads
        above = z - top
        shrunk = tl.exp(-tl.abs(above))
        total = tl.where(above > 0, total * shrunk + 1.0, total + shrunk)
        top = tl.maximum(top, z)
    highest = tl.max(top, 0)
    return highest, tl.sum(total * tl.exp(top - highest), 0)


@triton.jit  # type: ignore[untyped-decorator]
def _write_direction(
    row: tl.tensor,
    out: tl.tensor,
    target: tl.tensor,
    highest: tl.tensor,
    total: tl.tensor,
    vocabulary: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """onehot(target) - q over one row, from its end to its start: the end is what L2 read last."""
    lanes = tl.arange(0, BLOCK)
    inverse = 1.0 / total
    blocks = tl.cdiv(vocabulary, BLOCK)
    for block in range(0, blocks):
        columns = (blocks - 1 - block) * BLOCK + lanes
        inside = columns < vocabulary
        z = tl.load(row + columns, mask=inside, other=float("-inf"), eviction_policy="evict_first")
        value = tl.where(columns == target, 1.0, -tl.exp(z - highest) * inverse)
        tl.store(out + columns, value.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _write_zeros(out: tl.tensor, vocabulary: tl.tensor, BLOCK: tl.constexpr) -> None:
    lanes = tl.arange(0, BLOCK)
    for start in range(0, vocabulary, BLOCK):
        columns = start + lanes
        tl.store(out + columns, tl.zeros((BLOCK,), out.dtype.element_ty), mask=columns < vocabulary)


@triton.jit  # type: ignore[untyped-decorator]
def _score_row_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    log_probs: tl.tensor,
    complement: tl.tensor,
    direction: tl.tensor,
    logits_stride: tl.tensor,
    targets_stride: tl.tensor,
    direction_stride: tl.tensor,
    vocabulary: tl.tensor,
    IGNORED: tl.constexpr,
    DIRECTION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program a row."""
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * logits_stride
    out = direction + index * direction_stride
    target = tl.load(targets + index * targets_stride)
    if target == IGNORED:
        tl.store(log_probs + index, 0.0)
        tl.store(complement + index, 0.0)
        if DIRECTION:
            _write_zeros(out, vocabulary, BLOCK)
    else:
        inside = (target >= 0) & (target < vocabulary)
        target_logit = tl.load(row + target, mask=inside, other=float("nan"))
        highest, total = _others(row, target, vocabulary, BLOCK)
        margin = target_logit - highest - tl.log(total)
        small = tl.exp(-tl.abs(margin))
        tl.store(log_probs + index, tl.minimum(margin, 0.0) - _log1p(small))
        tl.store(complement + index, tl.where(margin > 0, small, 1.0) / (1.0 + small))
        if DIRECTION:
            _write_direction(row, out, target, highest, total, vocabulary, BLOCK)


def _launch_score_rows(
    logits: torch.Tensor,
    targets: torch.Tensor,
    log_probs: torch.Tensor,
    complement: torch.Tensor,
    direction: torch.Tensor | None,
) -> None:
    rows, vocabulary = logits.shape
    # 8 logits a thread are two 16-byte loads in flight. 1024 threads a row mean at most two rows per multiprocessor:
    # the fewer, the more of the second pass comes from L2 (a row of 152064 logits is 608 KB).
    block = min(8192, triton.next_power_of_2(vocabulary))
    _score_row_kernel[(rows,)](
        logits,
        targets,
        log_probs,
        complement,
        logits if direction is None else direction,
        logits.stride(0),
        targets.stride(0),
        0 if direction is None else direction.stride(0),
        vocabulary,
        IGNORED=IGNORED,
        DIRECTION=direction is not None,
        BLOCK=block,
        num_warps=max(block // 256, 1),
    )


def score_rows(
    logits: torch.Tensor,
    targets: torch.Tensor,
    log_probs: torch.Tensor,
    complement: torch.Tensor,
    direction: torch.Tensor | None = None,
) -> None:
    """Fills `log_probs`, `complement` and, where given, `direction` for each row of logits.

    Args:
        logits: (R, V), fp32 (the reference takes fp64 too), any row stride.
        targets: (R,) int64; IGNORED gives zeros everywhere, anything else outside the vocabulary NaN.
        log_probs: (R,) contiguous, receives log p(target).
        complement: (R,) contiguous, receives 1 - p(target).
        direction: (R, V), any float dtype and row stride; receives onehot(target) - q; complement times it
            is the gradient of log p(target) in the logits.
    """
    score = _launch_score_rows if backend.runs_triton(logits) else score_rows_reference
    score(logits, targets, log_probs, complement, direction)


def _write_logits(hidden: torch.Tensor, head: torch.Tensor, out: torch.Tensor) -> None:
    """out (R, V) = hidden (R, H) head^T with out's precision; `out=` also keeps autocast from rounding the product."""
    if hidden.is_cuda and hidden.dtype in _HALVES:
        torch.mm(hidden, head.t(), out_dtype=out.dtype, out=out)
    else:
        torch.mm(hidden.to(out.dtype), head.t(), out=out)


class _Scored(NamedTuple):
    log_probs: torch.Tensor  # (N,)
    complement: torch.Tensor  # (N,): 1 - p(target)
    row_gradient: torch.Tensor | None  # (N, H): dlog p/dhidden without the factor 1 - p


def _forward(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int, gradient: bool) -> _Scored:
    precision = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    log_probs = torch.empty(hidden.shape[0], dtype=precision, device=hidden.device)
    scored = _Scored(log_probs, torch.empty_like(log_probs), hidden.new_empty(hidden.shape) if gradient else None)
    chunk = (min(rows, hidden.shape[0]), weight.shape[0])
    logits = torch.empty(chunk, dtype=precision, device=hidden.device)
    direction = hidden.new_empty(chunk) if gradient else None
    head = weight if hidden.is_cuda else weight.to(precision)
    for start in range(0, hidden.shape[0], rows):
        part, count = slice(start, start + rows), min(rows, hidden.shape[0] - start)
        now = None if direction is None else direction[:count]
        _write_logits(hidden[part], head, logits[:count])
        score_rows(logits[:count], targets[part], scored.log_probs[part], scored.complement[part], now)
        if now is not None and scored.row_gradient is not None:
            torch.mm(now, weight, out=scored.row_gradient[part])
    return scored


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int) -> torch.Tensor:
        scored = _forward(hidden, weight, targets, rows, gradient=True)
        ctx.save_for_backward(scored.row_gradient, scored.complement, targets)
        return scored.log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        row_gradient, complement, targets = ctx.saved_tensors
        # Selected, not multiplied: a loss divided by zero tokens sends inf to rows that count for nothing.
        factor = (grad * complement).masked_fill(targets == IGNORED, 0.0)
        d_hidden = torch.mul(row_gradient, factor[:, None], out=torch.empty_like(row_gradient))
        return d_hidden, None, None, None


def _check(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_rows: int | None) -> None:
    if hidden.dtype != torch.float64 or backend.runs_triton(hidden):
        backend.require_float(_OP, hidden=hidden, weight=weight)
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
    fit = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1] and targets.shape == hidden.shape[:1]
    backend.require(fit, _OP, f"{shapes}; they must be (N, H), (V, H) and (N,)")
    backend.require(weight.shape[0] > 0, _OP, f"weight {tuple(weight.shape)} has no rows")
    backend.require(targets.dtype == torch.int64, _OP, f"targets are {targets.dtype}; they must be torch.int64")
    backend.require(hidden.dtype == weight.dtype, _OP, f"hidden is {hidden.dtype} and weight {weight.dtype}")
    same_device = hidden.device == weight.device == targets.device
    devices = f"hidden is on {hidden.device}, weight on {weight.device}, targets on {targets.device}"
    backend.require(same_device, _OP, devices)
    trains_head = weight.requires_grad and torch.is_grad_enabled()
    backend.require(not trains_head, _OP, "weight requires a gradient, which this op would lose; freeze the head")
    backend.require(chunk_rows is None or chunk_rows > 0, _OP, f"chunk_rows is {chunk_rows}; it must be at least 1")


def token_log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, chunk_rows: int | None = None
) -> torch.Tensor:
    """log p(target) under softmax(weight hidden) for each row, with one chunk of logits in memory at a time.

    Differentiable once, in `hidden` alone. Reads nothing on the host: fit for CUDA graph capture.

    Args:
        hidden: (N, H), bf16, fp16 or fp32 (fp64 on the reference path), any row stride.
        weight: (V, H), the frozen head, in the dtype of `hidden`, any row stride.
        targets: (N,) int64. A row with IGNORED (-100) gives 0 and the gradient 0, whatever its hidden state holds, but
            costs as much as any other: leave such rows out where shapes may change. Any other value outside the
            vocabulary gives NaN.
        chunk_rows: rows per chunk; by default chosen by `chunk_size`.

    Returns:
        (N,) fp32 (fp64 for fp64).

    Raises:
        ValueError: where shapes, dtypes or devices do not fit, and where `weight` requires a gradient while gradients
            are recorded.
    """
    _check(hidden, weight, targets, chunk_rows)
    rows = chunk_rows or chunk_size(hidden.shape[0], weight.shape[0], cuda=hidden.is_cuda)
    if torch.is_grad_enabled() and hidden.requires_grad:
        result: torch.Tensor = _TokenLogProbs.apply(hidden, weight, targets, rows)  # type: ignore[no-untyped-call]
        return result
    return _forward(hidden, weight, targets, rows, gradient=False).log_probs
