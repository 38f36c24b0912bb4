"""Merging, tensor by tensor: W' = round(W + scaling * B A), computed in fp32 with one rounding at the end.

Peak memory is the largest tensor in its own dtype and a few blocks of rows in fp32, whatever the size of the model.
What no pair touches is copied byte for byte. The result is byte-identical to PEFT's `merge_and_unload` for plain LoRA
with fp32 adapters.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from qwen2tool import __version__
from qwen2tool.checkpoint.adapter import LoraPair, fingerprint
from qwen2tool.checkpoint.folder import HUB_ID, INDEX_NAME
from qwen2tool.checkpoint.geometry import Config, with_both_spellings
from qwen2tool.checkpoint.reader import TORCH_DTYPE, copy_tensor, read_tensor, write_tensor
from qwen2tool.checkpoint.writer import (
    Slot,
    atomic_folder,
    copy_side_files,
    require_free,
    write_index,
    write_json,
    write_safetensors,
)
from qwen2tool.console import Advance, progress
from qwen2tool.errors import EXIT_FINDING, UserError
from qwen2tool.merge.plan import FLOATS, MergeDtype, MergePlan, plan_merge
from qwen2tool.merge.report import MergeReport, Survival

SIDECAR = "qwen2tool_merge.json"
BLOCK_ELEMENTS = 1 << 24
"""Elements of a matrix that are held in fp32 at a time: 64 MB a copy."""


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
        overwrite: replace `out` where it exists.
        allow_other_base: skip the check that the adapter was trained on this very base.
        dtype: of all floating-point tensors of the output; "keep" leaves every tensor in the base's.

    Raises:
        UserError: see `plan_merge`; a NaN or infinite value; a value beyond fp16's range; an output that exists.
    """
    start = time.perf_counter()
    require_free(out, overwrite)
    plan = plan_merge(base, adapter, dtype, allow_other_base)
    survival: dict[str, Survival] = {}
    with atomic_folder(out, overwrite) as folder, progress("merging", plan.base.nbytes) as advance:
        for name, slots in plan.shards.items():
            write_safetensors(folder / name, slots, lambda slot, handle: _write(plan, slot, handle, survival, advance))
        if (plan.base.path / INDEX_NAME).is_file():
            write_index(folder, plan.shards)
        write_json(folder / "config.json", _config(plan, dtype))
        copied = copy_side_files(plan.base.path, folder)
        write_json(folder / SIDECAR, _provenance(plan))
    return MergeReport(
        output=str(out),
        merged_tensors=len(survival),
        untouched_tensors=len(plan.base.tensors) - len(survival),
        byte_identical=dtype == "keep",
        survival=survival,
        side_files=tuple(copied),
        notes=plan.notes,
        seconds=time.perf_counter() - start,
        peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _write(plan: MergePlan, slot: Slot, handle: BinaryIO, survival: dict[str, Survival], advance: Advance) -> None:
    info, pair = plan.source(slot), plan.pairs.get(slot.name)
    if pair is None and slot.dtype == info.dtype:
        copy_tensor(info, handle)
    elif pair is None:
        write_tensor(_rounded(read_tensor(info), slot), handle)
    else:
        survival[slot.name] = _write_merged(read_tensor(info), pair, slot, handle)
    advance(info.nbytes)


def _write_merged(weight: torch.Tensor, pair: LoraPair, slot: Slot, handle: BinaryIO) -> Survival:
    """Writes round(W + s B A) a block of rows at a time, and measures how much of the update the rounding left."""
    a, b = read_tensor(pair.a).float(), read_tensor(pair.b).float()
    for side, matrix in (("A", a), ("B", b)):
        if not torch.isfinite(matrix).all():
            raise UserError(
                f"{pair.a.file}: lora_{side} of {pair.module} holds NaN or Inf", "Train it again", EXIT_FINDING
            )
    squared_error = squared_update = 0.0
    unchanged = 0
    for rows in _row_blocks(weight):
        before = weight[rows].float()
        update = (b[rows] @ a) * pair.scaling
        after = _rounded(before + update, slot)
        write_tensor(after, handle)
        survived = after.float() - before
        squared_error += (survived - update).double().square().sum().item()
        squared_update += update.double().square().sum().item()
        unchanged += int((survived == 0).sum())
    lost = (squared_error / squared_update) ** 0.5 if squared_update else 0.0
    return Survival(relative_error=lost, unchanged=unchanged / weight.numel())


def _row_blocks(weight: torch.Tensor) -> Iterator[slice]:
    height = max(1, BLOCK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], height):
        yield slice(start, start + height)


def _rounded(values: torch.Tensor, slot: Slot) -> torch.Tensor:
    """`values` in the slot's dtype: the one rounding.

    Raises:
        UserError: something is not finite, before or after.
    """
    rounded = values.to(TORCH_DTYPE[slot.dtype])
    if rounded.is_floating_point() and not torch.isfinite(rounded).all():
        if torch.isfinite(values).all():
            what, fix = f"holds values beyond the range of {slot.dtype}", "Choose --dtype bfloat16 or float32"
        else:
            what, fix = "the result holds NaN or Inf", "Check base and adapter: one of them is damaged"
        raise UserError(f"{slot.name}: {what}", fix, EXIT_FINDING)
    return rounded


def _config(plan: MergePlan, dtype: MergeDtype) -> Config:
    """The base's config.json, edited: both spellings that readers look for, every other key as it was."""
    edited = with_both_spellings(plan.base.config)
    if dtype in FLOATS:
        edited["dtype"] = edited["torch_dtype"] = dtype
    return edited


def _portable_name(name: str) -> str:
    """A Hub id as it is, of a local path only the last part."""
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else Path(name).name


def _provenance(plan: MergePlan) -> dict[str, object]:
    """What the output was made of; names only, since paths of one machine mean nothing on another."""
    scalings = sorted({pair.scaling for pair in plan.pairs.values()})
    return {
        "base_model": _portable_name(str(plan.adapter.config.get("base_model_name_or_path") or plan.base.path)),
        "base_fingerprint": fingerprint(plan.base),
        "merged_onto": "16-bit",
        "adapter": plan.adapter.path.name,
        "adapted_modules": len(plan.pairs),
        "ranks": sorted({pair.rank for pair in plan.pairs.values()}),
        "scalings": scalings,
        "versions": {"qwen2tool": __version__, "torch": torch.__version__},
    }
