"""A Qwen2 packed to 4 bits: the bytes that transformers saves, and what a round trip keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.view import View, plain_view, read
from qwen2tool.checkpoint.writer import plan_shards, write_index, write_json, write_safetensors
from qwen2tool.convert.nf4 import pack, view_of_packed
from qwen2tool.errors import UserError
from tests.checkpoint.edits import load_state
from tests.convert.packed import NF4, PACKINGS, dequantised, load, save_packed
from tests.tiny import write_tiny

FOUR_BIT = ("nf4 double", "nf4", "fp4 double")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("pack") / "source")


def write(view: View, target: Path, shard: int = 60_000, **choices: object) -> Path:
    """`view` packed at `target`, in shards so small that one weight's parts are in two of them."""
    slots, writer, config = pack(view, **choices)  # type: ignore[arg-type]
    target.mkdir(exist_ok=True)
    shards = plan_shards(slots, shard)
    for file, group in shards.items():
        write_safetensors(target / file, group, writer)
    write_index(target, shards)
    write_json(target / "config.json", config)
    return target


def choices_of(packing: str) -> dict[str, object]:
    settings = PACKINGS[packing]
    return {"quant_type": settings["bnb_4bit_quant_type"], "double": settings["bnb_4bit_use_double_quant"]}


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names whose bytes differ, blanks at the end of a quant_state aside."""
    assert left.keys() == right.keys()
    trimmed = [
        {n: torch.tensor(list(bytes(t.tolist()).rstrip())) if ".quant_state." in n else t for n, t in state.items()}
        for state in (left, right)
    ]
    return [n for n, t in trimmed[0].items() if t.dtype != trimmed[1][n].dtype or not torch.equal(t, trimmed[1][n])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("packing", FOUR_BIT)
def test_the_bytes_are_those_that_transformers_saves(tmp_path: Path, packing: str, dtype: torch.dtype) -> None:
    source = write_tiny(tmp_path / "source", dtype=dtype)
    ours = write(plain_view(open_checkpoint(source)), tmp_path / "ours", **choices_of(packing))
    compute = {"bnb_4bit_compute_dtype": dtype}
    theirs = save_packed(source, tmp_path / "theirs", dtype, **PACKINGS[packing], **compute)
    assert differing(load_state(ours), load_state(theirs)) == []
    configs = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (ours, theirs)]
    assert configs[0] == configs[1]


def test_transformers_loads_it_with_the_same_numbers(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", intermediate_size=128)  # bitsandbytes' CPU product wants multiples of 32
    ours = write(plain_view(open_checkpoint(source)), tmp_path / "ours")
    assert len(list(ours.glob("*.safetensors"))) > 3
    loaded, direct = load(ours), load(source, **NF4)
    mine, theirs = dequantised(loaded), dequantised(direct)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    with torch.no_grad():
        tokens = torch.arange(40)[None]
        assert torch.equal(loaded(tokens).logits, direct(tokens).logits)


def test_biases_norms_and_tables_keep_their_bytes(source: Path, tmp_path: Path) -> None:
    ours, original = load_state(write(plain_view(open_checkpoint(source)), tmp_path / "ours")), load_state(source)
    kept = [name for name in original if not name.endswith("_proj.weight")]
    assert len(kept) == 18 and all(
        torch.equal(ours[n], original[n]) and ours[n].dtype == original[n].dtype for n in kept
    )


@pytest.mark.parametrize("blocksize", [32, 128])
def test_other_block_sizes_load(tmp_path: Path, blocksize: int) -> None:
    """Rows of whole blocks: with others, the AVX-512 kernel of bitsandbytes 0.50 dequantises wrong numbers."""
    source = write_tiny(tmp_path / "source", hidden_size=128, intermediate_size=256)
    ours = write(plain_view(open_checkpoint(source)), tmp_path / "ours", blocksize=blocksize)
    view, truth = view_of_packed(open_checkpoint(ours)), dequantised(load(ours))
    assert all(torch.equal(read(tensor), truth[name]) for name, tensor in view.tensors.items() if "_proj.w" in name)
    state = load(ours).model.layers[0].mlp.up_proj.weight.quant_state
    assert state.blocksize == blocksize


def test_a_writer_may_begin_anywhere(source: Path, tmp_path: Path) -> None:
    """As a run does that goes on after a kill: the last file alone is what it is in a whole run."""
    view = plain_view(open_checkpoint(source))
    whole = write(view, tmp_path / "whole")
    slots, writer, _ = pack(view)
    for name, group in list(plan_shards(slots, 60_000).items())[::-1]:
        write_safetensors(tmp_path / name, group, writer)
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def round_trip(source: Path, tmp_path: Path, **choices: object) -> tuple[dict[str, torch.Tensor], ...]:
    first = write(plain_view(open_checkpoint(source)), tmp_path / "first", **choices)
    second = write(view_of_packed(open_checkpoint(first)), tmp_path / "second", **choices)
    return load_state(first), load_state(second)


def test_plain_scales_come_back_from_16_bit(source: Path, tmp_path: Path) -> None:
    first, second = round_trip(source, tmp_path, double=False)
    assert differing(first, second) == []


def test_fp4_has_two_zeros_and_one_comes_back(source: Path, tmp_path: Path) -> None:
    first, second = round_trip(source, tmp_path, quant_type="fp4", double=False)
    moved = differing(first, second)
    assert moved and all(name.endswith("_proj.weight") for name in moved)
    views = [view_of_packed(open_checkpoint(tmp_path / name)) for name in ("first", "second")]
    assert all(torch.equal(read(views[0].tensors[name]), read(views[1].tensors[name])) for name in moved)


def test_of_double_quantised_scales_only_the_scales_move(source: Path, tmp_path: Path) -> None:
    first, second = round_trip(source, tmp_path)
    moved = differing(first, second)
    assert moved, "the scales of a block are rounded to bf16 on the way: if none moves, say so in the docs"
    assert all(name.endswith(("absmax", "bitsandbytes__nf4")) for name in moved)
    views = [view_of_packed(open_checkpoint(tmp_path / name)) for name in ("first", "second")]
    for name, tensor in views[0].tensors.items():
        if name.endswith("_proj.weight"):
            before, after = read(tensor).float(), read(views[1].tensors[name]).float()
            assert (after - before).abs().max() <= 0.02 * before.abs().max()


def test_a_wrong_byte_is_seen(source: Path, tmp_path: Path) -> None:
    """The comparison of this file, on a folder with one nibble changed."""
    ours = write(plain_view(open_checkpoint(source)), tmp_path / "ours")
    shutil.copytree(ours, tmp_path / "bad")
    file = sorted((tmp_path / "bad").glob("*.safetensors"))[1]
    state = load_file(file)
    name = next(name for name in state if name.endswith("_proj.weight"))
    offset = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])[name]
    blob = bytearray(file.read_bytes())
    blob[8 + int.from_bytes(blob[:8], "little") + offset["data_offsets"][0]] ^= 0x10
    file.write_bytes(blob)
    assert differing(load_state(ours), load_state(tmp_path / "bad")) == [name]


@pytest.mark.parametrize("choice", [{"quant_type": "int8"}, {"blocksize": 16}])
def test_choices_that_bitsandbytes_does_not_have(source: Path, choice: dict[str, object]) -> None:
    with pytest.raises(UserError, match="not what bitsandbytes offers"):
        pack(plain_view(open_checkpoint(source)), **choice)  # type: ignore[arg-type]
