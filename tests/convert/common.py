"""What the conversion tests look at: the bytes of every tensor, logits, and config.json as an older reader takes it."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

from qwen2tool.checkpoint.view import View
from qwen2tool.convert.gguf_write import GgufKind, Written, gguf_file

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}


def hashes(folder: Path) -> dict[str, str]:
    """Name -> dtype and sha256 of the data, by safetensors' own reader."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                tensor = opened.get_tensor(name)
                data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                found[name] = f"{tensor.dtype} {hashlib.sha256(data).hexdigest()}"
    return found


def write_gguf(view: View, out: Path, kind: GgufKind, **options: Any) -> Written:
    """The finished file; what it is named after matters to a run that is killed only."""
    with gguf_file(view, out, kind, key="ab" * 32, **options) as written:
        pass
    return replace(written, file=out)


def config_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return value


def manifest_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "qwen2tool-convert.json").read_text())
    return value


@torch.no_grad()
def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits of transformers' own class for the folder's model_type, on 2 x 200 fixed tokens."""
    kind = {"qwen2": Qwen2ForCausalLM, "llama": LlamaForCausalLM}[config_of(folder)["model_type"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind.from_pretrained(folder, dtype=dtype).eval()
    ids = torch.randint(model.config.vocab_size, (2, 200), generator=torch.Generator().manual_seed(3))
    return model(ids).logits


def older_reader(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4.46 takes from a config: top-level keys only, 10000 where there is no rope_theta."""
    return {
        "rope_theta": config.get("rope_theta", 10000.0),
        "rope_scaling": config.get("rope_scaling"),
        "dtype": config.get("torch_dtype"),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }
