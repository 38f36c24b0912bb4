"""Memory estimates against arithmetic by hand and against what training a 7B geometry took."""

from __future__ import annotations

import json
import sys
from math import prod
from pathlib import Path

import pytest

from qwen2tool.checkpoint.geometry import Geometry, expected_tensors, geometry
from qwen2tool.checkpoint.needs import LENGTH, NF4_BYTES, RANK, SEQUENCES, memory_section

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from geometries import published_config  # noqa: E402


def shape_of(name: str) -> Geometry:
    return geometry(published_config(name))


def memory(name: str):
    shape = shape_of(name)
    total = sum(prod(size) for size in expected_tensors(shape).values())
    return memory_section(shape, total, 2 * total), total


@pytest.fixture(scope="module")
def measured():
    """Of the parts with this setting the one in which Liger had its turn."""
    parts = json.loads((ROOT / "benchmarks" / "results" / "train_step.json").read_text())
    result = next(part for name, part in parts.items() if name.startswith("large") and "liger" in part["peers"])
    assert (result["geometry"], result["quantize"]) == ("qwen1.5-7b", "nf4")
    assert (result["batch"], result["length"], result["rank"]) == (SEQUENCES, LENGTH, RANK)
    return result


def test_qlora_is_within_a_tenth_of_what_was_measured(measured):
    """Of the two peers that recompute every layer, Liger keeps all on the device, Unsloth the layer inputs on the host.

    The third run, qwen2tool's own, is none to compare: it spends what a budget leaves on activations that it keeps.
    """
    estimate = memory("qwen1.5-7b")[0]["train"]["qlora"]["total"] / 1e9
    inputs = 32 * SEQUENCES * LENGTH * 4096 * 2 / 1e9
    unsloth = measured["peers"]["unsloth"]["memory_gb"]["peak_allocated"]
    liger = measured["peers"]["liger"]["memory_gb"]["peak_allocated"]
    assert estimate == pytest.approx(liger, rel=0.1)
    assert estimate - inputs == pytest.approx(unsloth, rel=0.03)
    assert estimate != pytest.approx(unsloth, rel=0.1), "on the device alone it takes more"


def test_the_adapter_is_the_one_that_was_trained(measured):
    trainable = {run["trainable"] for run in measured["runs"]}
    assert trainable == {159_907_840}
    assert memory("qwen1.5-7b")[0]["train"]["lora"]["adapter"] == 16 * trainable.pop()


def test_parts_by_hand():
    """Qwen2.5-7B: 28 layers, hidden 3584, intermediate 18944, 28/4 heads of 128, vocabulary 152064, untied."""
    found, total = memory("qwen2.5-7b")
    linears = 28 * (3584 * 3584 * 2 + 3584 * 512 * 2 + 3584 * 18944 * 3)
    assert total == 7_615_616_512
    assert found["train"]["lora"]["weights"] == found["serve"]["weights_16_bit"] == 2 * total
    assert found["train"]["qlora"]["weights"] == round(2 * (total - linears) + NF4_BYTES * linears)
    assert found["serve"]["kv_cache_1000_tokens"] == 2 * 28 * 4 * 128 * 2 * 1000
    for way in found["train"].values():
        assert way["total"] == way["weights"] + way["adapter"] + way["activations"]


def test_nf4_has_the_size_that_bitsandbytes_gives_it():
    """4 bits a number, an 8-bit absmax a block of 64, an fp32 one a block of 256 of those."""
    from bitsandbytes.functional import quantize_4bit
    from torch import randn

    packed, state = quantize_4bit(randn(1024, 1024).bfloat16(), quant_type="nf4", compress_statistics=True)
    stored = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert stored / 1024**2 == pytest.approx(NF4_BYTES, rel=1e-6)


def test_a_head_may_be_the_peak():
    """A small model's logits outweigh one of its layers."""
    found, _ = memory("qwen2.5-0.5b")
    inputs = 24 * SEQUENCES * LENGTH * 896 * 2
    assert found["train"]["lora"]["activations"] - inputs == 1024 * 151936 * 6 + SEQUENCES * LENGTH * 896 * 2
