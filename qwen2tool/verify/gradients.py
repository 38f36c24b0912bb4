"""Fifth level: what a step of LoRA training on either side would see, layer by layer on the same input.

A checkpoint may answer like its original and train unlike it (a lost bias of v moves logits little, and the gradient of
everything behind it). So every layer gets LoRA of rank 8 on its seven linears, random and the same on all sides, and a
random gradient from above; compared are the gradients of A, B and of the layer's input. B is not zero, since A would
have no gradient then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from qwen2tool.verify.single import ALPHA, RANK, SEED, random_pairs

if TYPE_CHECKING:
    from qwen2tool.verify.one_layer import OneLayer
    from qwen2tool.verify.stream import Batch

Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True)
class GradientInput:
    """Which layer, and the hidden states (N, H) of some batches that all sides start from."""

    TOKENS: ClassVar[int] = 256

    index: int
    parts: list[tuple[Batch, torch.Tensor]]


def layer_gradients(layer: OneLayer, given: GradientInput) -> Gradients:
    """Gradients by name on the CPU in fp32: "input" (N, H), "self_attn.q_proj.lora_A" (rank, in) and its like.

    A layer in 16 bit is run under autocast with its adapters in fp32, as it trains.
    """
    pairs = {
        name: tuple(values.to(layer.device).requires_grad_() for values in pair)
        for name, pair in random_pairs(layer.side.view, given.index).items()
    }
    parameters = {
        f"{name}.{side}": v for name, pair in pairs.items() for side, v in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    found: Gradients = {}
    inputs = []
    generator = torch.Generator().manual_seed(SEED + given.index)
    with layer.trained({name: (a, b, ALPHA / RANK) for name, (a, b) in pairs.items()}):
        for batch, rows in given.parts:
            dy = torch.randn(rows.shape, generator=generator)
            x = rows.to(layer.device, layer.dtype).requires_grad_()
            x_gradient, *gradients = _backward(layer, batch, x, list(parameters.values()), dy)
            inputs.append(x_gradient)
            for name, gradient in zip(parameters, gradients, strict=True):
                found[name] = found[name] + gradient if name in found else gradient
    return {"input": torch.cat(inputs), **found}


def _backward(
    layer: OneLayer, batch: Batch, x: torch.Tensor, parameters: list[torch.Tensor], dy: torch.Tensor
) -> list[torch.Tensor]:
    half = x.dtype != torch.float32
    with torch.enable_grad(), torch.autocast(x.device.type, x.dtype if half else torch.bfloat16, enabled=half):
        y = layer.run(batch, x)["output"]
        found = torch.autograd.grad(y, [x, *parameters], dy.to(y.device, y.dtype))
    return [gradient.float().cpu() for gradient in found]


def gradient_errors(found: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The relative error of each gradient."""
    return {name: relative_error(found[name], wanted) for name, wanted in truth.items()}


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """||found - truth|| / ||truth|| in fp64; infinite where `found` is not finite, or is not zero where truth is."""
    if found.shape != truth.shape:
        return float("inf")
    difference = (found.double() - truth.double()).norm().item()
    if difference != difference:
        return float("inf")
    size = truth.double().norm().item()
    return difference / size if size else float("inf") if difference else 0.0
