"""What benchmarks/kernels.py times: each op of qwen2tool.kernels at one size, beside what else computes the same.

N rows (tokens), H hidden, I intermediate, W (heads + kv heads) * head_dim, V vocabulary, R rank of a LoRA; all bf16 on
random data. A case names its fewest bytes (each input read once, each output written once) and its flops. `torch` is
PyTorch in as many launches as transformers makes, `liger` Liger's op; `products` are an op's bare matrix products,
`a copy` one of as many bytes as the op moves: what a ceiling measured on 2 GB is worth for a launch of that size.
Others get their inputs in the layout that suits them, and rotate q and k without adding biases (theirs are in the
product before). Every run is made when its turn comes, so a package that is missing is that run's error alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Call = Callable[[int], object]
CACHE_BYTES = 1 << 27
"""What the rotating inputs of a case fill at least: twice the 60 MB of L2 of an H200."""
EPS = 1e-6
LORAS = 3
"""q, k and v."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Shapes of Qwen1.5-7B unless told otherwise; `length` is a sequence's tokens where all are equal."""

    rows: int
    length: int
    hidden: int = 4096
    intermediate: int = 11008
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    vocab: int = 151936
    rank: int = 64
    dropout: float = 0.05
    device: str = "cuda"

    @property
    def qk(self) -> int:
        """W."""
        return (self.heads + self.kv_heads) * self.head_dim


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one size.

    Attributes:
        shape: for the table.
        runs: name -> maker of the call that is timed; a call takes the number of an input set, 0 to sets - 1.
        bytes, flops: the fewest that the op needs; 0 where it is not what bounds it.
    """

    shape: str
    runs: dict[str, Callable[[], Call]]
    sets: int = 2
    bytes: float = 0.0
    flops: float = 0.0


def sets_for(nbytes: float) -> int:
    """How many input sets of `nbytes` make a round larger than the cache."""
    return int(min(16, max(2, -(-CACHE_BYTES // max(nbytes, 1)))))


def randn(s: Sizes, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=s.device) * scale).to(torch.bfloat16)


def several(s: Sizes, count: int, *shape: int) -> list[torch.Tensor]:
    return [randn(s, *shape) for _ in range(count)]


def backward(
    function: Callable[..., torch.Tensor], inputs: list[tuple[torch.Tensor, ...]], grads: list[torch.Tensor]
) -> Call:
    """The gradients of `function` alone: its forward is made here, once a set, and kept."""
    leaves = [tuple(x.detach().requires_grad_() for x in xs) for xs in inputs]
    outputs = [function(*xs) for xs in leaves]
    return lambda i: torch.autograd.grad(outputs[i], leaves[i], grads[i], retain_graph=True)


Norm = Callable[[torch.Tensor], torch.Tensor]


def hf_norm(weight: torch.Tensor) -> Norm:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    return frozen(Qwen2RMSNorm(weight.numel(), EPS), weight)


def liger_norm(weight: torch.Tensor) -> Norm:
    from liger_kernel.transformers import LigerRMSNorm

    return frozen(LigerRMSNorm(weight.numel(), EPS, in_place=False), weight)


def frozen(norm: torch.nn.Module, weight: torch.Tensor) -> Norm:
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm


def without_grad(function: Callable[..., object], inputs: list[tuple[torch.Tensor, ...]]) -> Call:
    def call(i: int) -> object:
        with torch.no_grad():
            return function(*inputs[i])

    return call


def rms_norm_forward(s: Sizes) -> Case:
    from qwen2tool.kernels import rmsnorm

    nbytes = 4.0 * s.rows * s.hidden
    sets = sets_for(nbytes)
    xs, weight = [(x,) for x in several(s, sets, s.rows, s.hidden)], randn(s, s.hidden)
    runs: dict[str, Callable[[], Call]] = {
        "ours": lambda: lambda i: rmsnorm.rms_norm_forward(xs[i][0], weight, EPS),
        "torch": lambda: without_grad(hf_norm(weight), xs),
        "liger": lambda: without_grad(liger_norm(weight), xs),
    }
    return Case(shape=f"{s.rows} x {s.hidden}", runs=runs, sets=sets, bytes=nbytes)


def rms_norm_backward(s: Sizes, residual: bool) -> Case:
    from qwen2tool.kernels import rmsnorm

    nbytes = (8.0 if residual else 6.0) * s.rows * s.hidden
    sets = sets_for(nbytes)
    xs, dys, rests = (several(s, sets, s.rows, s.hidden) for _ in range(3))
    weight = randn(s, s.hidden)
    rstds = [rmsnorm.rms_norm_forward(x, weight, EPS)[1] for x in xs]

    def ours(i: int) -> object:
        rest = rests[i] if residual else None
        return rmsnorm.rms_norm_backward(dys[i], xs[i], weight, rstds[i], residual_grad=rest)

    def other(norm: Norm) -> Call:
        grads = backward(norm, [(x,) for x in xs], dys)
        return (lambda i: grads(i)[0] + rests[i]) if residual else grads  # type: ignore[index]

    runs = {"ours": lambda: ours, "torch": lambda: other(hf_norm(weight)), "liger": lambda: other(liger_norm(weight))}
    return Case(shape=f"{s.rows} x {s.hidden}", runs=runs, sets=sets, bytes=nbytes)


def angles(s: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of each row's position, (N, D/2) fp32."""
    inverse = 1e6 ** (-torch.arange(0, s.head_dim, 2, device=s.device) / s.head_dim)
    table = (torch.arange(s.rows, device=s.device) % s.length)[:, None] * inverse
    return table.cos(), table.sin()


