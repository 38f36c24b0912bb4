"""A checkpoint, opened by its headers alone: which tensors it holds and where, checked against its index.

It is a folder of safetensors or of torch's .bin files, one such file, or a GGUF. Costs one small read a shard.
Structural damage (a missing or truncated shard, an index that disagrees with the files) is refused here, so that
everything behind it can trust `Checkpoint.tensors`. `remote.open_remote` does the same for a model on the Hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qwen2tool.checkpoint.from_shapes import config_from_shapes
from qwen2tool.checkpoint.geometry import Config, Geometry, geometry, read_config, read_json
from qwen2tool.checkpoint.header import Header, TensorInfo, read_header, refuse_dead_link
from qwen2tool.checkpoint.torch_file import read_torch_file
from qwen2tool.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
Format = Literal["safetensors", "bin", "gguf"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
ONE_OF_MANY = re.compile(r"-(\d{5,6})-of-(?P<count>\d{5,6})\.\w+$")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one format lies in a folder: the name of a lone file, that of an index of shards, and who reads a header."""

    format: Format
    single: str
    index: str
    read: Callable[[Path], Header]


SAFETENSORS = Layout(format="safetensors", single=SINGLE_NAME, index=INDEX_NAME, read=read_header)
BIN = Layout(format="bin", single="pytorch_model.bin", index="pytorch_model.bin.index.json", read=read_torch_file)
BY_SUFFIX = {".safetensors": SAFETENSORS, ".bin": BIN, ".pth": BIN, ".pt": BIN}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint. `tensors` is in file order; `leftovers` are weight files that nothing points to.

    `path` is the folder, the file, or owner/name for one on the Hub, where `commit` is set and no tensor can be read.
    """

    path: Path
    config: Config
    geometry: Geometry
    tensors: dict[str, TensorInfo]
    shards: tuple[Path, ...]
    leftovers: tuple[Path, ...]
    format: Format = "safetensors"
    index: Mapping[str, Any] | None = None
    """What the index of the shards says, where there is one."""
    assumed: tuple[str, ...] = ()
    """Sentences on what no file states and was taken for granted."""
    commit: str | None = None
    """The commit of a checkpoint on the Hub that is known by its headers alone."""
    side: Path | None = None
    """Where config, tokenizer and template lie, where that is not `path`."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes by shard name, of shards that are not here."""
    unread: Mapping[str, str] = field(default_factory=dict)
    """File name -> why it was not read, of side files that exist."""
    damaged: Mapping[str, str] = field(default_factory=dict)
    """Key of a GGUF's metadata -> why its text cannot be read, and what to do; a model is read without it at most."""

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def folder(self) -> Path:
        """Where side files such as the tokenizer are looked for."""
        return self.side or (self.path if self.path.is_dir() else self.path.parent)

    def size_of(self, shard: Path) -> int:
        """Bytes of a shard, wherever it is."""
        known = self.sizes.get(shard.name)
        return shard.stat().st_size if known is None else known


def resolve(name: str | Path, revision: str | None = None) -> Path:
    """The local folder or file of a checkpoint that is named by a path or by a Hub id (downloaded into its cache).

    Raises:
        UserError: it is neither, or `revision` is given for a path.
    """
    path = Path(name).expanduser()
    if path.exists():
        if revision is not None:
            raise UserError(f"{path}: is here, and has no revision {revision!r}", "Leave the revision out")
        return path
    if not HUB_ID.fullmatch(str(name)):
        raise UserError(f"{name}: no such file or folder", "Check the path, or name a Hub model as owner/name")
    from qwen2tool.checkpoint.remote import download, in_one_sentence

    with in_one_sentence(str(name), revision):
        return download(str(name), revision)


