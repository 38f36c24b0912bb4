"""Causal attention inside each of several sequences laid end to end, without padding.

out_i = sum_j softmax_j(scale q_i . k_j) v_j over the keys j <= i of i's own sequence; query head h reads kv head
h // (hq / hk). The gradients are autograd's (Dao et al. 2022, arXiv 2205.14135, for the fused ones).

On CUDA the work goes to PyTorch's fused kernels, whose memory grows with N and not with N^2:
- 16 bit, all sequences of one length: scaled_dot_product_attention, batched. cuDNN first (487 TFLOP/s causal forward on
  an H200), then FlashAttention-2 (277), and never with a mask: cuDNN's backward with one returns NaN rows of dQ
  (pytorch#196678, torch 2.11 to 2.13).
- 16 bit, ragged: `varlen_attn` over the offsets, FlashAttention-2.
- fp32, and 16 bit where FlashAttention does not run (before Ampere, odd head_dims): the memory-efficient kernel; ragged
  sequences then cost a block-diagonal mask, N^2 numbers.
Keys that share a large constant make every fused backward lose digits of dQ in 16 bit: rope.py centres them.

Shapes: N tokens of all sequences, hq and hk query and kv heads, D head_dim; B sequences of T tokens where uniform.
Dtypes: bf16, fp16, fp32 (float64: the reference). Cost of the reference, which CPUs run: hq T^2 scores in fp32, one
sequence at a time where they are ragged.
Nothing here reads the device from the host, so all of it can be captured in a CUDA graph; the offsets of a captured
call may change in place as long as no sequence grows past `max_length`.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwen2tool.kernels import backend

EFFICIENT = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
EXACT = (SDPBackend.MATH,)
FASTEST = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *EFFICIENT)


class Sequences(NamedTuple):
    """Where the sequences of N packed tokens begin and end.

    offsets: (S + 1,) int32 on the tokens' device, cumulative lengths from 0 to N; equal neighbours are empty sequences.
    max_length: at least the longest sequence's length, on the host.
    uniform: (B, T) if the tokens are B sequences of T tokens each; the offsets are then not read.
    """

    offsets: torch.Tensor
    max_length: int
    uniform: tuple[int, int] | None = None


def _same_sequence_causal(offsets: torch.Tensor, tokens: int) -> torch.Tensor:
    """(N, N) bool: whether row i sees column j. Made on the device from offsets (S + 1,)."""
    position = torch.arange(tokens, device=offsets.device, dtype=offsets.dtype)
    sequence = torch.bucketize(position, offsets[1:], right=True)  # (N,): how many sequences end at or before a token
    return (sequence[:, None] == sequence) & (position[:, None] >= position)


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences, *, scale: float | None = None
) -> torch.Tensor:
    """The definition of `attend`, in fp32 (float64 for float64) with one rounding at the end; differentiable."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, length = sequences.uniform or (1, q.shape[0])
    kv_heads, width = k.shape[1:]
    group = q.shape[1] // kv_heads
    query = q.to(wide).reshape(batch, length, kv_heads, group, width).permute(0, 2, 3, 1, 4)  # (B, hk, group, T, D)
    key = k.to(wide).reshape(batch, length, kv_heads, 1, width).permute(0, 2, 3, 1, 4)  # (B, hk, 1, T, D)
    value = v.to(wide).reshape(batch, length, kv_heads, 1, width).permute(0, 2, 3, 1, 4)
    if sequences.uniform:
        seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    else:
        seen = _same_sequence_causal(sequences.offsets, length)
    scores = query @ key.transpose(-1, -2) * (width**-0.5 if scale is None else scale)  # (B, hk, group, T, T)
    out = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value
    return out.permute(0, 3, 1, 2, 4).reshape(q.shape).to(q.dtype)


