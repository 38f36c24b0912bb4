"""What the comparison of fused layers with transformers' own found; `to_json` is the documented form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, NamedTuple

from qwen2tool.checkpoint.load import Dtype
from qwen2tool.verify.limits import FEWEST_TOKENS, NOISE_MULTIPLE, ROUTE_FLOOR, ROUTE_LUCK
from qwen2tool.verify.report import EXIT_CODES
from qwen2tool.verify.verdict import Decision, Verdict

WHOLE = ("output", "input gradient")
"""What a layer has beside the gradients of its adapters."""


class Errors(NamedTuple):
    """Relative errors of one tensor against the truth: of transformers' own layer, and of what the route runs."""

    reference: float
    routed: float


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer.

    Attributes:
        index: which.
        not_fused: why it takes the reference path; None where it is fused.
        finite: whether the truth is.
        errors: of "output", "input gradient" and the gradient of each adapter matrix ("self_attn.q_proj.lora_A").
    """

    index: int
    not_fused: str | None
    finite: bool
    errors: dict[str, Errors]

    @property
    def judgeable(self) -> bool:
        """Whether truth and reference are finite: the noise to judge by."""
        return self.finite and all(isfinite(error.reference) for error in self.errors.values())

    def ratios(self, dtype: Dtype) -> dict[str, float]:
        """Routed error over the bar of the same tensor; above 1 it is too large. Infinite where there is no bar."""
        bars = {n: NOISE_MULTIPLE * e.reference + ROUTE_FLOOR[dtype] for n, e in self.errors.items()}
        return {n: error.routed / bars[n] if isfinite(bars[n]) else inf for n, error in self.errors.items()}

    def worst(self, dtype: Dtype) -> tuple[str, float]:
        """The tensor nearest to its bar, or furthest beyond it, and its ratio."""
        return max(self.ratios(dtype).items(), key=lambda item: item[1])

    def linear(self, name: str) -> Errors | None:
        """The larger errors of the two gradients of one linear's adapter, None where it has none."""
        found = [self.errors[key] for side in "AB" if (key := f"{name}.lora_{side}") in self.errors]
        return Errors(max(e.reference for e in found), max(e.routed for e in found)) if found else None


@dataclass(frozen=True, kw_only=True)
class RouteReport:
    """Verdict and figures. `truth` is the dtype of the truth, `lengths` those of the sequences compared on."""

    model: str
    adapter: str | None
    quantize: str
    dtype: Dtype
    truth: str
    lengths: tuple[int, ...]
    verdict: Verdict
    reason: str
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...]
    environment: dict[str, str]
    seconds: float

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    @property
    def fused(self) -> int:
        """How many layers are."""
        return sum(layer.not_fused is None for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Keys: schema_version, model, adapter, quantize, dtype, truth, lengths, verdict, exit_code, reason, fused,
        layers (index, not_fused, worst, and errors: name -> reference, routed, ratio to the bar), multiple and floor of
        the bar, notes, environment, seconds. What is not finite is null."""
        return {
            "schema_version": 1,
            "model": self.model,
            "adapter": self.adapter,
            "quantize": self.quantize,
            "dtype": self.dtype,
            "truth": self.truth,
            "lengths": list(self.lengths),
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "reason": self.reason,
            "fused": self.fused,
            "layers": [_layer_json(layer, self.dtype) for layer in self.layers],
            "multiple": NOISE_MULTIPLE,
            "floor": ROUTE_FLOOR[self.dtype],
            "notes": list(self.notes),
            "environment": self.environment,
            "seconds": self.seconds,
        }


def _layer_json(layer: LayerReport, dtype: Dtype) -> dict[str, Any]:
    ratios = layer.ratios(dtype)
    errors = {n: {"reference": e.reference, "routed": e.routed, "ratio": ratios[n]} for n, e in layer.errors.items()}
    plain = {n: {k: v if isfinite(v) else None for k, v in values.items()} for n, values in errors.items()}
    return {"index": layer.index, "not_fused": layer.not_fused, "worst": layer.worst(dtype)[0], "errors": plain}


class _Found(NamedTuple):
    """One error with its place; sorts by how far beyond its bar it is."""

    ratio: float
    layer: int
    name: str
    errors: Errors

    def __str__(self) -> str:
        kind = self.name if self.name in WHOLE else f"gradient of {self.name}"
        size = "not finite" if self.errors.routed == inf else f"off by {self.errors.routed:.2g}"
        return (
            f"layer {self.layer}: the {kind} is {size}, where transformers' own is off by {self.errors.reference:.2g}"
        )


def decide_routes(layers: Sequence[LayerReport], dtype: Dtype, tokens: int) -> Decision:
    """The verdict and its reason: every error of every layer against its bar."""
    if tokens < FEWEST_TOKENS:
        return "undecided", f"the text has only {tokens} tokens; at least {FEWEST_TOKENS} are needed"
    beyond = [
        _Found(ratio, layer.index, name, layer.errors[name])
        for layer in layers
        if layer.judgeable
        for name, ratio in layer.ratios(dtype).items()
        if not ratio <= 1
    ]
    worst = max(beyond, default=None)
    if worst is not None and worst.ratio > ROUTE_LUCK:
        return "different", f"{worst}; {_extent(beyond, layers)}"
    if (dark := next((layer.index for layer in layers if not layer.judgeable), None)) is not None:
        return (
            "undecided",
            f"layer {dark}: transformers' own gives NaN or Inf in {dtype}, so there is no noise to judge by",
        )
    if worst is not None:
        return "undecided", f"{worst}, too close for this text; try a longer one"
    return "equivalent", _agreement(layers)


def _extent(beyond: list[_Found], layers: Sequence[LayerReport]) -> str:
    """How much is wrong, and whether the forward is: a lost bias moves everything, a lost gradient itself alone."""
    count, where = sum(len(layer.errors) for layer in layers), len({found.layer for found in beyond})
    forward = "outputs are among them" if any(found.name == WHOLE[0] for found in beyond) else "the outputs agree"
    return f"{len(beyond)} of {count} tensors in {where} of {len(layers)} layers are beyond their bar, {forward}"


def _agreement(layers: Sequence[LayerReport]) -> str:
    fused = [layer for layer in layers if layer.not_fused is None]
    count = sum(len(layer.errors) for layer in layers)
    near = f"all {count} outputs and gradients are as near to the truth as transformers' own"
    if not fused:
        return f"no layer is fused ({layers[0].not_fused}), and {near}"
    return f"{len(fused)} of {len(layers)} layers are fused, and {near}"
