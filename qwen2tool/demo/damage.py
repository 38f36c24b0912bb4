"""Copies of a checkpoint with some biases lost: the counter-example that every check of ours has to catch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal

from qwen2tool.checkpoint.folder import INDEX_NAME, open_checkpoint
from qwen2tool.checkpoint.header import TensorInfo, read_header
from qwen2tool.checkpoint.inventory import BIAS_NAME
from qwen2tool.checkpoint.raw import copy_tensor
from qwen2tool.checkpoint.writer import Slot, atomic_folder, copy_side_files, write_index, write_json, write_safetensors


def damaged_copy(
    source: Path,
    target: Path,
    lost: Callable[[int, str], bool],
    how: Literal["drop", "zero"] = "drop",
    overwrite: bool = False,
) -> int:
    """Copies the checkpoint at `source` to `target` without the biases for which `lost(layer, projection)` is true.

    Args:
        how: "drop" leaves the tensors out, as tools that know only `.weight` do; "zero" writes zeros, as transformers
            fills in for a dropped one that it then saves.

    Returns:
        The number of biases lost.
    """
    checkpoint = open_checkpoint(source)
    doomed = {name for name in checkpoint.tensors if (m := BIAS_NAME.fullmatch(name)) and lost(int(m[1]), m[2])}
    with atomic_folder(target, overwrite) as folder:
        shards: dict[str, list[Slot]] = {}
        for shard in checkpoint.shards:
            kept = {n: i for n, i in read_header(shard).tensors.items() if how == "zero" or n not in doomed}
            shards[shard.name] = [Slot(name=n, dtype=i.dtype, shape=i.shape) for n, i in kept.items()]
            write_safetensors(folder / shard.name, shards[shard.name], _writer(kept, doomed))
        if (source / INDEX_NAME).is_file():
            write_index(folder, shards)
        write_json(folder / "config.json", checkpoint.config)
        copy_side_files(source, folder)
    return len(doomed)


def _writer(infos: dict[str, TensorInfo], zeroed: set[str]) -> Callable[[Slot, BinaryIO], None]:
    def write(slot: Slot, handle: BinaryIO) -> None:
        if slot.name in zeroed:
            handle.write(bytes(slot.nbytes))
        else:
            copy_tensor(infos[slot.name], handle)

    return write