def open_checkpoint(name: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Opens the checkpoint at `name`: a folder, a .safetensors, .bin, .pth or .gguf file, or a Hub id (downloaded).

    Raises:
        UserError: not a checkpoint, a damaged file, or an index that disagrees with the shards.
    """
    path = resolve(name, revision)
    return _open_folder(path) if path.is_dir() else _open_file(path)


def require_safetensors(checkpoint: Checkpoint) -> None:
    """Passes a folder of safetensors, which is what training, merging and pushing work on.

    Raises:
        UserError: it is stored as anything else.
    """
    if checkpoint.format != "safetensors" or not checkpoint.path.is_dir():
        stored = checkpoint.format if checkpoint.format != "safetensors" else "a single file"
        raise UserError(
            f"{checkpoint.path}: stored as {stored}; this needs a folder of safetensors",
            f"Make one with `qwen2tool convert {checkpoint.path} OUT`, and use that",
        )


def _open_folder(path: Path) -> Checkpoint:
    layout = next((it for it in (SAFETENSORS, BIN) if any((path / n).is_file() for n in (it.index, it.single))), None)
    if layout is None and (lone := _lone_gguf(path)):
        return _open_gguf(lone)
    if layout is None and (path / "adapter_config.json").is_file():
        raise UserError(f"{path}: a PEFT adapter, not a whole checkpoint", "Name its base model")
    config = read_config(path)
    if layout is None:
        _refuse_links_to_nothing(path)
        _refuse_shards_without_index(path)
        raise UserError(
            f"{path}: not a checkpoint (no {SINGLE_NAME}, no {INDEX_NAME}, no .bin, no .gguf)",
            "Name a folder with the weights in it",
        )
    index = read_json(path / layout.index) if (path / layout.index).is_file() else None
    if index is None:
        names: tuple[str, ...] = (layout.single,)
        tensors = layout.read(path / layout.single).tensors
    else:
        present = {file.name for file in path.iterdir() if file.is_file()}
        try:
            names = shard_names(path, layout, index, present, f"Download it into {path}")
        except UserError:
            _refuse_links_to_nothing(path)
            raise
        tensors = join(path / layout.index, index, {name: layout.read(path / name) for name in names})
    shards = tuple(path / name for name in names)
    found = {*path.glob("*.safetensors"), *(path.glob("pytorch_model*.bin") if layout is BIN else ())}
    return Checkpoint(
        path=path,
        config=config,
        geometry=geometry(config),
        tensors=tensors,
        shards=shards,
        leftovers=tuple(sorted(found - set(shards))),
        format=layout.format,
        index=index,
    )


def _refuse_links_to_nothing(path: Path) -> None:
    """Of a folder's weights, whatever layout they are."""
    for file in sorted(path.iterdir()):
        if file.suffix in BY_SUFFIX:
            refuse_dead_link(file)


def _refuse_shards_without_index(path: Path) -> None:
    """Shards that nothing lists are a download that is not finished: which tensors belong there, nobody can tell."""
    for layout in (SAFETENSORS, BIN):
        suffix = Path(layout.single).suffix
        if shards := sorted(file.name for file in path.glob(f"*{suffix}") if ONE_OF_MANY.search(file.name)):
            raise UserError(f"{path}: holds {shards[0]}, but no {layout.index}", f"Download {layout.index} as well")


def _open_file(path: Path) -> Checkpoint:
    if path.suffix == ".gguf":
        return _open_gguf(path)
    layout = BY_SUFFIX.get(path.suffix)
    if layout is None:
        raise UserError(
            f"{path}: not a folder, nor a kind of file that holds a checkpoint",
            "Name the folder with config.json and the shards, or a .safetensors, .bin, .pth or .gguf file",
        )
    _refuse_one_of_many(path)
    tensors = layout.read(path).tensors
    if any(name.startswith("base_model.model.") for name in tensors):
        raise UserError(f"{path}: a PEFT adapter, not a whole checkpoint", "Name the adapter's folder")
    assumed: tuple[str, ...] = ()
    if (path.parent / "config.json").is_file():
        config = read_config(path.parent)
    else:
        config, assumed = config_from_shapes(path, tensors)
    return Checkpoint(
        path=path,
        config=config,
        geometry=geometry(config),
        tensors=tensors,
        shards=(path,),
        leftovers=(),
        format=layout.format,
        assumed=assumed,
    )


def _refuse_one_of_many(path: Path) -> None:
    """A shard alone would be reported as a model that lost most of its tensors."""
    numbered = ONE_OF_MANY.search(path.name)
    if numbered and int(numbered["count"]) > 1:
        raise UserError(f"{path}: one of {int(numbered['count'])} shards", "Name the folder that holds all of them")


def _lone_gguf(path: Path) -> Path | None:
    """The only GGUF in a folder, or the first part of the only one."""
    files = sorted(path.glob("*.gguf"))
    if len({ONE_OF_MANY.sub("", file.name) for file in files}) > 1:
        names = ", ".join(file.name for file in files[:3])
        raise UserError(f"{path}: holds {len(files)} .gguf files ({names} ...)", "Name the file that you mean")
    return files[0] if files else None


def _open_gguf(path: Path) -> Checkpoint:
    from qwen2tool.checkpoint.gguf_file import open_gguf

    return open_gguf(path)


def _is_file_name(value: object) -> bool:
    """Whether `value` names a file in the folder itself, not a path that leads elsewhere."""
    return isinstance(value, str) and value.isprintable() and Path(value).name == value not in ("", "..")


def shard_names(
    path: Path, layout: Layout, index: Mapping[str, Any], present: Collection[str], remedy: str
) -> tuple[str, ...]:
    """The shards that `index` names, sorted; `present` are the names of the files beside it.

    Raises:
        UserError: no usable weight_map, a shard that is not there (with `remedy`), or a lone file as well.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
        raise UserError(f"{path / layout.index}: no usable weight_map", "Copy the index again from where it came from")
    names = tuple(sorted(set(weight_map.values())))
    if layout.single in present and names != (layout.single,):
        raise UserError(
            f"{path}: holds {layout.single} and an index of other shards; transformers would read the former only",
            "Move away the one that does not belong to this checkpoint",
        )
    for tensor, name in weight_map.items():
        if name not in present:
            raise UserError(f"{path / layout.index}: names shard {name} (for {tensor}), which is not there", remedy)
    return names


def join(index_file: Path, index: Mapping[str, Any], headers: Mapping[str, Header]) -> dict[str, TensorInfo]:
    """All tensors of the shards in `headers`, in their order, if index and shards say the same of each.

    Raises:
        UserError: a tensor that only one side knows, or that lies in another shard.
    """
    weight_map = index["weight_map"]
    tensors: dict[str, TensorInfo] = {}
    for shard, header in headers.items():
        for name, info in header.tensors.items():
            if weight_map.get(name) != shard:
                known = name in weight_map
                where = f"the index puts it in {weight_map[name]}" if known else "the index does not know it"
                raise UserError(
                    f"{index_file.parent / shard}: holds tensor {name}, but {where}",
                    "Get shards and index of one and the same upload",
                )
            tensors[name] = info
    for name, file in weight_map.items():
        if name not in tensors:
            raise UserError(
                f"{index_file}: says that {name} is in {file}, which does not hold it",
                "Get shards and index of one and the same upload",
            )
    return tensors
