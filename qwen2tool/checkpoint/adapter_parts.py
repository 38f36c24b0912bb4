"""The tensors of any PEFT LoRA adapter, sorted by what they are: pairs, and whatever variants of LoRA add.

`adapter.open_adapter` takes plain LoRA and refuses the rest, as a merge must. Here nothing is refused that can be
shown: a report on a DoRA adapter is of use to somebody who wants to know why it does not merge. Names as PEFT saves
them; an adapter's own name inside them (`lora_A.default.weight`, written by old versions) is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import inf, sqrt
from pathlib import Path
from typing import Any, Literal

from qwen2tool.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_FILE, PREFIX, PROVENANCE_FILE, by_pattern
from qwen2tool.checkpoint.folder import INDEX_NAME, SINGLE_NAME
from qwen2tool.checkpoint.geometry import read_json
from qwen2tool.checkpoint.header import TensorInfo, read_header
from qwen2tool.checkpoint.tolerate import Damaged, is_there, tolerate
from qwen2tool.checkpoint.torch_file import read_torch_file
from qwen2tool.errors import UserError

ADAPTER_BIN = "adapter_model.bin"
Kind = Literal["lora", "embedding", "magnitude", "lora_bias", "bias", "tokens", "full", "other"]
KINDS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("lora", re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.[\w-]+)?\.weight")),
    ("embedding", re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(\.[\w-]+)?")),
    ("magnitude", re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.[\w-]+)?(\.weight)?")),
    ("lora_bias", re.compile(r"(?P<module>.+)\.lora_[AB](\.[\w-]+)?\.bias")),
    ("tokens", re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(\.[\w-]+)?")),
    ("bias", re.compile(r"(?P<module>.+?)(\.base_layer)?\.bias")),
    ("full", re.compile(r"(?P<module>(?!.*lora_).+?)(\.base_layer|\.modules_to_save(\.[\w-]+)?)?\.weight")),
)
LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,5})\.")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor: what it is, of which module (as the base names it), and for a LoRA matrix which side."""

    kind: Kind
    module: str
    side: str
    info: TensorInfo

    @property
    def target(self) -> str:
        return self.module.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        found = LAYER.search(self.module)
        return int(found[1]) if found else None


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """An adapter folder as it lies there; nothing of it has been judged."""

    path: Path
    file: Path
    config: dict[str, Any]
    parts: tuple[Part, ...]
    provenance: dict[str, Any]
    """What our trainer wrote beside it; empty where another tool did."""
    damaged: Damaged
    """Files beside it that cannot be read."""


def is_adapter(path: str | Path) -> bool:
    """Whether `path` is a PEFT adapter: a folder with its config and no whole checkpoint, or the weights in one."""
    folder = _folder(Path(path).expanduser())
    whole = any((folder / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))
    return (folder / ADAPTER_CONFIG).is_file() and not whole


def _folder(path: Path) -> Path:
    return path.parent if path.name in (ADAPTER_FILE, ADAPTER_BIN) else path


def open_parts(path: str | Path) -> AdapterFiles:
    """Reads config and headers of the adapter at `path` (its folder, or the weights in it).

    Raises:
        UserError: no adapter there, or a damaged file.
    """
    folder = _folder(Path(path).expanduser())
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{folder}: not a PEFT adapter (no {ADAPTER_CONFIG})", "Name the folder that training wrote")
    config = read_json(folder / ADAPTER_CONFIG)
    file = next((folder / name for name in (ADAPTER_FILE, ADAPTER_BIN) if (folder / name).is_file()), None)
    if file is None:
        raise UserError(
            f"{folder}: an {ADAPTER_CONFIG}, but no weights ({ADAPTER_FILE} or {ADAPTER_BIN})",
            "Copy the adapter again from where it came from",
        )
    tensors = (read_header(file) if file.name == ADAPTER_FILE else read_torch_file(file)).tensors
    damaged: Damaged = {}
    stated = folder / PROVENANCE_FILE
    provenance = tolerate(read_json, stated, damaged) if is_there(stated) else None
    parts = tuple(_part(info) for info in tensors.values())
    return AdapterFiles(
        path=folder, file=file, config=config, parts=parts, provenance=provenance or {}, damaged=damaged
    )


def _part(info: TensorInfo) -> Part:
    name = info.name.removeprefix(PREFIX)
    for kind, pattern in KINDS:
        match = pattern.fullmatch(name)
        if match:
            groups = match.groupdict()
            return Part(kind=kind, module=groups["module"], side=groups.get("side", ""), info=info)
    return Part(kind="other", module=name, side="", info=info)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Rank, alpha and scaling of a module as the config says; None where it says nothing usable."""

    rank: float | None
    alpha: float | None
    scaling: float | None


def scale_of(config: dict[str, Any], module: str) -> Scale:
    """PEFT's scaling of `module`: alpha / rank, or alpha / sqrt(rank) with rsLoRA; patterns first."""
    rank = _setting(config, module, "r", "rank_pattern")
    alpha = _setting(config, module, "lora_alpha", "alpha_pattern")
    if rank is None or alpha is None:
        return Scale(rank=rank, alpha=alpha, scaling=None)
    return Scale(rank=rank, alpha=alpha, scaling=alpha / (sqrt(rank) if config.get("use_rslora") else rank))


def _setting(config: dict[str, Any], module: str, key: str, patterns: str) -> float | None:
    try:
        value = by_pattern(config.get(patterns), module, config.get(key))
    except (AttributeError, TypeError, re.error):
        return None
    usable = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < inf
    return value if usable and value < 1e9 else None
