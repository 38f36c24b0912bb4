"""A checkpoint folder, opened by its headers alone: which tensors it holds and where, checked against its index.

Costs one small read a shard. Structural damage (a missing or truncated shard, an index that disagrees with the files)
is refused here, so that everything behind it can trust `Checkpoint.tensors`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen2tool.checkpoint.geometry import Config, Geometry, geometry, read_config, read_json
from qwen2tool.checkpoint.header import TensorInfo, read_header
from qwen2tool.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
Format = Literal["safetensors", "bin", "gguf"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened folder. `tensors` is in file order; `leftovers` are weight files that nothing points to."""

    path: Path
    config: Config
    geometry: Geometry
    tensors: dict[str, TensorInfo]
    shards: tuple[Path, ...]
    leftovers: tuple[Path, ...]
    format: Format = "safetensors"

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())


def resolve(name: str | Path, revision: str | None = None) -> Path:
    """The local folder of a checkpoint that is named by a path or by a Hub id (downloaded into the Hub's cache).

    Raises:
        UserError: it is neither.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not HUB_ID.fullmatch(str(name)):
        raise UserError(f"{name}: no such file or folder", "Check the path, or name a Hub model as owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                str(name), revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "LICENSE*"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise UserError(
            f"{name}: no such folder here, and the Hub gave no such model ({reason})",
            "Check the spelling, your network and, for a gated model, `hf auth login`",
        ) from None


def open_checkpoint(name: str | Path) -> Checkpoint:
    """Opens the safetensors checkpoint at `name` (a folder, or a Hub id).

    Raises:
        UserError: not a checkpoint, a damaged file, or an index that disagrees with the shards.
    """
    path = resolve(name)
    if not path.is_dir():
        raise UserError(f"{path}: not a folder", "Name the folder that holds config.json and the shards")
    config = read_config(path)
    index = path / INDEX_NAME
    if index.is_file():
        shards, tensors = _read_indexed(path, read_json(index))
    elif (path / SINGLE_NAME).is_file():
        shards, tensors = (path / SINGLE_NAME,), read_header(path / SINGLE_NAME).tensors
    else:
        raise UserError(_nothing_there(path), "Name a folder with model.safetensors or its index")
    found = set(path.glob("*.safetensors")) - set(shards)
    return Checkpoint(
        path=path,
        config=config,
        geometry=geometry(config),
        tensors=tensors,
        shards=shards,
        leftovers=tuple(sorted(found)),
    )


def _nothing_there(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return f"{path}: a PEFT adapter, not a whole checkpoint"
    if any(path.glob("pytorch_model*.bin")):
        return f"{path}: a .bin checkpoint, which can run code when it is read"
    return f"{path}: not a checkpoint (no {SINGLE_NAME}, no {INDEX_NAME})"


def _is_file_name(value: object) -> bool:
    """Whether `value` names a file in the folder itself, not a path that leads elsewhere."""
    return isinstance(value, str) and value.isprintable() and Path(value).name == value not in ("", "..")


def _read_indexed(path: Path, index: dict[str, object]) -> tuple[tuple[Path, ...], dict[str, TensorInfo]]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
        raise UserError(f"{path / INDEX_NAME}: no usable weight_map", "Copy the index again from where it came from")
    shards = tuple(path / name for name in sorted(set(weight_map.values())))
    present = {file.name for file in path.iterdir() if file.is_file()}
    if SINGLE_NAME in present and shards != (path / SINGLE_NAME,):
        raise UserError(
            f"{path}: holds {SINGLE_NAME} and an index of other shards; transformers would read the former only",
            "Move away the one that does not belong to this checkpoint",
        )
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        if shard.name not in present:
            first = next(name for name, file in weight_map.items() if file == shard.name)
            raise UserError(
                f"{path / INDEX_NAME}: names shard {shard.name} (for {first}), which is not there",
                f"Download {shard.name} into {path}",
            )
        for name, info in read_header(shard).tensors.items():
            if weight_map.get(name) != shard.name:
                where = (
                    f"the index puts it in {weight_map[name]}" if name in weight_map else "the index does not know it"
                )
                raise UserError(
                    f"{shard}: holds tensor {name}, but {where}", "Get shards and index of one and the same upload"
                )
            tensors[name] = info
    for name, file in weight_map.items():
        if name not in tensors:
            raise UserError(
                f"{path / INDEX_NAME}: says that {name} is in {file}, which does not hold it",
                "Get shards and index of one and the same upload",
            )
    return shards, tensors
