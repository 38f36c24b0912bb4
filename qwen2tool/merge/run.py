"""Merging, tensor by tensor: W' = round(W + scaling * B A), computed in fp32 with one rounding at the end.

A matrix is read, summed and written in blocks of rows, so peak memory is a few blocks in fp32 (about 100 MB) and one
adapter pair, whatever the size of the model. What no pair touches is copied byte for byte. The result is byte-identical
to PEFT's `merge_and_unload` for plain LoRA with fp32 adapters.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import BinaryIO

import torch

from qwen2tool import __version__
from qwen2tool.checkpoint.adapter import LoraPair, fingerprint
from qwen2tool.checkpoint.folder import HUB_ID, INDEX_NAME
from qwen2tool.checkpoint.geometry import Config, read_json, with_both_spellings
from qwen2tool.checkpoint.header import TensorInfo, read_header
from qwen2tool.checkpoint.raw import copy_tensor
from qwen2tool.checkpoint.reader import TORCH_DTYPE, read_tensor, row_blocks, write_tensor
from qwen2tool.checkpoint.writer import (
    Slot,
    atomic_folder,
    copy_side_files,
    require_apart,
    require_free,
    write_index,
    write_json,
    write_safetensors,
)
from qwen2tool.console import Advance, progress, resident_peak
from qwen2tool.errors import EXIT_FINDING, UserError
from qwen2tool.merge.plan import FLOATS, MergeDtype, MergePlan, plan_merge
from qwen2tool.merge.report import MergeReport, Survival

SIDECAR = "qwen2tool_merge.json"
BLOCK_ELEMENTS = 1 << 21
"""Elements of a matrix that are held in fp32 at a time: 8 MB a copy."""


def merge(
    base: str | Path,
    adapter: Path,
    out: Path,
    *,
    overwrite: bool = False,
    allow_other_base: bool = False,
    dtype: MergeDtype = "keep",
) -> MergeReport:
    """Writes base + adapter as one checkpoint to `out`, with the base's shards, tokenizer and generation settings.

    Args:
        base: folder or Hub id of a 16- or 32-bit checkpoint.
        adapter: plain LoRA in PEFT's format.
        out: a new folder; it is complete or not there.
        overwrite: replace `out` where it exists and holds a model or the like (see `require_free`).
        allow_other_base: skip the check that the adapter was trained on this very base.
        dtype: of all floating-point tensors of the output; "keep" leaves every tensor in the base's.

    Raises:
        UserError: see `plan_merge`; a NaN or infinite value; a value beyond fp16's range; an output that exists, or
            that would replace the base or the adapter.
    """
    start = time.perf_counter()
    require_free(out, overwrite)
    plan = plan_merge(base, adapter, dtype, allow_other_base)
    require_apart(out, plan.base.path, plan.adapter.path)
    survival: dict[str, Survival] = {}
    with atomic_folder(out, overwrite) as folder, progress("merging", plan.base.nbytes) as advance:
        _write_shards(plan, folder, survival, advance)
        write_json(folder / "config.json", _config(plan, dtype))
        copied = copy_side_files(plan.base.path, folder)
        write_json(folder / SIDECAR, _provenance(plan, base))
    return MergeReport(
        output=str(out),
        merged_tensors=len(survival),
        untouched_tensors=len(plan.base.tensors) - len(survival),
        byte_identical=plan.byte_identical,
        survival=survival,
        side_files=tuple(copied),
        notes=plan.notes,
        seconds=time.perf_counter() - start,
        peak_memory=resident_peak(),
    )


def _write_shards(plan: MergePlan, folder: Path, survival: dict[str, Survival], advance: Advance) -> None:
    for shard in plan.base.shards:
        slots, metadata = plan.shards[shard.name], read_header(shard).metadata
        write_safetensors(
            folder / shard.name, slots, lambda slot, handle: _write(plan, slot, handle, survival, advance), metadata
        )
    index = plan.base.path / INDEX_NAME
    if index.is_file():
        stated = read_json(index).get("metadata")
        write_index(folder, plan.shards, stated if isinstance(stated, dict) else None)


def _write(plan: MergePlan, slot: Slot, handle: BinaryIO, survival: dict[str, Survival], advance: Advance) -> None:
    info, pair = plan.source(slot), plan.pairs.get(slot.name)
    if pair is not None:
        survival[slot.name] = _write_merged(info, pair, slot, handle)
    elif slot.dtype == info.dtype:
        copy_tensor(info, handle)
    else:
        for _, block in row_blocks(info, BLOCK_ELEMENTS):
            write_tensor(_rounded(read_tensor(block), slot), handle)
    advance(info.nbytes)


def _write_merged(info: TensorInfo, pair: LoraPair, slot: Slot, handle: BinaryIO) -> Survival:
    """Writes round(W + s B A) a block of rows at a time, and measures how much of the update the rounding left."""
    a, b = read_tensor(pair.a).float(), read_tensor(pair.b).float()
    squared_error = squared_update = 0.0
    unchanged = 0
    for rows, block in row_blocks(info, BLOCK_ELEMENTS):
        before = read_tensor(block).float()
        update = (b[rows] @ a).mul_(pair.scaling)
        after = _rounded(before + update, slot)
        write_tensor(after, handle)
        survived = after.float() - before
        squared_error += _sum_of_squares(survived - update)
        squared_update += _sum_of_squares(update)
        unchanged += survived.numel() - int(survived.count_nonzero())
    lost = (squared_error / squared_update) ** 0.5 if squared_update else 0.0
    return Survival(relative_error=lost, unchanged=unchanged / info.numel)


def _sum_of_squares(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2


def _rounded(values: torch.Tensor, slot: Slot) -> torch.Tensor:
    """`values` in the slot's dtype: the one rounding.

    Raises:
        UserError: something is not finite, before or after.
    """
    rounded = values.to(TORCH_DTYPE[slot.dtype])
    if not _is_finite(rounded):
        if _is_finite(values):
            what, fix = f"holds values beyond the range of {slot.dtype}", "Choose --dtype bfloat16 or float32"
        else:
            what, fix = "the result holds NaN or Inf", "Check base and adapter: one of them is damaged"
        raise UserError(f"{slot.name}: {what}", fix, EXIT_FINDING)
    return rounded


def _is_finite(values: torch.Tensor) -> bool:
    """Without the copies of `torch.isfinite`: NaN and Inf are extremes."""
    return not values.numel() or all(math.isfinite(extreme) for extreme in values.aminmax())


def _config(plan: MergePlan, dtype: MergeDtype) -> Config:
    """The base's config.json, edited: both spellings that readers look for, every other key as it was."""
    edited = with_both_spellings(plan.base.config)
    if dtype in FLOATS:
        edited["dtype"] = edited["torch_dtype"] = dtype
    return edited


