"""Changes that make no other function, of a checkpoint's files or of how it is run: none may be called a difference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.tiny import write_shards
from tests.verify.zoo import Config, State, Zoo, keys, name, with_adapter
from tests.verify.zoo_run import Keeper, copied, states


@dataclass(frozen=True)
class Harmless:
    """`make` builds the candidate from the reference; `options` are those of `verify`, `text` of the samples."""

    name: str
    make: Callable[[Path, Path, Keeper], Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    text: dict[str, int] = field(default_factory=dict)
    base: str = "plain"
    threads: int = 1
    real: bool = False
    """Whether the long run on a published model has it."""


def files(config: Callable[[Config], Config] = lambda c: {}, change: Callable[[State], Any] = lambda s: None) -> Any:
    return lambda source, target, keeper: copied(source, target, change, config)


def shards(count: int) -> Any:
    def make(source: Path, target: Path, keeper: Keeper) -> None:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
        write_shards(target, states(source), count)

    return make


def side_files(**texts: str) -> Any:
    """Other files beside the weights; a text of "" removes one."""

    def make(source: Path, target: Path, keeper: Keeper) -> None:
        shutil.copytree(source, target)
        for file, text in texts.items():
            path = target / file.replace("__", ".")
            path.write_text(text) if text else path.unlink(missing_ok=True)

    return make


def tokenizer_setting(**changes: Any) -> Any:
    def make(source: Path, target: Path, keeper: Keeper) -> None:
        shutil.copytree(source, target)
        file = target / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return make


def reversed_keys(source: Path, target: Path, keeper: Keeper) -> None:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))


def reversed_tensors(source: Path, target: Path, keeper: Keeper) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    state = dict(reversed(states(source).items()))
    half = len(state) // 2
    parts = {"a.safetensors": list(state)[:half], "b.safetensors": list(state)[half:]}
    for file, chosen in parts.items():
        save_file({key: state[key] for key in chosen}, target / file)
    index = {"metadata": {"total_size": 1}, "weight_map": {key: file for file, ks in parts.items() for key in ks}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


def metadata(source: Path, target: Path, keeper: Keeper) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(
        states(source), target / "model.safetensors", metadata={"format": "pt", "made by": "another tool", "n": "1"}
    )


def store_head(state: State) -> None:
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()


def store_buffers(state: State) -> None:
    layers = {key.split(".")[2] for key in state if key.startswith("model.layers.")}
    state |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in layers}


def negative_zero(state: State) -> None:
    bias = state[name(0, "v", "bias")]
    assert bias[0] == 0
    bias[0] = -0.0


def widened(state: State) -> None:
    state.update({key: tensor.float() for key, tensor in state.items()})


def as_bin(source: Path, target: Path, keeper: Keeper) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(states(source), target / "pytorch_model.bin")


def as_llama(source: Path, target: Path, keeper: Keeper) -> None:
    """Llama's layout by hand: its names are Qwen2's, with a bias on o_proj that is zero."""

    def add_biases(state: State) -> None:
        for key in [key for key in state if key.endswith("o_proj.weight")]:
            state[key.replace("weight", "bias")] = torch.zeros(state[key].shape[0], dtype=state[key].dtype)

    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": True}
    gone = {"use_sliding_window": None, "sliding_window": None, "max_window_layers": None, "layer_types": None}
    copied(source, target, add_biases, lambda config: llama | gone)


def linked(source: Path, target: Path, keeper: Keeper) -> None:
    target.symlink_to(source, target_is_directory=True)


def merged(source: Path, target: Path, keeper: Keeper) -> None:
    """base + adapter in fp32, stored so."""
    zoo: Zoo = keeper.zoo("adapter")

    def merge(state: State) -> None:
        widened(state)
        with_adapter(lambda key, zoo: 1.0)(state, zoo)

    copied(source, target, merge)


def rope(*spellings: str) -> Callable[[Config], Config]:
    """rope_theta in these spellings only."""

    def change(config: Config) -> Config:
        theta = config["rope_theta"]
        every = {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
        return {key: every[key] if key in spellings else None for key in every}

    return change


def dtype(**spellings: str | None) -> Callable[[Config], Config]:
    return lambda config: {"dtype": None, "torch_dtype": None} | spellings


def layer_types(config: Config) -> Config:
    return {"layer_types": ["full_attention"] * config["num_hidden_layers"]}


def head_size(config: Config) -> Config:
    return {"head_dim": config["hidden_size"] // config["num_attention_heads"]}


HARMLESS = [
    Harmless("the same folder", real=True),
    Harmless("a link to the folder", linked, real=True),
    Harmless("one file instead of shards", files(), real=True),
    Harmless("three shards", shards(3), real=True),
    Harmless("tensors in another order, index with a wrong total", reversed_tensors, real=True),
    Harmless("metadata in the header", metadata, real=True),
    Harmless("config.json in another order", reversed_keys, real=True),
    Harmless("dtype spelled torch_dtype", files(dtype(torch_dtype="bfloat16")), real=True),
    Harmless("dtype spelled dtype", files(dtype(dtype="bfloat16")), real=True),
    Harmless("config.json says float32", files(dtype(dtype="float32")), real=True),
    Harmless("rope_theta only on top", files(rope("rope_theta")), real=True),
    Harmless("rope_theta only in rope_parameters", files(rope("rope_parameters")), real=True),
    Harmless("layer_types spelled out", files(layer_types), real=True),
    Harmless("head_dim spelled out", files(head_size), real=True),
    Harmless("a window that is not used", files(keys(sliding_window=64, max_window_layers=1)), real=True),
    Harmless("max_position_embeddings doubled, no scaling", files(keys(max_position_embeddings=131072)), real=True),
    Harmless("another attention backend in config.json", files(keys(_attn_implementation="eager"))),
    Harmless("use_cache and transformers_version", files(keys(use_cache=False, transformers_version="4.37.0"))),
    Harmless("unknown keys in config.json", files(keys(my_notes="none", quantization_config=None))),
    Harmless("a tied head stored as well", files(change=store_head), base="tied", real=True),
    Harmless("a tied head untied by copying", files(keys(tie_word_embeddings=False), store_head), base="tied"),
    Harmless("inv_freq buffers", files(change=store_buffers), real=True),
    Harmless("-0.0 for 0.0 in a bias", files(change=negative_zero), base="zeros"),
    Harmless("bfloat16 stored as float32", files(dtype(dtype="float32"), widened), real=True),
    Harmless(".bin instead of safetensors", as_bin, real=True),
    Harmless("Llama's layout", as_llama, real=True),
    Harmless("other side files", side_files(README__md="# Mine", notes__txt="", generation_config__json=""), real=True),
    Harmless("another chat template", tokenizer_setting(chat_template="{{ messages[0]['content'] }}")),
    Harmless("padding on the left", tokenizer_setting(padding_side="left", model_max_length=77), real=True),
    Harmless("no tokenizer", side_files(tokenizer__json="", tokenizer_config__json=""), real=True),
    Harmless("base + adapter merged in float32", merged, base="adapter", real=True),
    Harmless("one text alone", text={"count": 1, "length": 48}, real=True),
    Harmless("many short texts", text={"count": 8, "length": 12}, real=True),
    Harmless("texts of unequal lengths", text={"count": 5, "length": 0}, real=True),
    Harmless("meant for float16", options={"dtype": "float16"}),
    Harmless("meant for float32", options={"dtype": "float32"}),
    Harmless("two threads", threads=2, real=True),
]  # fmt: skip
