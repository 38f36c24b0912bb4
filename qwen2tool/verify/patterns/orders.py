"""The same numbers in another order: which permutation a bias, or the rows of a matrix, went through.

RoPE pairs entry i of a head with entry i + head_dim / 2 in transformers' layout and entry 2i with 2i + 1 in the
original one; tools that convert between the two reorder q and k, and some do it to the weight and forget the bias.
Named orders are tried one by one (a gather and a comparison each); nothing is searched.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwen2tool.checkpoint.geometry import Geometry

NEAR = 2.0**-7
"""Of an entry: two roundings to bf16."""


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal entry by entry within two roundings to bf16; two float tensors of one shape."""
    return bool(((one - other).abs() <= NEAR * one.abs()).all())


def find_order(reference: torch.Tensor, candidate: torch.Tensor, heads: int) -> str | None:
    """The permutation that makes `candidate` of `reference`, in words; None if it is none of it, or the same.

    Args:
        reference, candidate: (N,) or (N, C): rows are permuted, never columns. All C columns take part.
        heads: that the N rows divide into; 1 where rows have no heads.
    """
    mine, theirs = (x.double().reshape(len(x), -1) for x in (reference, candidate))
    if near(mine, theirs) or not all(
        near(mine[:, c].sort().values, theirs[:, c].sort().values) for c in range(mine.shape[1])
    ):
        return None
    for words, index in named_orders(len(mine), heads):
        if near(mine[index], theirs):
            return words
    return _shifted(mine, theirs) or _by_head(mine, theirs, heads) or "in an order that is none of the known ones"


def named_orders(rows: int, heads: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(words, index) with candidate = reference[index]."""
    size = rows // heads
    plain = torch.arange(rows)
    by_head = plain.view(heads, size)
    if size % 2 == 0 and heads * size == rows and size > 2:
        halves, pairs = plain.view(heads, 2, size // 2), plain.view(heads, size // 2, 2)
        yield (
            "with the halves of each head interleaved, as GGUF's llama layout has them",
            halves.transpose(1, 2).reshape(-1),
        )
        yield "with the even and odd entries of each head apart", pairs.transpose(1, 2).reshape(-1)
        yield "with the halves of each head exchanged", halves.flip(1).reshape(-1)
    yield "reversed", plain.flip(0)
    if heads == 1:
        return
    yield "with the heads in reverse order", by_head.flip(0).reshape(-1)
    yield "reversed within each head", by_head.flip(1).reshape(-1)
    for shift in range(1, heads):
        yield f"with the heads rotated by {shift}", by_head.roll(shift, 0).reshape(-1)
    for groups in range(2, heads):
        if heads % groups == 0:
            dealt = by_head.view(groups, heads // groups, size).transpose(0, 1)
            yield f"with the heads dealt out in {groups} groups", dealt.reshape(-1)
    yield "with heads and entries of a head transposed", by_head.T.reshape(-1)


def _shifted(mine: torch.Tensor, theirs: torch.Tensor) -> str | None:
    """A rotation by any number of rows."""
    for shift in ((mine - theirs[0]).abs() <= NEAR * mine.abs()).all(1).nonzero().flatten().tolist()[:8]:
        if shift and near(mine.roll(-shift, 0), theirs):
            return f"rotated by {len(mine) - shift} of {len(mine)} entries"
    return None


def _by_head(mine: torch.Tensor, theirs: torch.Tensor, heads: int) -> str | None:
    """Whole heads in any order."""
    if heads == 1:
        return None
    blocks = mine.view(heads, -1)
    order = []
    for head in theirs.view(heads, -1):
        source = next((n for n, block in enumerate(blocks) if near(block, head)), None)
        if source is None:
            return None
        order.append(source)
    return f"with the heads in the order {', '.join(map(str, order))}"


def heads_of(kind: str, shape: Geometry) -> int:
    """Heads among the rows of a tensor of a layer (of o_proj: among its columns); 1 where there are none."""
    if ".q_proj." in kind or ".o_proj." in kind:
        return shape.num_attention_heads
    return shape.num_key_value_heads if ".k_proj." in kind or ".v_proj." in kind else 1