def _flash_takes(q: torch.Tensor) -> bool:
    """Whether FlashAttention-2 runs on `q`: 16 bit, Ampere or later, head_dim a multiple of 8 up to 256."""
    sixteen_bit = q.dtype in (torch.bfloat16, torch.float16)
    return sixteen_bit and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and _capability(q.device) >= (8, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _expanded(x: torch.Tensor, heads: int) -> torch.Tensor:
    """kv heads repeated until there are `heads`; x: (N, hk, D)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def attend_uniform(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shape: tuple[int, int],
    *,
    scale: float | None = None,
    order: tuple[SDPBackend, ...] = FASTEST,
) -> torch.Tensor:
    """`attend` for B sequences of T tokens through scaled_dot_product_attention.

    Args:
        q, k, v: (B T, heads, D).
        shape: (B, T).
        scale: of the scores; default D^-0.5.
        order: the backends allowed, the preferred first. Without cuDNN and FlashAttention kv heads are repeated, since
            the memory-efficient kernel takes no grouped queries.

    Returns:
        (B T, hq, D).
    """
    grouped = SDPBackend.CUDNN_ATTENTION in order or SDPBackend.FLASH_ATTENTION in order
    if not grouped:
        k, v = _expanded(k, q.shape[1]), _expanded(v, q.shape[1])
    query, key, value = (x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))  # (B, heads, T, D)
    with sdpa_kernel(list(order), set_priority=True):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.transpose(1, 2).reshape(q.shape)


@cache
def _varlen_options() -> dict[str, Any]:
    """How the installed torch is asked for causal attention; and "enable_gqa", if it has grouped queries."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    return options | ({"enable_gqa": True} if "enable_gqa" in names else {})


def repeats_kv() -> bool:
    """Whether `attend_ragged` repeats kv heads for grouped queries, and so keeps k and v once a query head."""
    return "enable_gqa" not in _varlen_options()


def attend_ragged(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences, *, scale: float | None = None
) -> torch.Tensor:
    """`attend` through FlashAttention's kernel for sequences of different lengths; 16 bit.

    Args:
        q, k, v: (N, heads, D).
        sequences: offsets and the longest length.
        scale: of the scores; default D^-0.5.

    Returns:
        (N, hq, D).
    """
    from torch.nn.attention.varlen import varlen_attn

    options = dict(_varlen_options())
    if repeats_kv():
        k, v = _expanded(k, q.shape[1]), _expanded(v, q.shape[1])
    if scale is not None:
        options["scale"] = scale
    longest = sequences.max_length
    out = varlen_attn(q, k, v, sequences.offsets, sequences.offsets, longest, longest, **options)
    return cast(torch.Tensor, out)  # a pair only where more is asked for


def _attend_masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """`attend` for what no unmasked kernel takes; the backends in use are sound with a mask."""
    heads, mask = q.shape[1], _same_sequence_causal(offsets, q.shape[0])
    query, key, value = (_expanded(x, heads).transpose(0, 1)[None] for x in (q, k, v))  # (1, hq, N, D)
    with sdpa_kernel(list(_exact_first(q)), set_priority=True):
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out[0].transpose(0, 1)


def _one_by_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """`attend` on the CPU, where offsets can be read and the scores of all sequences at once be N^2 numbers."""
    lengths = offsets.diff().tolist()
    alone = [
        attention_reference(a, b, c, Sequences(offsets, n, (1, n)), scale=scale)
        for n, a, b, c in zip(lengths, *(torch.split(x, lengths) for x in (q, k, v)), strict=True)
    ]
    return torch.cat(alone) if alone else torch.empty_like(q)


def _exact_first(q: torch.Tensor, rows: int = 1) -> tuple[SDPBackend, ...]:
    """For fp32, the plain backend while its scores take less than 1 GB.

    With the efficient one, q's gradients in a layer were 6 times as far from float64 (H100, torch 2.11, 3 short rows).
    """
    scores = rows * q.shape[1] * (q.shape[0] // rows) ** 2 * 4
    return EXACT if q.dtype == torch.float32 and scores < 1 << 30 else EFFICIENT


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences) -> None:
    op = "attend"
    for name, x in (("q", q), ("k", k), ("v", v)):
        backend.require(x.dim() == 3, op, f"{name} has shape {tuple(x.shape)}; it must be (N, heads, D)")
        backend.require(x.dtype == q.dtype, op, f"{name} is {x.dtype} and q is {q.dtype}")
    backend.require(k.shape == v.shape, op, f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}")
    backend.require(
        q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2] and q.shape[1] % k.shape[1] == 0,
        op,
        f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; tokens and head_dim must agree, heads divide",
    )
    if sequences.uniform is not None:
        batch, length = sequences.uniform
        backend.require(batch * length == q.shape[0], op, f"uniform {sequences.uniform} is not {q.shape[0]} tokens")
    else:
        backend.require(sequences.offsets.dtype == torch.int32, op, f"offsets are {sequences.offsets.dtype}, not int32")


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences, *, scale: float | None = None
) -> torch.Tensor:
    """Causal attention within each sequence, differentiable by autograd.

    Args:
        q: (N, hq, D); row-strided views are taken as they are (last dimension contiguous).
        k, v: (N, hk, D), hk a divisor of hq; the dtype of `q`.
        sequences: where the sequences of the N tokens end.
        scale: of the scores; default D^-0.5.

    Returns:
        (N, hq, D) in `q`'s dtype.

    Raises:
        ValueError: naming the argument whose shape or dtype does not fit.
    """
    _check(q, k, v, sequences)
    if q.device.type == "cpu" and sequences.uniform is None:
        return _one_by_one(q, k, v, sequences.offsets, scale)
    if not (q.is_cuda and backend.runs_triton(q) and q.dtype in backend.FLOATS and q.numel()):
        return attention_reference(q, k, v, sequences, scale=scale)
    flash = _flash_takes(q)
    if sequences.uniform is not None:
        order = FASTEST if flash else _exact_first(q, sequences.uniform[0])
        return attend_uniform(q, k, v, sequences.uniform, scale=scale, order=order)
    if flash:
        return attend_ragged(q, k, v, sequences, scale=scale)
    return _attend_masked(q, k, v, sequences.offsets, scale)
