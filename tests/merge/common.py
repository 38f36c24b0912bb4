"""Both sides of a merge as dictionaries of tensors: what our files hold, and what PEFT itself makes of the two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

INDEX = "model.safetensors.index.json"


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(read_json(file) | changes))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all shards, read by safetensors itself."""
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype and one.shape == other.shape and one.view(torch.uint8).equal(other.view(torch.uint8))
    )


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """PEFT's merge_and_unload onto the base in its own dtype."""
    model = PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(base, dtype="auto"), adapter)
    return model.merge_and_unload().state_dict()


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of 2 sequences of 12 tokens, in fp32."""
    tokens = torch.arange(24).view(2, 12) * 13 % 384
    with torch.no_grad():
        return model(input_ids=tokens).logits.float()


def write_plain_adapter(path: Path, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], **config: Any) -> Path:
    """An adapter in PEFT's format from module -> (A, B); rank from A, alpha = rank unless `config` says otherwise."""
    path.mkdir()
    rank = next(iter(pairs.values()))[0].shape[0]
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": "base"} | config
    (path / "adapter_config.json").write_text(json.dumps(fields))
    named = {
        f"base_model.model.{module}.lora_{side}.weight": matrix.clone().contiguous()
        for module, sides in pairs.items()
        for side, matrix in zip("AB", sides, strict=True)
    }
    save_file(named, path / "adapter_model.safetensors")
    return path