def rotation(s: Sizes, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """transformers' or Liger's rotation of rows [q heads | k heads]; rows as both expect them, heads transposed."""
    if name == "torch":
        from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb as rotate
    else:
        from liger_kernel.transformers import liger_rotary_pos_emb as rotate
    batch = s.rows // s.length
    cos, sin = (torch.cat([t, t], 1)[: s.length].to(torch.bfloat16)[None] for t in angles(s))

    def call(qk: torch.Tensor) -> Any:
        heads = qk.view(batch, s.length, s.heads + s.kv_heads, s.head_dim).transpose(1, 2)
        q, k = heads.split([s.heads, s.kv_heads], 1)
        return rotate(q, k, cos, sin)

    return call


def rope_forward(s: Sizes) -> Case:
    from qwen2tool.kernels import rope

    nbytes = 4.0 * s.rows * (s.qk + s.head_dim)
    sets = sets_for(nbytes)
    rows, bias = [(x,) for x in several(s, sets, s.rows, s.qk)], randn(s, s.qk)
    cos, sin = angles(s)
    centre = torch.randn(s.kv_heads * s.head_dim, device=s.device)
    heads = {"heads": s.heads, "kv_heads": s.kv_heads}
    runs: dict[str, Callable[[], Call]] = {
        "ours": lambda: lambda i: rope.rope_forward(rows[i][0], bias, cos, sin, centre, **heads),
        "torch": lambda: without_grad(rotation(s, "torch"), rows),
        "liger": lambda: without_grad(rotation(s, "liger"), rows),
    }
    return Case(shape=f"{s.rows} x {s.qk}", runs=runs, sets=sets, bytes=nbytes)


def rope_backward(s: Sizes) -> Case:
    from qwen2tool.kernels import rope

    nbytes = 4.0 * s.rows * (s.qk + s.head_dim)
    sets = sets_for(nbytes)
    rows, grads = several(s, sets, s.rows, s.qk), several(s, sets, s.rows, s.qk)
    cos, sin = angles(s)

    def other(name: str) -> Call:
        leaves = [x.detach().requires_grad_() for x in rows]
        # Not a leaf: Liger rotates in place.
        outputs = [rotation(s, name)(x * 1) for x in leaves]
        pairs = [tuple(torch.randn_like(part) for part in output) for output in outputs]
        return lambda i: torch.autograd.grad(outputs[i], leaves[i], pairs[i], retain_graph=True)

    runs: dict[str, Callable[[], Call]] = {
        "ours": lambda: lambda i: rope.rope_backward(grads[i], cos, sin, heads=s.heads, kv_heads=s.kv_heads),
        "torch": lambda: other("torch"),
        "liger": lambda: other("liger"),
    }
    return Case(shape=f"{s.rows} x {s.qk}", runs=runs, sets=sets, bytes=nbytes)


def eager_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def liger_swiglu() -> Callable[..., torch.Tensor]:
    from liger_kernel.transformers import functional

    return functional.liger_swiglu  # type: ignore[no-any-return]


def swiglu_forward(s: Sizes) -> Case:
    from qwen2tool.kernels import swiglu

    nbytes = 6.0 * s.rows * s.intermediate
    sets = sets_for(nbytes)
    joined = several(s, sets, s.rows, 2 * s.intermediate)
    apart = [tuple(half.contiguous() for half in x.chunk(2, 1)) for x in joined]
    runs: dict[str, Callable[[], Call]] = {
        "ours": lambda: lambda i: swiglu.swiglu_forward(joined[i]),
        "torch": lambda: without_grad(eager_swiglu, apart),
        "liger": lambda: without_grad(liger_swiglu(), apart),
    }
    return Case(shape=f"{s.rows} x {s.intermediate}", runs=runs, sets=sets, bytes=nbytes)


def swiglu_backward(s: Sizes, again: bool) -> Case:
    """`again`: h is written once more, as a recompute needs it."""
    from qwen2tool.kernels import swiglu

    nbytes = (12.0 if again else 10.0) * s.rows * s.intermediate
    sets = sets_for(nbytes)
    joined, dhs = several(s, sets, s.rows, 2 * s.intermediate), several(s, sets, s.rows, s.intermediate)
    apart = [tuple(half.contiguous() for half in x.chunk(2, 1)) for x in joined]
    h_outs = several(s, sets, s.rows, s.intermediate) if again else [None] * sets

    def other(function: Callable[..., torch.Tensor]) -> Call:
        grads = backward(function, apart, dhs)
        return (lambda i: (grads(i), without_grad(function, apart)(i))) if again else grads

    runs: dict[str, Callable[[], Call]] = {
        "ours": lambda: lambda i: swiglu.swiglu_backward(dhs[i], joined[i], h_out=h_outs[i]),
        "torch": lambda: other(eager_swiglu),
        "liger": lambda: other(liger_swiglu()),
    }
    return Case(shape=f"{s.rows} x {s.intermediate}", runs=runs, sets=sets, bytes=nbytes)
