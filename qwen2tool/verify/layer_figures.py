"""The errors of one decoder layer, and which of them the reference's own rounding cannot explain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import NamedTuple

from qwen2tool.verify.limits import NOISE_MULTIPLE, ROUTE_FLOOR

PARTS = ("q", "k", "v", "attention", "mlp", "output")
"""What is compared in a layer: projections with their bias and before RoPE, what attention and MLP add to the stream,
and the stream behind the layer."""
Errors = Mapping[str, float]
"""||found - truth|| / ||truth|| over all tokens, by name; infinite where something is not finite."""


class Beyond(NamedTuple):
    """One error above its bar: `error` is the candidate's, `noise` the reference's own, `ratio` error over bar."""

    layer: int
    part: str
    error: float
    noise: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class LayerFigures:
    """One layer against the reference's in fp32.

    Attributes:
        index: which.
        own: errors (of `PARTS`) of the candidate's layer on the reference's hidden states: its own fault. Empty where
            only one side has the layer.
        accumulated: the same on the candidate's own hidden states.
        own_noise: errors of the reference's layer in the dtype meant to run, on the reference's hidden states.
        noise: the same on its own hidden states, for each of the noise runs.
        gradients: errors of the gradient of "input" and of LoRA matrices ("self_attn.q_proj.lora_A"), on the
            reference's hidden states; empty unless asked for.
        gradient_noise: of the reference's layer in the dtype meant to run.
    """

    index: int
    own: Errors
    accumulated: Errors
    own_noise: Errors
    noise: Mapping[str, Errors]
    gradients: Errors = field(default_factory=dict)
    gradient_noise: Errors = field(default_factory=dict)

    def beyond(self, dtype: str) -> list[Beyond]:
        """Own errors above `NOISE_MULTIPLE` times the noise and a floor, the furthest first; gradients included."""
        pairs = [(f"{part}", e, self.own_noise.get(part, inf)) for part, e in self.own.items()]
        pairs += [(f"gradient of {n}", e, self.gradient_noise.get(n, inf)) for n, e in self.gradients.items()]
        found = []
        for part, error, noise in pairs:
            bar = NOISE_MULTIPLE * noise + ROUTE_FLOOR[dtype]
            if not error <= bar and isfinite(bar):
                found.append(Beyond(self.index, part, error, noise, error / bar))
        return sorted(found, key=lambda b: -b.ratio)


def first_beyond(layers: Sequence[LayerFigures], dtype: str) -> Beyond | None:
    """The worst error of the first layer that has one above its bar."""
    return next((found[0] for layer in layers if (found := layer.beyond(dtype))), None)


def worst_beyond(layers: Sequence[LayerFigures], dtype: str) -> Beyond | None:
    """The error furthest above its bar, of all layers."""
    return max((found[0] for layer in layers if (found := layer.beyond(dtype))), key=lambda b: b.ratio, default=None)
