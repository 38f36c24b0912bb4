"""The losses against arithmetic that a reader can redo, and against transformers' own."""

import math

import pytest
import torch

from qwen2tool.training.losses import dpo_sigmoid, token_log_probs


def test_token_log_probs_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(4.0), 0.0]]], dtype=torch.bfloat16).float()
    found = token_log_probs(logits, torch.tensor([[1, 1]]))
    # softmax([0, ln 3]) = [1/4, 3/4]; softmax([ln 4, 0]) = [4/5, 1/5]; bf16 keeps three digits of the logits
    assert found[0].tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 5)], abs=5e-3)


def test_dpo_by_hand():
    numbers = [torch.tensor([value]) for value in (-10.0, -12.0, -11.0, -11.0)]
    terms = dpo_sigmoid(*numbers, beta=0.5)
    # rewards 0.5 * (-10 + 11) = 0.5 and 0.5 * (-12 + 11) = -0.5; loss = -ln sigmoid(1) = ln(1 + e^-1)
    assert terms.rewards_chosen.item() == 0.5 and terms.rewards_rejected.item() == -0.5
    assert terms.loss.item() == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-6)
    swapped = dpo_sigmoid(numbers[1], numbers[0], numbers[3], numbers[2], beta=0.5)
    assert swapped.loss.item() == pytest.approx(math.log(1 + math.e), rel=1e-6)


def test_dpo_at_the_reference_is_ln_2_with_gradient_beta_half():
    chosen = torch.tensor([-3.0], requires_grad=True)
    rejected = torch.tensor([-4.0], requires_grad=True)
    loss = dpo_sigmoid(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.3).loss.sum()
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert chosen.grad.item() == pytest.approx(-0.15) and rejected.grad.item() == pytest.approx(0.15)
