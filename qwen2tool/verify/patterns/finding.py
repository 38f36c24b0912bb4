"""What a pattern reports, and tensors in words: "the q and k biases of layers 0-3"."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from qwen2tool.console import format_ranges
from qwen2tool.verify.inventory import HEAD, TABLE

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
SHORT = {
    TABLE: "the embedding table",
    HEAD: "the head (lm_head.weight)",
    "model.norm.weight": "the last norm (model.norm.weight)",
}
MOST_PARTS = 4
"""Kinds of tensors that are named one by one; beyond, they are counted."""
PER_LAYER, LINEARS = 12, 7
"""Tensors, and linear weights, that a layer has."""
Noun = Literal["bias", "norm", "weight"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One tensor that fits a pattern. Findings of one `code` and `detail` become one sentence."""

    code: str
    name: str
    detail: str = ""


def noun(name: str) -> Noun:
    """Which part of a code a tensor is: bias, norm or weight."""
    if name.endswith(".bias"):
        return "bias"
    return "norm" if name.endswith("norm.weight") else "weight"


def layer_of(name: str) -> tuple[int, str] | None:
    """(layer, name within it), None for a tensor outside the layers."""
    match = LAYER.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def which(names: Iterable[str], layers: int) -> str:
    """The tensors in words, those of the same layers drawn together.

    Args:
        layers: of the model, to say "all".
    """
    found = list(names)
    where: dict[str, list[int]] = defaultdict(list)
    parts = [SHORT.get(name, name) for name in found if layer_of(name) is None]
    for placed in filter(None, map(layer_of, found)):
        where[placed[1]].append(placed[0])
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    if parts == [] and len(where) == 1 and found[0].endswith("_proj.bias") and len(found) > 1:
        return f"the {_letter(next(iter(where)))} biases of {in_layers(next(iter(where.values())), layers)}"
    for kind, places in where.items():
        groups[tuple(sorted(places))].append(kind)
    parts += [f"{_kinds(kinds)} of {in_layers(numbers, layers)}" for numbers, kinds in groups.items()]
    if len(parts) > MOST_PARTS:
        return f"{len(found)} tensors (the first is {found[0]})"
    return join(parts)


def _kinds(kinds: Sequence[str]) -> str:
    biases = sorted((_letter(kind) for kind in kinds if kind.endswith("_proj.bias")), key="qkv".find)
    if len(biases) == len(kinds):
        return f"the {join(biases)} bias{'es' if len(biases) > 1 else ''}"
    if len(kinds) >= PER_LAYER:
        return "all tensors"
    if len(kinds) > MOST_PARTS:
        linears = sum(kind.endswith("_proj.weight") for kind in kinds) == len(kinds)
        return f"{'all ' if len(kinds) == LINEARS else ''}{len(kinds)} {'linear weights' if linears else 'tensors'}"
    return join([kind.removeprefix("self_attn.").removeprefix("mlp.") for kind in kinds])


def _letter(kind: str) -> str:
    """q of self_attn.q_proj.bias."""
    return kind.split(".")[1][0]


def in_layers(numbers: Sequence[int], layers: int) -> str:
    """layer 3; layers 0-2, 5; all 24 layers."""
    if len(numbers) == layers > 1:
        return f"all {layers} layers"
    return ("layer " if len(numbers) == 1 else "layers ") + format_ranges(sorted(numbers))


def join(words: Sequence[str]) -> str:
    """a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
