"""The one tolerance rule of the test suite: an implementation against a truth, beside the reference in its dtype.

Errors are ||out - truth|| / ||truth|| in float64. An implementation may be at most FACTOR times as wrong as the plain
PyTorch reference in the same dtype, plus FLOOR (what one rounding of the output may cost where the reference is exact).
"""

from __future__ import annotations

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
