"""What a merge will do to every tensor of the base, checked before anything is written.

The plan is data: tensor name -> the pair that changes it, or none. Every pair of the adapter must be taken up exactly
once; a pair that matches nothing would be a part of the training silently lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from qwen2tool.checkpoint.adapter import Adapter, LoraPair, open_adapter, require_fit
from qwen2tool.checkpoint.folder import Checkpoint, open_checkpoint, require_safetensors
from qwen2tool.checkpoint.geometry import read_json
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.checkpoint.inventory import require_whole
from qwen2tool.checkpoint.reader import read_tensor
from qwen2tool.checkpoint.writer import SIDE_FILES, Slot
from qwen2tool.errors import EXIT_FINDING, UserError

MergeDtype = Literal["keep", "float32", "float16", "bfloat16"]
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
TEMPLATE_FILE = "chat_template.jinja"


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

    @property
    def byte_identical(self) -> bool:
        """Whether every tensor without an update is copied as it is."""
        slots = (slot for shard in self.shards.values() for slot in shard)
        return all(slot.name in self.pairs or slot.dtype == self.source(slot).dtype for slot in slots)


def plan_merge(base: str | Path, adapter: Path, dtype: MergeDtype, allow_other_base: bool) -> MergePlan:
    """Opens both sides and checks that they belong together; reads the adapter's values once, the base's not at all.

    Raises:
        UserError: a base that is not whole or is quantised, an adapter that is no plain LoRA, does not fit, or holds
            NaN or Inf.
    """
    checkpoint, opened = open_checkpoint(base), open_adapter(adapter)
    if checkpoint.geometry.quantization is not None:
        raise UserError(
            f"{checkpoint.path}: is quantised (config.json has quantization_config)",
            "Merge onto the 16-bit checkpoint that it was made from",
        )
    require_safetensors(checkpoint)
    require_whole(checkpoint)
    require_fit(opened, checkpoint, allow_other_base)
    pairs = {f"{module}.weight": pair for module, pair in opened.pairs.items()}
    _require_floats(checkpoint, pairs)
    shards: dict[str, list[Slot]] = {shard.name: [] for shard in checkpoint.shards}
    for info in checkpoint.tensors.values():
        shards[info.file.name].append(Slot(name=info.name, dtype=_output_dtype(info, dtype), shape=info.shape))
    notes = (*_value_notes(opened), *_origin_notes(opened), *_file_notes(checkpoint.path, opened.path))
    return MergePlan(base=checkpoint, adapter=opened, shards=shards, pairs=pairs, notes=notes)


def _require_floats(base: Checkpoint, pairs: dict[str, LoraPair]) -> None:
    for name in pairs:
        if base.tensors[name].dtype not in FLOATS.values():
            raise UserError(
                f"{base.path}: {name} is stored as {base.tensors[name].dtype}, too coarse for an update",
                "Merge onto the 16-bit checkpoint that it was made from",
            )


def _output_dtype(info: TensorInfo, dtype: MergeDtype) -> str:
    """A position table that old savers wrote (rotary_emb.inv_freq) needs its fp32 and stays as it is."""
    if dtype == "keep" or info.dtype not in FLOATS.values() or info.name.endswith("rotary_emb.inv_freq"):
        return info.dtype
    return FLOATS[dtype]


def _value_notes(adapter: Adapter) -> list[str]:
    """Refuses what is not finite; says so where pairs change nothing (B starts at zero and was never trained)."""
    idle = 0
    for pair in adapter.pairs.values():
        sides = read_tensor(pair.a), read_tensor(pair.b)
        for info, matrix in zip((pair.a, pair.b), sides, strict=True):
            if not torch.isfinite(matrix).all():
                raise UserError(f"{info.file}: {info.name} holds NaN or Inf", "Train the adapter again", EXIT_FINDING)
        idle += not all(matrix.any() for matrix in sides)
    if idle == len(adapter.pairs):
        return ["the adapter changes nothing: A or B of every pair is all zero"]
    return [f"{idle} of {len(adapter.pairs)} pairs change nothing: A or B is all zero"] if idle else []


def _origin_notes(adapter: Adapter) -> list[str]:
    if adapter.base_fingerprint is None:
        return ["the adapter does not say which base it was trained on; only shapes could be checked"]
    return []


def _file_notes(base: Path, adapter: Path) -> list[str]:
    """What the adapter's folder brings beside its weights; the base's is kept in any case, and it is said."""
    notes = []
    for name in SIDE_FILES:
        mine, theirs = base / name, adapter / name
        if name in ("LICENSE", TEMPLATE_FILE) or not theirs.is_file():
            continue
        if not mine.is_file():
            notes.append(f"{name} of the adapter is left out: the base has none")
        elif mine.read_bytes() != theirs.read_bytes():
            notes.append(f"{name} of the adapter differs from the base's; the base's is kept")
    template = _template(adapter)
    if template is not None and template != _template(base):
        notes.append("the chat template of the adapter differs from the base's; the base's is kept")
    return notes


def _template(folder: Path) -> object:
    """The chat template: a file of its own in new folders, a key of tokenizer_config.json in older ones."""
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8", errors="replace")
    settings = folder / "tokenizer_config.json"
    return read_json(settings).get("chat_template") if settings.is_file() else None
