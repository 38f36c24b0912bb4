"""Random checkpoints of published geometries: shapes and totals against transformers, values against what was asked."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import make_checkpoint as maker  # noqa: E402
from geometries import ROWS, SOURCES, TOTALS, published_config  # noqa: E402

from qwen2tool.checkpoint.folder import open_checkpoint  # noqa: E402
from qwen2tool.checkpoint.geometry import with_both_spellings  # noqa: E402
from qwen2tool.checkpoint.inventory import require_whole  # noqa: E402
from qwen2tool.checkpoint.report import inspect_checkpoint  # noqa: E402
from qwen2tool.errors import UserError  # noqa: E402

SMALL = published_config("qwen2.5-0.5b", 3) | {
    "hidden_size": 128, "intermediate_size": 200, "num_attention_heads": 8, "vocab_size": 500, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip


def shapes_of_transformers(config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config.from_dict(with_both_spellings(config)))
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}


def planned(config, shard_bytes=4 * 10**9) -> dict[str, tuple[int, ...]]:
    return {s.name: s.shape for slots in maker.plan(config, shard_bytes).values() for s in slots}


def small(out: Path, shard_bytes=10**9, config=SMALL, tokenizer=None, **draw) -> Path:
    maker.make_checkpoint(out, config, maker.Draw(**draw), shard_bytes=shard_bytes, tokenizer=tokenizer)
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def digests(folder: Path) -> dict[str, str]:
    return {n: hashlib.sha256(t.view(torch.uint8).numpy()).hexdigest() for n, t in tensors(folder).items()}


@pytest.mark.parametrize("name", ROWS)
def test_one_layer_has_the_shapes_of_transformers(name):
    config = published_config(name, 1)
    truth = shapes_of_transformers(config)
    assert planned(config) == truth
    assert planned(config | {"num_key_value_heads": 1}) != truth, "negative control"


@pytest.mark.parametrize("name", TOTALS)
def test_whole_models_have_the_published_size(name):
    assert sum(map(prod, planned(published_config(name)).values())) == TOTALS[name]


def test_every_geometry_has_a_source():
    assert SOURCES.keys() == ROWS.keys() and TOTALS.keys() <= ROWS.keys()


def test_values_that_differ_between_siblings():
    """What must never be assumed: vocabulary, eps, tying, theta and positions."""
    assert {row.vocab for row in ROWS.values()} == {151936, 152064, 92416}
    assert {row.eps for row in ROWS.values()} == {1e-6, 1e-5}
    assert {name for name, row in ROWS.items() if row.tied} == {
        "qwen1.5-0.5b", "qwen2-0.5b", "qwen2-1.5b", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b"
    }  # fmt: skip
    assert {name for name, row in ROWS.items() if row.theta != 1e6} == {"qwen1.5-4b"}
    assert published_config("CodeQwen1.5-7B")["max_position_embeddings"] == 65536


def test_shards_of_a_72b_stay_below_their_size():
    shards = maker.plan(published_config("qwen2-72b"), 4 * 10**9)
    sizes = [sum(slot.nbytes for slot in slots) for slots in shards.values()]
    assert max(sizes) <= 4 * 10**9 and sum(sizes) == 2 * TOTALS["qwen2-72b"] and len(shards) == 37
    assert next(iter(shards)) == "model-00001-of-00037.safetensors"


def test_a_written_checkpoint_is_whole(tmp_path, base_folder):
    folder = small(tmp_path / "out", shard_bytes=200_000, tokenizer=base_folder)
    checkpoint = open_checkpoint(folder)
    require_whole(checkpoint)
    assert len(checkpoint.shards) > 2 and (folder / "tokenizer.json").is_file()
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}
    assert inspect_checkpoint(folder, values=True).exit_code == 0
    model = Qwen2ForCausalLM.from_pretrained(folder)
    assert model.config.rope_parameters["rope_theta"] == 1e6
    for name, tensor in tensors(folder).items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_values_are_as_asked(tmp_path):
    config = SMALL | {"hidden_size": 1024, "num_hidden_layers": 2}
    state = tensors(small(tmp_path / "out", config=config, bias_scale=3.0))
    biases = {p: torch.cat([t.float() for n, t in state.items() if n.endswith(f"{p}_proj.bias")]) for p in "qkv"}
    assert biases["q"].std().item() == pytest.approx(3.0, rel=0.06)
    assert biases["v"].std().item() == pytest.approx(3.0, rel=0.15)
    assert biases["k"].abs().median().item() == pytest.approx(3.0 * 0.674, rel=0.25), "the bulk of k is no larger"
    assert biases["k"].abs().max() > 10 > biases["v"].abs().max() > 5, "but its tail is"
    norms = torch.cat([t.float() for n, t in state.items() if n.endswith("norm.weight")])
    assert norms.mean().item() == pytest.approx(1.0, abs=0.02) and norms.std().item() == pytest.approx(0.2, rel=0.05)
    for name, std in (
        ("model.embed_tokens", 2 / 32), ("lm_head", 2 / 32), ("model.layers.1.self_attn.q_proj", 1 / 32),
        ("model.layers.0.mlp.up_proj", 1 / 32), ("model.layers.0.self_attn.o_proj", 1 / 64),
        ("model.layers.0.mlp.down_proj", 1.7 / 200**0.5 / 2),
    ):  # fmt: skip
        assert state[f"{name}.weight"].float().std().item() == pytest.approx(std, rel=0.02), name


def test_logits_spread_sensibly_at_any_depth(tmp_path):
    for layers in (2, 16):
        config = SMALL | {"num_hidden_layers": layers, "tie_word_embeddings": True, "intermediate_size": 352}
        model = Qwen2ForCausalLM.from_pretrained(small(tmp_path / str(layers), config=config), dtype=torch.float32)
        ids = torch.randint(0, 500, (2, 64), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits = model(ids).logits
        assert logits.std(-1).mean().item() == pytest.approx(2.0, rel=0.3)
        own = logits.gather(-1, ids[..., None]).mean().item()
        assert 0 < own < 8


def test_the_same_seed_gives_the_same_tensors_in_any_shards(tmp_path):
    first = digests(small(tmp_path / "one", seed=5))
    assert digests(small(tmp_path / "many", shard_bytes=100_000, seed=5)) == first
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    other = digests(small(tmp_path / "other", seed=6))
    assert all(other[name] != first[name] for name in first)
    assert len(set(first.values())) == len(first), "no two tensors are alike"


def test_blocks_do_not_show(monkeypatch):
    """A tensor longer than a block still has the right size and no repetition."""
    monkeypatch.setattr(maker, "BLOCK", 1000)
    slot = maker.Slot(name="lm_head.weight", dtype="F32", shape=(50, 70))
    blocks = list(maker.numbers(slot, SMALL, maker.Draw()))
    assert [len(b) for b in blocks] == [1000, 1000, 1000, 500]
    assert len(torch.cat(blocks).unique()) > 3490


MEMORY = """
import sys
sys.path[:0] = sys.argv[1:3]
import make_checkpoint as maker
from qwen2tool.console import resident_peak
maker.BLOCK = int(sys.argv[3])
slot = maker.Slot(name="model.embed_tokens.weight", dtype="BF16", shape=(151936, 512))
config = maker.published_config("qwen1.5-0.5b")
peak = lambda: resident_peak() / 1e6
# Enough numbers for torch to go parallel: what it loads for that, more in a CUDA build, is not the drawing's memory.
list(maker.numbers(maker.Slot(name="x.bias", dtype="BF16", shape=(100_000,)), config, maker.Draw()))
before = peak()
for block in maker.numbers(slot, config, maker.Draw()):
    pass
