"""Biases that a tool lost, taken from the checkpoint that the damaged copy was made from.

What is left may be fine-tuned, so its weights need not be the original's; that the two belong together is judged from
geometry, shapes, and how alike the matrices are. Weights move by a few percent in training (cosine above 0.9); those of
another model, or of another layer, have a cosine near 0.

Cost: reading both checkpoints once, one pair of tensors at a time.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, fields, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2tool.checkpoint.adapter import fingerprint
from qwen2tool.checkpoint.geometry import expected_tensors
from qwen2tool.checkpoint.inventory import BIAS_NAME
from qwen2tool.checkpoint.view import AnyTensor, View, read
from qwen2tool.console import progress
from qwen2tool.convert.llama import is_zero
from qwen2tool.convert.manifest import public_name
from qwen2tool.errors import EXIT_FINDING, UserError

if TYPE_CHECKING:
    import torch

UNSAID = ("model_type", "attention_bias", "dtype", "quantization", "sliding_window", "max_position_embeddings")
"""Fields of a geometry that may differ between an original and a damaged copy of it."""
RELATED = 0.5
"""Median cosine of the weights below which two checkpoints are taken for strangers."""
SAMPLE = 1 << 20
"""Entries compared of each matrix."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """`restored` were missing or all zero; `kept` are biases of the damaged copy that it still had."""

    original: str
    fingerprint: str
    restored: tuple[str, ...]
    kept: tuple[str, ...]
    compared: int
    byte_equal: int
    median_cosine: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def with_biases(damaged: View, original: View, name: str | Path) -> tuple[View, Restored]:
    """`damaged` with every q/k/v bias that it lacks, or holds as zeros, taken from `original` (named `name`).

    Raises:
        UserError: another geometry, a tensor of another shape or missing beside the biases, or weights that are no
            relatives; nothing to restore.
    """
    _require_same_geometry(damaged, original)
    tensors: dict[str, AnyTensor] = {}
    restored, kept = [], []
    for wanted in expected_tensors(original.geometry):
        mine, whole = damaged.tensors.get(wanted), original.tensors[wanted]
        if BIAS_NAME.fullmatch(wanted) and (mine is None or _lost(mine, whole)):
            tensors[wanted] = whole
            restored.append(wanted)
            continue
        if mine is None or mine.shape != whole.shape:
            found = "is missing" if mine is None else f"has shape {list(mine.shape)}, not {list(whole.shape)}"
            raise UserError(
                f"{damaged.path}: {wanted} {found}", "Only biases can be taken from an original", EXIT_FINDING
            )
        tensors[wanted] = mine
        if BIAS_NAME.fullmatch(wanted):
            kept.append(wanted)
    if not restored:
        raise UserError(f"{damaged.path}: has all its biases", "Leave out --biases-from")
    extra = {key: tensor for key, tensor in damaged.tensors.items() if key not in tensors}
    equal, cosines = _relation(tensors, original, set(restored))
    median = statistics.median(cosines) if cosines else 1.0
    if median < RELATED:
        raise UserError(
            f"{name}: its weights are strangers to those of {damaged.path} (median cosine {median:.2f})",
            "Name the checkpoint that the damaged copy was made from",
            EXIT_FINDING,
        )
    report = Restored(
        original=public_name(name),
        fingerprint=fingerprint(original.origin),
        restored=tuple(restored),
        kept=tuple(kept),
        compared=len(tensors) - len(restored),
        byte_equal=equal,
        median_cosine=round(median, 6),
    )
    return replace(damaged, tensors={**tensors, **extra}), report


def zero_bias_warning(view: View) -> str:
    """A sentence where q/k/v biases hold nothing but zeros, as no training leaves them; else nothing."""
    names = [name for name in view.tensors if BIAS_NAME.fullmatch(name)]
    zero = [name for name in names if is_zero(view.tensors[name])]
    if not zero:
        return ""
    which = "all" if len(zero) == len(names) else f"{len(zero)} of {len(names)}"
    first = "" if len(zero) == len(names) else f" (the first is {zero[0]})"
    return (
        f"{view.path}: {which} q/k/v biases hold nothing but zeros{first}, as a reader leaves them that did not find "
        "them: if an original has them, add --biases-from ORIGINAL"
    )


def _require_same_geometry(damaged: View, original: View) -> None:
    for item in fields(damaged.geometry):
        mine, theirs = getattr(damaged.geometry, item.name), getattr(original.geometry, item.name)
        if item.name not in UNSAID and mine != theirs:
            raise UserError(
                f"{damaged.path}: {item.name} is {mine}, that of {original.path} is {theirs}",
                "Name the checkpoint that the damaged copy was made from",
                EXIT_FINDING,
            )


def _lost(mine: AnyTensor, whole: AnyTensor) -> bool:
    """A bias of zeros is what a reader puts where one is missing, unless the original has zeros too."""
    return mine.shape == whole.shape and not read(mine).any() and bool(read(whole).any())


def _relation(tensors: dict[str, AnyTensor], original: View, restored: set[str]) -> tuple[int, list[float]]:
    """(tensors that are the original's byte for byte, cosine of each matrix that is not)."""
    import torch

    equal, cosines = 0, []
    with progress("comparing with the original", sum(tensor.nbytes for tensor in tensors.values())) as advance:
        for name, tensor in tensors.items():
            advance(tensor.nbytes)
            if name in restored:
                continue
            mine, theirs = read(tensor), read(original.tensors[name])
            if mine.dtype == theirs.dtype and torch.equal(mine.view(-1).view(torch.uint8), _bytes(theirs)):
                equal += 1
            elif mine.dim() == 2:
                cosines.append(_cosine(mine.view(-1)[:SAMPLE], theirs.view(-1)[:SAMPLE]))
    return equal, cosines


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.view(-1).view(torch.uint8)


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.double(), other.double()
    product = sqrt(float(one.square().sum()) * float(other.square().sum()))
    return float(one @ other) / product if product else 0.0
