"""Changes to a checkpoint folder as careless tools make them: its files agree with each other, and are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
QKV_BIASES = tuple(f"self_attn.{p}_proj.bias" for p in "qkv")


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def edit_config(folder: Path, **changes: Any) -> None:
    """Sets keys of config.json; None removes one."""
    edit_json(folder / "config.json", lambda config: config.update(changes))
    gone = [key for key, value in changes.items() if value is None]
    edit_json(folder / "config.json", lambda config: [config.pop(key) for key in gone])


def load_state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Lets `change` edit all tensors in place, and writes them back as one file without index."""
    state = load_state(folder)
    change(state)
    for file in (*folder.glob("model*.safetensors"), *folder.glob(INDEX)):
        file.unlink()
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def drop(folder: Path, *endings: str) -> None:
    """Removes every tensor whose name ends so."""

    def without(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if name.endswith(endings)]:
            del state[name]

    rewrite(folder, without)


def put(folder: Path, name: str, tensor: torch.Tensor) -> None:
    rewrite(folder, lambda state: state.update({name: tensor}))
