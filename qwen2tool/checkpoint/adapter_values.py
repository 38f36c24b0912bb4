"""The numbers of an adapter: what is not finite, which sides are all zero, and how large each update is.

The Frobenius norm of B A needs no product of that size: |BA|^2 = tr((B'B)(AA')), two rank x rank matrices.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Any

import torch

from qwen2tool.checkpoint.adapter_parts import AdapterFiles, scale_of
from qwen2tool.checkpoint.reader import TORCH_DTYPE, read_tensor

if TYPE_CHECKING:
    from qwen2tool.checkpoint.adapter_parts import Part


def measure(files: AdapterFiles, pairs: dict[str, dict[str, Part]]) -> dict[str, Any]:
    """The `values` section of `adapter_report`; one pair in memory at a time, in float64.

    Raises:
        UserError: a file that ends early.
    """
    found: dict[str, Any] = {"not_finite": [], "zero": {"A": [], "B": []}, "pairs": len(pairs), "updates": {}}
    norms: dict[str, list[tuple[float, int | None]]] = {}
    for module, sides in pairs.items():
        read = {side: read_tensor(part.info) for side, part in sorted(sides.items())}
        for side, matrix in read.items():
            if not _finite(matrix):
                found["not_finite"].append(sides[side].info.name)
            elif not matrix.any():
                found["zero"][side].append(module)
        scaling = scale_of(files.config, module).scaling
        if scaling is not None and _multiply(read) and all(map(_finite, read.values())):
            part = sides["A"]
            norms.setdefault(part.target, []).append((scaling * _norm(read["A"], read["B"]), part.layer))
    for part in files.parts:
        if part.kind != "lora" and part.info.dtype in TORCH_DTYPE and not _finite(read_tensor(part.info)):
            found["not_finite"].append(part.info.name)
    for target, sizes in norms.items():
        largest, layer = max(sizes, key=lambda size: size[0])
        found["updates"][target] = {
            "mean": sum(size for size, _ in sizes) / len(sizes),
            "largest": largest,
            "layer": layer,
        }
    return found


def _finite(matrix: torch.Tensor) -> bool:
    return not matrix.dtype.is_floating_point or bool(torch.isfinite(matrix.float()).all())


def _multiply(read: dict[str, torch.Tensor]) -> bool:
    if set(read) != {"A", "B"} or any(matrix.dim() != 2 for matrix in read.values()):
        return False
    return read["B"].shape[1] == read["A"].shape[0] and all(m.dtype.is_floating_point for m in read.values())


def _norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """The Frobenius norm of b @ a; (rank, in) and (out, rank)."""
    wide_a, wide_b = a.double(), b.double()
    return sqrt(max(0.0, float(((wide_b.T @ wide_b) * (wide_a @ wide_a.T)).sum())))
