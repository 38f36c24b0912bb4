"""No stock attention of a routed model runs cuDNN with a mask, in the forward or where layers are computed again."""

from __future__ import annotations

import pytest
import torch

from qwen2tool.routing.swap import route
from tests.routing.models import batch, lora_model, padding


def cudnn_switches(monkeypatch, model, **inputs):
    """Whether cuDNN attention was allowed, at each call of a forward pass and of its backward."""
    allowed, honest = [], torch.nn.functional.scaled_dot_product_attention

    def spy(*arguments, **options):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return honest(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        loss = model(input_ids=batch(), use_cache=False, **inputs).logits.sum()
        forward = len(allowed)
        loss.backward()
    return allowed[:forward], allowed[forward:]


def test_a_recomputed_reference_layer_sees_no_cudnn_attention_either(monkeypatch):
    model = lora_model(use_dora=True)
    assert route(model).counts == {"reference": 3}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    forward, recomputed = cudnn_switches(monkeypatch, model.train())
    assert forward == [False] * 3
    assert recomputed == [False] * 3


@pytest.mark.parametrize("routed", [False, True])
def test_a_pass_handed_to_the_original_sees_no_cudnn_attention(routed, monkeypatch):
    """cuDNN's backward with a mask returns NaN for Qwen2's biases; unrouted, the model is transformers' own affair."""
    model = lora_model()
    if routed:
        route(model)
    asked = {"attention_mask": padding("left"), "output_hidden_states": True}
    forward, _ = cudnn_switches(monkeypatch, model, **asked)
    assert forward == [not routed] * 3
