"""Text of random tokens, and copies of a checkpoint with something changed; written with safetensors, not by us."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM

from qwen2tool.data.samples import Sample
from tests.tiny import write_shards

State = dict[str, torch.Tensor]
VOCABULARY = 384


def random_samples(count: int = 6, length: int = 48, unscored: int = 4, seed: int = 3) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    scored = (False,) * unscored + (True,) * (length - unscored)
    ids = torch.randint(0, VOCABULARY, (count, length), generator=generator).tolist()
    return [Sample(ids=tuple(row), scored=scored, record=number) for number, row in enumerate(ids)]


def read_state(folder: Path) -> State:
    state: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def variant(
    source: Path,
    target: Path,
    change: Callable[[State], Any] = lambda state: None,
    config: dict[str, Any] | None = None,
    shards: int = 1,
) -> Path:
    """A copy of `source` whose tensors `change` edits in place (or returns anew), and whose config takes `config`."""
    shutil.copytree(source, target)
    state = read_state(target)
    for file in target.glob("*.safetensors*"):
        file.unlink()
    write_shards(target, change(state) or state, shards)
    settings = json.loads((target / "config.json").read_text()) | (config or {})
    (target / "config.json").write_text(json.dumps(settings))
    return target


def peft_merged(base: Path, adapter: Path, dtype: torch.dtype) -> State:
    """base + adapter by PEFT's merge_and_unload in fp32, rounded once."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    merged = model.merge_and_unload().state_dict()
    return {name: tensor.to(dtype).contiguous() for name, tensor in merged.items()}


def without(*suffixes: str) -> Callable[[State], State]:
    """A change that drops the tensors whose names end so."""
    return lambda state: {name: tensor for name, tensor in state.items() if not name.endswith(suffixes)}
