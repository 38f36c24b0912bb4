"""What a push would send, decided and checked before a single request: the plan is the dry run.

A folder that a run wrote holds more than a model: optimizer states, logs, `.env`. So files are taken by an allow-list,
and what stays behind is named. Everything that can be wrong locally is refused here; `push` sends exactly the plan.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from qwen2tool.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_FILE, open_adapter
from qwen2tool.checkpoint.folder import INDEX_NAME, SINGLE_NAME, Checkpoint, open_checkpoint, require_safetensors
from qwen2tool.checkpoint.geometry import read_json
from qwen2tool.checkpoint.header import read_header
from qwen2tool.checkpoint.inventory import require_whole
from qwen2tool.checkpoint.writer import SIDE_FILES
from qwen2tool.errors import EXIT_FINDING, UserError
from qwen2tool.hub import card as cards
from qwen2tool.hub.origin import (
    LICENSE_FILES,
    SIDECARS,
    as_hub_id,
    local_paths,
    read_sidecars,
    stated_base,
    stated_license,
)
from qwen2tool.hub.values import check_adapter, check_biases

Kind = Literal["model", "adapter"]
CARD_NAME = "README.md"
EXTRA_FILES = (*SIDE_FILES, *SIDECARS, *LICENSE_FILES[1:], "NOTICE")
"""What is sent beside weights, config and card where the folder has it."""


REPO_ID = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
"""huggingface_hub's own rule, but that the owner must be named."""


class PlannedFile(NamedTuple):
    """One file of the upload; `path` is None for a generated card, whose text is `PushPlan.card`."""

    name: str
    size: int
    path: Path | None


