"""What a merge will do to every tensor of the base, checked before anything is written.

The plan is data: tensor name -> the pair that changes it, or none. Every pair of the adapter must be taken up exactly
once; a pair that matches nothing would be a part of the training silently lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen2tool.checkpoint.adapter import Adapter, LoraPair, open_adapter, require_fit
from qwen2tool.checkpoint.folder import Checkpoint, open_checkpoint
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.checkpoint.inventory import require_whole
from qwen2tool.checkpoint.writer import SIDE_FILES, Slot
from qwen2tool.errors import UserError

MergeDtype = Literal["keep", "float32", "float16", "bfloat16"]
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """Base, adapter, and for every shard its slots in file order; `pairs` maps a weight's name to what changes it."""

    base: Checkpoint
    adapter: Adapter
    shards: dict[str, list[Slot]]
    pairs: dict[str, LoraPair]
    notes: tuple[str, ...]

    def source(self, slot: Slot) -> TensorInfo:
        """Where the base holds a slot."""
        return self.base.tensors[slot.name]


def plan_merge(base: str | Path, adapter: Path, dtype: MergeDtype, allow_other_base: bool) -> MergePlan:
    """Opens both sides and checks that they belong together.

    Raises:
        UserError: a base that is not whole or is quantised, an adapter that is no plain LoRA or does not fit.
    """
    checkpoint, opened = open_checkpoint(base), open_adapter(adapter)
    if checkpoint.geometry.quantization is not None:
        raise UserError(f"{checkpoint.path}: is quantised", "Merge onto the 16-bit checkpoint that it was made from")
    require_whole(checkpoint)
    require_fit(opened, checkpoint, allow_other_base)
    shards: dict[str, list[Slot]] = {shard.name: [] for shard in checkpoint.shards}
    for name, info in checkpoint.tensors.items():
        wanted = info.dtype if dtype == "keep" or info.dtype not in FLOATS.values() else FLOATS[dtype]
        shards[info.file.name].append(Slot(name=name, dtype=wanted, shape=info.shape))
    pairs = {f"{module}.weight": pair for module, pair in opened.pairs.items()}
    return MergePlan(base=checkpoint, adapter=opened, shards=shards, pairs=pairs, notes=_notes(checkpoint, opened))


def _notes(base: Checkpoint, adapter: Adapter) -> tuple[str, ...]:
    """Files that adapter and base both bring and that differ: the base's are kept, and it is said."""
    differing = [
        name
        for name in SIDE_FILES
        if name != "LICENSE"
        and (adapter.path / name).is_file()
        and (base.path / name).is_file()
        and (adapter.path / name).read_bytes() != (base.path / name).read_bytes()
    ]
    notes = [f"{name} of the adapter differs from the base's; the base's is kept" for name in differing]
    if adapter.base_fingerprint is None:
        notes.append("the adapter does not say which base it was trained on; only shapes could be checked")
    return tuple(notes)
