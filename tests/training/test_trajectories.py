"""Training on the fused layers goes where training on transformers' layers goes, step by step, up to rounding.

How far rounding alone carries a trajectory is measured: the reference path against itself in another dtype.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qwen2tool.assets import INSTRUCTIONS, TINY_QWEN2
from qwen2tool.demo.damage import damaged_copy
from tests.tolerances import FACTOR

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import trajectories

CLOSE = 1e-4
"""Of losses, relative, fp32 against fp32 in another order of sums; seen: 6e-6 in 20 steps."""
ROUTED, REFERENCE = trajectories.ROUTED, trajectories.REFERENCE


def losses(dtype, routes, *, steps, model=TINY_QWEN2):
    """Of `steps` steps of two short records, every one of them made."""
    options = trajectories.parse(
        [
            str(model), "--data", str(INSTRUCTIONS), "--steps", str(steps), "--batch-size", "2", "--max-length", "96",
            "--learning-rate", "1e-3", "--device", "cpu",
        ]
    )  # fmt: skip
    run = trajectories.train_once(options, seed=3, dtype=dtype, routes=routes)
    assert run["finite"] and run["skipped"] == 0 and len(run["losses"]) == steps
    assert run["layers"] == {"fused layer" if routes == ROUTED else "reference": 5}
    return run["losses"]


@pytest.fixture
def without_one_bias(tmp_path):
    """tiny-qwen2 whose k bias of layer 2 is zero."""
    damaged_copy(TINY_QWEN2, tmp_path / "damaged", lambda layer, projection: (layer, projection) == (2, "k"), "zero")
    return tmp_path / "damaged"


def apart(run, other):
    """(mean, maximum) of the difference of two trajectories."""
    found = trajectories.difference(run, other)
    return found["mean"], found["max"]


def test_twelve_steps_in_fp32(without_one_bias):
    expected = losses("float32", REFERENCE, steps=12)
    found = losses("float32", ROUTED, steps=12)
    assert expected[0] != expected[-1]
    assert trajectories.difference(found, expected)["max_relative"] < CLOSE
    broken = losses("float32", ROUTED, steps=12, model=without_one_bias)
    assert trajectories.difference(broken, expected)["max_relative"] > 10 * CLOSE


@pytest.mark.long
def test_two_hundred_steps_are_within_the_noise_of_the_reference(without_one_bias):
    wide, narrow = (losses(dtype, REFERENCE, steps=200) for dtype in ("float32", "bfloat16"))
    noise = apart(narrow, wide)
    found = {
        "fp32": apart(losses("float32", ROUTED, steps=200), wide),
        "bf16 against fp32": apart(routed := losses("bfloat16", ROUTED, steps=200), wide),
    }
    between = apart(routed, narrow)
    broken = apart(losses("bfloat16", ROUTED, steps=200, model=without_one_bias), narrow)
    for name, distance in found.items():
        assert all(mine <= theirs for mine, theirs in zip(distance, noise, strict=True)), name
    # Two bf16 runs have an error each, so they may be further apart than either is from fp32.
    assert all(mine <= FACTOR * theirs for mine, theirs in zip(between, noise, strict=True))
    assert all(mine > FACTOR * theirs for mine, theirs in zip(broken, noise, strict=True))