class StoredTensor(NamedTuple):
    """What a header says of a tensor, here and, after the push, on the Hub."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PushPlan:
    """An upload that passed every local check. `tensors` maps each weight file to its tensors by name."""

    path: Path
    repo_id: str
    kind: Kind
    files: tuple[PlannedFile, ...]
    card: str
    notes: tuple[str, ...]
    tensors: dict[str, dict[str, StoredTensor]]

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)


def plan_push(path: Path, repo_id: str, *, card: Path | None = None) -> PushPlan:
    """Checks the checkpoint or adapter at `path` and lists what `push` would send to `repo_id`; sends nothing.

    Cost: one small read a weight file, plus all biases and norms (a checkpoint) or all matrices (an adapter).

    Args:
        path: a folder with a whole checkpoint or a PEFT LoRA adapter.
        repo_id: owner/name.
        card: a Markdown file to use as README.md instead of the folder's own or a generated one.

    Raises:
        UserError: a bad repo id, a folder that is neither, or a model that must not be published (see `values`,
            `require_whole`), no tokenizer, weight files that nothing points to, or a card that the Hub rejects.
    """
    require_repo_id(repo_id)
    kind = _kind(path)
    base = stated_base(path)
    base_id = as_hub_id(base, path) if base else None
    origin = cards.Origin(base=base_id, license=stated_license(path), sidecars=read_sidecars(path))
    weights, generated, notes = (_model if kind == "model" else _adapter)(path, repo_id, origin)
    text, source, card_notes = _choose_card(path, card, generated)
    if source is None:
        card_notes += _origin_notes(base, origin)
    names = [*weights, "config.json" if kind == "model" else ADAPTER_CONFIG, *EXTRA_FILES]
    files = [PlannedFile(n, (path / n).stat().st_size, path / n) for n in names if (path / n).is_file()]
    files.append(PlannedFile(CARD_NAME, len(text.encode()), source))
    sent = {file.name for file in files}
    return PushPlan(
        path=path,
        repo_id=repo_id,
        kind=kind,
        files=tuple(files),
        card=text,
        notes=(*notes, *card_notes, *_path_notes(path, sent), *_not_sent(path, sent)),
        tensors={name: _stored(path / name) for name in weights if name != INDEX_NAME},
    )


def require_repo_id(repo_id: str) -> None:
    """Passes owner/name by the Hub's own rules.

    Raises:
        UserError: no owner, characters that no repo id has, or a part of over 96 characters.
    """
    if REPO_ID.fullmatch(repo_id) is None:
        raise UserError(
            f"{repo_id!r} is no Hub repo id",
            "Name it as owner/name: letters, digits and single - or . between them, at most 96 characters each",
        )


def _kind(path: Path) -> Kind:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder", "Name the folder of a checkpoint or an adapter")
    if not (path / ADAPTER_CONFIG).is_file():
        return "model"
    if any((path / name).is_file() for name in ("config.json", SINGLE_NAME, INDEX_NAME)):
        raise UserError(
            f"{path}: holds a checkpoint and {ADAPTER_CONFIG}: transformers would load the adapter on top of it",
            "Keep the two in folders of their own and push each to its own repo",
        )
    return "adapter"


def _model(path: Path, repo_id: str, origin: cards.Origin) -> tuple[list[str], str, list[str]]:
    """Weight files, card and notes of a checkpoint that passes."""
    checkpoint = open_checkpoint(path)
    require_safetensors(checkpoint)
    require_whole(checkpoint)
    _require_tidy(checkpoint)
    norms = check_biases(checkpoint)
    notes = [f"{n.zeros} of {n.count} {projection} biases are all zero" for projection, n in norms.items() if n.zeros]
    weights = [shard.name for shard in checkpoint.shards]
    if (path / INDEX_NAME).is_file():
        weights.append(INDEX_NAME)
    return weights, cards.model_card(repo_id, checkpoint, norms, origin), notes


def _require_tidy(checkpoint: Checkpoint) -> None:
    path = checkpoint.path
    if checkpoint.leftovers:
        raise UserError(
            f"{path}: {checkpoint.leftovers[0].name} is no part of the checkpoint (nothing points to it)",
            "Remove it, or make its index whole, so that it is plain which weights are meant",
            EXIT_FINDING,
        )
    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(
            f"{path}: no tokenizer (tokenizer.json), so nobody could use the model",
            "Copy the tokenizer files of the base model into the folder",
        )


def _adapter(path: Path, repo_id: str, origin: cards.Origin) -> tuple[list[str], str, list[str]]:
    """Weight files, card and notes of an adapter that passes."""
    adapter = open_adapter(path)
    zeros = check_adapter(adapter)
    notes = [f"{zeros} of {len(adapter.pairs)} B matrices are all zero: those modules learned nothing"] if zeros else []
    return [ADAPTER_FILE], cards.adapter_card(repo_id, adapter, origin), notes


def _choose_card(path: Path, card: Path | None, generated: str) -> tuple[str, Path | None, list[str]]:
    """Card text, the file it comes from (None: generated) and notes; a named card goes before the folder's own."""
    source = card or path / CARD_NAME
    if not source.is_file():
        if card:
            raise UserError(f"{card}: no such file", "Name a Markdown file, or leave --card out")
        return generated, None, [f"{CARD_NAME}: generated"]
    try:
        text = source.read_bytes().decode()
    except UnicodeDecodeError:
        raise UserError(f"{source}: is no UTF-8 text", "Save the card as UTF-8") from None
    if not card and cards.is_template(text):
        return generated, None, [f"{CARD_NAME}: generated, the one in the folder is an unfilled template"]
    notes = [f"{CARD_NAME}: from {source}"]
    if not cards.check_card(text, source):
        notes.append(f"{CARD_NAME}: has no front matter, so the Hub will show no base, licence or task")
    return text, source, notes


def _origin_notes(base: str | None, origin: cards.Origin) -> list[str]:
    """What the reader of a plan should confirm, or may want to add, on a generated card."""
    notes = []
    if origin.base:
        notes.append(f"base_model: {origin.base}, as the folder states it")
    elif base:
        notes.append(f"base_model: left out, {base} is a local path")
    else:
        notes.append("base_model: left out, the folder names no base")
    if not origin.license:
        notes.append("license: left out, the folder states none that is known here")
    return notes


def _path_notes(path: Path, sent: set[str]) -> list[str]:
    """Files that would publish a path of this machine."""
    named = {name: local_paths(read_json(path / name)) for name in (ADAPTER_CONFIG, *SIDECARS) if name in sent}
    return [
        f"{name}: names a local path, readable by all who see the repo: {found[0]}"
        for name, found in named.items()
        if found
    ]


def _not_sent(path: Path, sent: set[str]) -> list[str]:
    left = sorted(p.name + "/" * p.is_dir() for p in path.iterdir() if p.name not in sent)
    return [f"not sent: {', '.join(left)}"] if left else []


def _stored(file: Path) -> dict[str, StoredTensor]:
    return {name: StoredTensor(info.dtype, info.shape) for name, info in read_header(file).tensors.items()}
