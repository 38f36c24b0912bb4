"""scripts/gradient_proof.py on the bundled model: its truth against finite differences, its errors, its k biases."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from qwen2tool.assets import INSTRUCTIONS, TINY_QWEN2
from tests.tolerances import FACTOR

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import gradient_proof


@pytest.fixture(scope="module")
def options():
    return argparse.Namespace(
        model=TINY_QWEN2, data=INSTRUCTIONS, tokens=120, device="cpu", peers=["unsloth"], dtypes=["bfloat16"],
        peer_seconds=60.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def batch(options):
    return gradient_proof.padded(gradient_proof.choose(options), "cpu")


@pytest.fixture(scope="module")
def part(options):
    return gradient_proof.measure(options)


def test_ours_is_nearer_to_the_truth_than_transformers(part):
    found = part["errors"]["bfloat16"]
    assert 0 < part["tokens"] <= 120 and 0 < part["answer_tokens"] < part["tokens"]
    for who in ("ours", "hf sdpa", "hf eager"):
        assert found[who]["finite"] and found[who]["loss"] == pytest.approx(part["loss"], rel=2e-2)
        assert len(found[who]["q_proj"]) == 5
        assert 0 < found[who]["all"] < 0.5
    assert (
        found["ours"]["all"] < found["hf sdpa"]["all"] and found["ours"]["q_proj_all"] < found["hf sdpa"]["q_proj_all"]
    )


def test_norms_of_k_biases_cost_others_their_digits(part):
    found = part["k_bias"]["errors"]["bfloat16"]
    ours, theirs = ([line["q_proj"] for line in found[who]] for who in ("ours", "hf sdpa"))
    assert max(ours) < 1.3 * ours[0]
    assert theirs[-1] > FACTOR * theirs[0]  # the negative control: such biases do cost digits


def test_a_peer_that_is_not_there_is_an_error_line(part):
    assert "unsloth" in part["errors"]["bfloat16"]["unsloth"]["error"]
    json.dumps(part)


def test_truth_is_the_slope_of_the_loss(options, batch):
    """A central difference along the gradient; against another gradient's length it is far off."""
    model = gradient_proof.adapted(options, "float32").double()
    truth, _ = gradient_proof.true_gradients(model, batch)
    length = sum(float(g.double().square().sum()) for g in truth.values()) ** 0.5
    names = {gradient_proof.key_of(n): p for n, p in model.named_parameters() if "lora_" in n}
    step, losses = 1e-3, []  # the loss is fp32: a smaller step drowns in its rounding
    for sign in (1, -1):
        for key, gradient in truth.items():
            names[key].data.add_(gradient.double(), alpha=sign * step / length)
        with torch.no_grad():
            losses.append(model(**batch).loss.item())
        for key, gradient in truth.items():
            names[key].data.sub_(gradient.double(), alpha=sign * step / length)
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(length, rel=1e-3)
    assert (losses[0] - losses[1]) / (2 * step) != pytest.approx(0.99 * length, rel=1e-3)


def test_everybody_gets_the_same_adapters(options):
    first, second = (gradient_proof.adapted(options, "float32") for _ in range(2))
    pairs = [(p, dict(second.named_parameters())[n]) for n, p in first.named_parameters() if "lora_" in n]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(bool(a.any()) for a, _ in pairs)
    assert not torch.equal(pairs[0][0], pairs[14][0])  # the next layer's
    del first.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"]
    with pytest.raises(RuntimeError, match="69 matrices"):
        gradient_proof.fill_adapters(first)


def test_set_k_biases_have_the_norm_and_change_no_function(options, batch):
    model = gradient_proof.adapted(options, "float32").double()
    logits = []
    for norm in (0.0, 1000.0):
        gradient_proof.set_k_biases(model, norm)
        biases = [p for n, p in model.named_parameters() if n.endswith("k_proj.base_layer.bias")]
        assert len(biases) == 5 and all(float(b.norm()) == pytest.approx(norm) for b in biases)
        with torch.no_grad():
            logits.append(model(**batch).logits[batch["attention_mask"] != 0])
    assert (logits[1] - logits[0]).norm() / logits[0].norm() < 0.1
    with torch.no_grad():
        biases[0].copy_(biases[0].flip(0))  # into the fastest frequencies: another function
        changed = model(**batch).logits[batch["attention_mask"] != 0]
    assert (changed - logits[0]).norm() / logits[0].norm() > 0.1


def test_relative_error_by_hand_and_of_what_is_not_finite():
    truth = {"0.a": torch.tensor([3.0, 4.0]), "0.b": torch.tensor([12.0])}
    assert gradient_proof.relative_error({"0.a": torch.tensor([3.0, 4.5])}, truth, ["0.a"]) == pytest.approx(0.1)
    found = {"0.a": torch.tensor([3.0, 4.0]), "0.b": torch.tensor([12.0 + 1.3])}
    assert gradient_proof.relative_error(found, truth, list(truth)) == pytest.approx(0.1)
    found["0.b"][0] = torch.nan
    assert math.isnan(gradient_proof.relative_error(found, truth, list(truth)))
