"""Stops a run at the first number that is not finite, before anything is made of it.

transformers' own answer is `logging_nan_inf_filter`: it prints an average instead, steps on, and saves an adapter of
NaN with exit code 0 (seen with Qwen2.5-0.5B on stock attention). Cost: one reduction over the gradients and one wait
for the device a batch.
"""

from __future__ import annotations

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

    def enter(self, step: int, records: torch.Tensor) -> None:
        """Marks the batch of `records` (positions in the file), which is part of optimizer step `step` (from 1)."""
        self._step, self._records = step, records.tolist()

    def __str__(self) -> str:
        return f"step {self._step}, batch of {', '.join(self._places[r] for r in self._records)}"


def require_finite_loss(loss: torch.Tensor, where: Whereabouts) -> None:
    """Passes a finite scalar.

    Raises:
        UserError: NaN or infinite.
    """
    if not torch.isfinite(loss):
        raise UserError(f"{where}: the loss is {loss.item()}", REMEDY, EXIT_FINDING)


def require_finite_gradients(model: torch.nn.Module, where: Whereabouts) -> None:
    """Passes a model whose every gradient is finite.

    Raises:
        UserError: names the first parameter with a NaN or infinite gradient, and how many more there are.
    """
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    if not named:
        return
    finite = torch.isfinite(torch.stack([norm.float() for norm in torch._foreach_norm([grad for _, grad in named])]))
    if not finite.all():
        bad = [name for (name, _), good in zip(named, finite.tolist(), strict=True) if not good]
        raise UserError(
            f"{where}: the gradient of {bad[0]} is not finite (nor are {len(bad) - 1} more of {len(named)})",
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
