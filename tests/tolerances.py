"""The one tolerance rule of the test suite: an implementation against a truth, beside the reference in its dtype.

Errors are ||out - truth|| / ||truth|| in float64. An implementation may be at most FACTOR times as wrong as the plain
PyTorch reference in the same dtype, plus FLOOR (what one rounding of the output may cost where the reference is exact).
"""

from __future__ import annotations

import math

import torch

FACTOR = 1.5
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 8e-4}


def relative_error(out: torch.Tensor, truth: torch.Tensor) -> float:
    """||out - truth|| / ||truth||, infinite where anything is not finite."""
    assert out.shape == truth.shape, (out.shape, truth.shape)
    out, truth = out.detach().double().cpu(), truth.detach().double().cpu()
    if not bool(out.isfinite().all()):
        return float("inf")
    return float((out - truth).norm() / truth.norm().clamp(min=1e-300)) if truth.numel() else 0.0


def bound(reference: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest error that passes beside `reference`."""
    return FACTOR * relative_error(reference, truth) + FLOOR[dtype]


def assert_as_good(out: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    """Passes `out` if its error against `truth` is within the rule; `reference` is PyTorch in `dtype`."""
    error, limit = relative_error(out, truth), bound(reference, truth, dtype)
    assert error <= limit, f"error {error:.2e} above {limit:.2e} (reference {relative_error(reference, truth):.2e})"


EACH, LOST = 6.0, 0.5
"""Of many errors that are compared together: what a single one may be beside the other's, and what none may be."""
LEAST = 1e-12
"""Of an error, where a ratio is taken."""


def ratio(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Geometric mean over all tensors of our error by theirs; infinite where ours is."""
    if not all(map(math.isfinite, ours.values())):
        return math.inf
    logs = [math.log((ours[name] + LEAST) / (theirs[name] + LEAST)) for name in ours]
    return math.exp(sum(logs) / len(logs))


def assert_no_worse(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Our errors may be FACTOR times theirs over all tensors together, and EACH times in a single one, where a gradient
    that is lost (error 1) would be drowned by dozens that are right."""
    found = ratio(ours, theirs)
    assert found <= FACTOR, (found, {name: (ours[name], theirs[name]) for name in ours})
    wrong = {name: (ours[name], theirs[name]) for name in ours if ours[name] > min(EACH * theirs[name] + LEAST, LOST)}
    assert not wrong, wrong
    return found