print(peak() - before)
"""


def test_memory_stays_at_one_block():
    """A table of 78 M numbers (311 MB in fp32): drawing it in blocks takes less than drawing it whole.

    glibc by itself gives large blocks back at once or keeps some, by their history (50 to 108 MB were seen of 42); with
    the threshold named it always gives them back, and what is measured is the drawing's.
    """

    def megabytes(block: int) -> float:
        line = [sys.executable, "-c", MEMORY, str(ROOT), str(ROOT / "scripts"), str(block)]
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        return float(subprocess.run(line, capture_output=True, text=True, check=True, env=env).stdout)

    assert megabytes(maker.BLOCK // 4) < 100
    assert megabytes(1 << 40) > 300, "negative control"


@pytest.mark.parametrize(("dtype", "stored"), [("fp16", "F16"), ("fp32", "F32")])
def test_other_dtypes(tmp_path, dtype, stored):
    folder = small(tmp_path / "out", config=SMALL | {"torch_dtype": maker.DTYPES[dtype][1]})
    assert {info.dtype for info in open_checkpoint(folder).tensors.values()} == {stored}


def test_nothing_is_left_of_a_failed_run(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("stop")

    monkeypatch.setattr(maker, "write_json", fail)
    with pytest.raises(RuntimeError):
        small(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="already exists"):
        small(tmp_path / "there")


def test_command_line(tmp_path):
    """Qwen1.5-0.5B with one layer, in one process: 337 MB written, far less held."""
    script = [sys.executable, str(ROOT / "scripts" / "make_checkpoint.py")]
    listed = subprocess.run([*script, "--list"], capture_output=True, text=True, check=True).stdout
    assert "7,615,616,512" in listed and len(listed.splitlines()) == len(ROWS)
    out = tmp_path / "out"
    subprocess.run([*script, "Qwen1.5-0.5B", out, "--layers", "1", "--shard-gb", "0.2"], check=True)
    checkpoint = open_checkpoint(out)
    require_whole(checkpoint)
    assert dataclasses.asdict(checkpoint.geometry)["num_hidden_layers"] == 1 and len(checkpoint.shards) == 2
    assert subprocess.run([*script, "nothing-7b", out], capture_output=True, check=False).returncode == 2