def _provenance(plan: MergePlan, base: str | Path) -> dict[str, object]:
    """What the output was made of; names only, since paths of one machine mean nothing on another."""
    found, wanted = fingerprint(plan.base), plan.adapter.base_fingerprint
    return {
        "base_model": _base_name(plan, base, same=found == wanted),
        "base_fingerprint": found,
        "trained_on_this_base": None if wanted is None else found == wanted,
        "merged_onto": "32-bit" if any(plan.base.tensors[name].dtype == "F32" for name in plan.pairs) else "16-bit",
        "adapter": plan.adapter.path.resolve().name,
        "adapted_modules": len(plan.pairs),
        "untouched_tensors": len(plan.base.tensors) - len(plan.pairs),
        "ranks": sorted({pair.rank for pair in plan.pairs.values()}),
        "scalings": sorted({pair.scaling for pair in plan.pairs.values()}),
        "versions": {"qwen2tool": __version__, "torch": torch.__version__},
    }


def _base_name(plan: MergePlan, base: str | Path, *, same: bool) -> str:
    """A Hub id where one was given, or where the adapter names one for this very base; else the folder's own name."""
    named = str(plan.adapter.config.get("base_model_name_or_path") or "") if same else ""
    for name in (str(base), named):
        if HUB_ID.fullmatch(name) and not Path(name).exists():
            return name
    return plan.base.path.resolve().name
