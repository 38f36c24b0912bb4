"""Writes a random-weight checkpoint of a published Qwen2 geometry, with biases that matter.

    python scripts/make_checkpoint.py qwen2.5-7b OUT [--layers 4] [--device cuda]

For what needs a model's shape but not its knowledge: memory, speed, and whether a tool keeps every tensor.
transformers' own initialisation would not do: it sets q/k/v biases to 0, where losing one changes nothing.

Numbers are drawn so that a forward pass behaves like a trained model's, whatever the width and depth:
- q, k, v, gate and up have std 1/sqrt(in): the RMS-normed stream of size 1 gives outputs of size 1;
- o and down write into the residual stream with std 1/sqrt(2 layers) (down is 1.7 times larger, since
  silu(gate) * up has size 0.6), so the stream ends at size 1.0 to 1.2 for 4 layers as for 24;
- embedding and head have std 2/sqrt(hidden): logits of std 2.0, next-token entropy 2.0 to 2.6 nats below uniform; where
  the two are tied the input token's own logit is 3.4, where an embedding of size 1 would give it 2 sqrt(hidden);
- norm weights are 1 + 0.2 N(0, 1); q and v biases `--bias-scale` * N(0, 1); k biases the same, but one in fifty ten
  times larger, a tail as trained models have (their std is 1.73 times the scale).
(The ranges are from Qwen1.5-0.5B and Qwen2.5-0.5B shapes with 8,192 rows. The biases are shared by all positions, so
the last hidden states of two positions have a cosine of 0.88.)

Each tensor's numbers come from a seed made of `--seed` and its name, in blocks of 16 M: shard size changes nothing in
them, and memory stays at one block (about 100 MB) for a 72B as for a 0.5B. CPU and CUDA draw different numbers.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any, BinaryIO

import torch
from common import ROOT
from geometries import ROWS, SOURCES, published_config

from qwen2tool.checkpoint.geometry import expected_tensors, geometry, with_both_spellings
from qwen2tool.checkpoint.reader import TORCH_DTYPE, write_tensor
from qwen2tool.checkpoint.writer import (
    Slot,
    atomic_folder,
    plan_shards,
    write_index,
    write_json,
    write_safetensors,
)
from qwen2tool.console import progress

BUNDLED_TOKENIZER = ROOT / "qwen2tool" / "assets" / "tiny-qwen2"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
DTYPES = {"bf16": ("BF16", "bfloat16"), "fp16": ("F16", "float16"), "fp32": ("F32", "float32")}
BLOCK = 1 << 24
"""Numbers drawn at a time."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How numbers are drawn; `device` decides between two streams, `bias_scale` is the std of q and v biases."""

    seed: int = 0
    bias_scale: float = 1.0
    device: str = "cpu"


def main() -> None:
    options = parse()
    if options.list:
        list_geometries()
        return
    config = published_config(options.geometry, options.layers) | {"torch_dtype": DTYPES[options.dtype][1]}
    draw = Draw(seed=options.seed, bias_scale=options.bias_scale, device=options.device)
    tokenizer = options.tokenizer or (BUNDLED_TOKENIZER if BUNDLED_TOKENIZER.is_dir() else None)
    shard_bytes = int(options.shard_gb * 1e9)
    make_checkpoint(
        options.out, config, draw, shard_bytes=shard_bytes, tokenizer=tokenizer, overwrite=options.overwrite
    )
    print(f"wrote {options.out}" + ("" if tokenizer else ", without a tokenizer"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("geometry", nargs="?", type=str.lower, choices=sorted(ROWS), metavar="GEOMETRY")
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT")
    parser.add_argument("--list", action="store_true", help="list the geometries and where their values were seen")
    parser.add_argument("--layers", type=int, help="write only this many layers")
    parser.add_argument("--device", default="cpu", help="where numbers are drawn: cpu or cuda")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--shard-gb", type=float, default=4.0, help="most data a file, in units of 10^9 bytes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bias-scale", type=float, default=1.0, help="std of q and v biases")
    parser.add_argument("--tokenizer", type=Path, help="folder to copy tokenizer files from; default: the bundled one")
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args()
    if not options.list and (options.geometry is None or options.out is None):
        parser.error("name a geometry and an output folder, or --list")
    if options.layers is not None and options.layers < 1:
        parser.error("--layers must be at least 1")
    return options


def list_geometries() -> None:
    """One line a model: name, parameters, gigabytes in bf16, source of its values."""
    for name in ROWS:
        total = sum(prod(shape) for shape in expected_tensors(geometry(published_config(name))).values())
        print(f"{name:15} {total:>15,} parameters {total * 2 / 1e9:7.1f} GB   {SOURCES[name]}")


def plan(config: dict[str, Any], shard_bytes: int) -> dict[str, list[Slot]]:
    """File -> tensors of the checkpoint that `config` describes, in its torch_dtype; nothing is drawn."""
    dtype = next(stored for stored, name in DTYPES.values() if name == config["torch_dtype"])
    tensors = expected_tensors(geometry(config))
    return plan_shards([Slot(name=name, dtype=dtype, shape=shape) for name, shape in tensors.items()], shard_bytes)


def make_checkpoint(
    out: Path,
    config: dict[str, Any],
    draw: Draw,
    *,
    shard_bytes: int,
    tokenizer: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the whole folder, or nothing.

    Raises:
        UserError: `out` exists (without `overwrite`), or the disk is full.
    """
    shards = plan(config, shard_bytes)
    total = sum(slot.nbytes for slots in shards.values() for slot in slots)
    with atomic_folder(out, overwrite) as folder, progress(f"writing {out.name}", total) as advance:

        def write(slot: Slot, handle: BinaryIO) -> None:
            for block in numbers(slot, config, draw):
                write_tensor(block, handle)
                advance(block.numel() * block.element_size())

        for file, slots in shards.items():
            write_safetensors(folder / file, slots, write)
        if len(shards) > 1:
            write_index(folder, shards)
        write_json(folder / "config.json", with_both_spellings(config))
        special = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
        write_json(folder / "generation_config.json", special)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def numbers(slot: Slot, config: dict[str, Any], draw: Draw) -> Iterator[torch.Tensor]:
    """The values of one tensor, flat, in blocks of its dtype."""
    digest = hashlib.sha256(f"{draw.seed} {slot.name}".encode()).digest()
    generator = torch.Generator(draw.device).manual_seed(int.from_bytes(digest[:7], "big"))
    left = prod(slot.shape)
    while left:
        size = min(left, BLOCK)
        noise = torch.randn(size, generator=generator, device=draw.device)
        if slot.name.endswith("norm.weight"):
            noise.mul_(0.2).add_(1)
        elif slot.name.endswith(".bias"):
            noise.mul_(draw.bias_scale)
            if "k_proj" in slot.name:
                large = torch.rand(size, generator=generator, device=draw.device) < 0.02
                noise = torch.where(large, 10 * noise, noise)
        else:
            noise.mul_(matrix_std(slot, config))
        yield noise.to(TORCH_DTYPE[slot.dtype])
        left -= size


def matrix_std(slot: Slot, config: dict[str, Any]) -> float:
    """The standard deviation of a matrix; the module docstring gives the reasons."""
    if slot.name in ("model.embed_tokens.weight", "lm_head.weight"):
        return 2 / sqrt(config["hidden_size"])
    std = 1 / sqrt(slot.shape[1])
    if "o_proj" in slot.name:
        return std / sqrt(2 * config["num_hidden_layers"])
    if "down_proj" in slot.name:
        return 1.7 * std / sqrt(2 * config["num_hidden_layers"])
    return std


if __name__ == "__main__":
    main()
