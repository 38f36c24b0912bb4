"""Stops a run at the first number that is not finite, before anything is made of it.

transformers' own answer is `logging_nan_inf_filter`: it prints an average instead, steps on, and saves an adapter of
NaN with exit code 0 (seen with Qwen2.5-0.5B on stock attention). Cost: one reduction over the gradients and one wait
for the device a pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from math import isfinite

import torch

from qwen2tool.errors import EXIT_FINDING, UserError

REMEDY = (
    "Nothing was stepped, logged or saved from it. Look at these records, lower --learning-rate, or go on from the "
    "last checkpoint with --resume"
)


class Whereabouts:
    """Which batch is being worked on, for the sentence that names it."""

    def __init__(self, places: list[str]) -> None:
        self._places = places
        self._step = 0
        self._records: list[int] = []

    def enter(self, step: int, records: list[int]) -> None:
        """Marks the batch of `records` (positions in the file), which is part of optimizer step `step` (from 1)."""
        self._step, self._records = step, records

    def __str__(self) -> str:
        return f"step {self._step}, batch of {', '.join(self._places[r] for r in self._records)}"


def require_finite_loss(loss: float, where: Whereabouts) -> None:
    """Passes a finite number.

    Raises:
        UserError: NaN or infinite.
    """
    if not isfinite(loss):
        raise UserError(f"{where}: the loss is {loss}", REMEDY, EXIT_FINDING)


def norms_of(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """The norm of each of G gradients, (G,): finite where all of it is."""
    return torch.stack([norm.float() for norm in torch._foreach_norm(list(gradients))])


def on_host(values: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    """The numbers of each tensor, all of which are waited for and fetched at once."""
    found = iter(torch.cat([value.double().flatten() for value in values.values()]).tolist())
    return {name: list(islice(found, value.numel())) for name, value in values.items()}


def require_finite_gradients(norms: Mapping[str, float], where: Whereabouts) -> None:
    """Passes norms that are all finite.

    Raises:
        UserError: names the first parameter with a NaN or infinite gradient, and how many more there are.
    """
    bad = [name for name, norm in norms.items() if not isfinite(norm)]
    if bad:
        raise UserError(
            f"{where}: the gradient of {bad[0]} is not finite (nor are {len(bad) - 1} more of {len(norms)})",
            REMEDY,
            EXIT_FINDING,
        )


def require_finite_weights(model: torch.nn.Module) -> None:
    """Passes a model whose trainable weights are all finite; called before anything is saved.

    Raises:
        UserError: names the first that is not.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise UserError(
                f"{name} is not finite after the last step", "Lower --learning-rate; nothing was saved", EXIT_FINDING
            )
