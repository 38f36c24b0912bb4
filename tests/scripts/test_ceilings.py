"""Floor arithmetic against PyTorch's flop counter on a small Qwen2 under PEFT, and against figures worked by hand."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from geometries import published_config  # noqa: E402

from benchmarks import ceilings  # noqa: E402
from tests.tiny import TARGETS, tiny_model  # noqa: E402

BATCH, LENGTH, RANK = 2, 24, 4


def counted(recompute: bool) -> int:
    """Flops of forward and backward with frozen base weights, eager attention, all tokens scored."""
    base = tiny_model()
    base.set_attn_implementation("eager")
    if recompute:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()  # as ours and every peer: dX of the first layer too
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=12, target_modules=list(TARGETS))).train()
    ids = torch.randint(0, 300, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops()


def expected(recompute: bool, rank: int = RANK) -> float:
    """The floor's flops as an eager forward does them.

    Its attention multiplies all T x T scores, twice the causal half, and keeps them: 2 backward, not 2.5. torch's
    recompute stops at the last tensor that it needs, before the product with down_proj's B.
    """
    config = tiny_model().config.to_dict()
    parts = ceilings.flops_per_token(config, LENGTH, rank, recompute)
    forward = parts["attention"] / (4.5 if recompute else 3.5)
    eager = 2 * forward * (4 if recompute else 3)
    spared = 2 * config["num_hidden_layers"] * rank * config["hidden_size"] if recompute else 0
    return BATCH * LENGTH * (parts["frozen"] + parts["lora"] + parts["head"] + eager - spared)


@pytest.mark.parametrize("recompute", [False, True])
def test_flops_are_those_that_torch_counts(recompute):
    assert counted(recompute) == expected(recompute)


def test_another_rank_or_recompute_does_not_fit():
    """The negative control."""
    assert counted(False) not in (expected(False, rank=RANK + 1), expected(True))


def test_floor_of_the_large_setting():
    """32 layers of 4 x 4096^2 + 3 x 4096 x 11008 weights; 8192 tokens; 720 TFLOP/s and 3 TB/s."""
    config = published_config("qwen1.5-7b")
    limits = {"flops_per_s": 720e12, "copy_bytes_per_s": 3e12}
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    lora = 32 * 64 * (4 * 8192 + 3 * 15104)
    token = 6 * weights + 4 * 4096 * 151936 + 4.5 * 32 * 2 * 2048 * 4096 + 8 * lora
    found = ceilings.floor(config, limits, batch=4, length=2048, rank=64)
    assert found["products_ms"] == pytest.approx(1e3 * 8192 * token / 720e12)
    assert found["products_ms"] == pytest.approx(512, abs=2)
    assert found["unpack_ms"] == pytest.approx(1e3 * 2 * weights * 2.515869 / 3e12, rel=1e-5)
    assert found["optimizer_ms"] == pytest.approx(1e3 * 28 * lora / 3e12)
    assert found["ms"] == pytest.approx(sum(found[part] for part in ("products_ms", "unpack_ms", "optimizer_ms")))
    without = ceilings.floor(config, limits, batch=4, length=2048, rank=64, recompute=False)
    assert without["products_ms"] == pytest.approx(360, rel=0.02)


def test_a_pass_with_the_adapter_off_is_one_more_forward_of_the_base():
    config = published_config("qwen1.5-7b")
    limits = {"flops_per_s": 1e15, "copy_bytes_per_s": 1e12}
    plain, more = (
        ceilings.floor(config, limits, batch=4, length=1024, rank=64, reference_pass=passes) for passes in (False, True)
    )
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    token = 2 * weights + 2 * 4096 * 151936 + 32 * 2 * 1024 * 4096
    assert more["products_ms"] - plain["products_ms"] == pytest.approx(1e3 * 4096 * token / 1e15)
    assert more["unpack_ms"] == pytest.approx(1.5 * plain["unpack_ms"])
    assert more["optimizer_ms"] == plain["optimizer_ms"]


def test_accumulation_repeats_all_but_the_optimizer_and_16_bit_needs_no_unpacking():
    config = published_config("qwen2-7b")
    limits = {"flops_per_s": 1e15, "copy_bytes_per_s": 1e12}
    one, four = (ceilings.floor(config, limits, batch=1, length=1024, rank=8, accumulation=n) for n in (1, 4))
    assert four["products_ms"] == pytest.approx(4 * one["products_ms"])
    assert four["unpack_ms"] == pytest.approx(4 * one["unpack_ms"])
    assert four["optimizer_ms"] == one["optimizer_ms"]
    assert ceilings.floor(config, limits, batch=1, length=1024, rank=8, quantised=False)["unpack_ms"] == 0


def test_grouped_heads_have_narrow_k_and_v():
    shapes = ceilings.linears(published_config("qwen2-7b"))
    assert shapes["k"] == shapes["v"] == (3584, 512)
    assert shapes["q"] == shapes["o"] == (3584, 3584)


def test_input_sets_go_round():
    seen: list[int] = []
    seconds = ceilings.median_seconds(seen.append, sets=3, cuda=False, repeats=4, warmup=2)
    assert seen == [0, 1, 2, 0, 0, 1, 2, 0]  # four to warm up, four timed
    assert 0 < seconds < 1


def test_measure_gives_the_best_product():
    found = ceilings.measure("cpu", 1 << 16, ((8, 8, 8), (16, 16, 16)))
    assert found["flops_per_s"] == max(found["products"].values())
    assert set(found["products"]) == {"8x8x8", "16x16x16"}
    assert math.isfinite(found["copy_bytes_per_s"])
