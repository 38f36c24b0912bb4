"""From figures to one word and one sentence: equivalent, different, or undecided.

A hand-set tolerance is either too loose for fp32 or too tight for bf16. The bar is the reference's own noise, measured
in the same run: how far its 16-bit run is from its fp32 run on the same text.
"""

from __future__ import annotations

from math import isfinite
from typing import Literal

from qwen2tool.verify.inventory import InventoryComparison
from qwen2tool.verify.statistics import LogitFigures
from qwen2tool.verify.tensors import TensorComparison

Verdict = Literal["equivalent", "different", "undecided"]
NOISE_MULTIPLE = 1.5
"""An implementation may be off by this much of what the reference itself is off by."""
SMALLEST_KLD = 1e-8
"""What fp32 sums in another order cost on a vocabulary of 150,000; a floor below it is none."""
STANDARD_ERRORS = 2.0
"""A mean within so many standard errors of the bar is on neither side of it."""
FEWEST_TOKENS = 32
"""Below, neither a mean nor its error says anything."""


def decide(
    inventory: InventoryComparison,
    tensors: list[TensorComparison],
    biases: list[str],
    figures: LogitFigures | None,
    floor: LogitFigures | None,
) -> tuple[Verdict, str]:
    """The verdict and its reason; faults that the files show outrank whatever the logits say."""
    if (fault := _fault_in_files(inventory, tensors, biases)) is not None:
        return "different", fault
    if figures is None or floor is None:
        return "undecided", "the logits could not be compared"
    if figures.tokens < FEWEST_TOKENS:
        return "undecided", f"the text scores only {figures.tokens} tokens, at least {FEWEST_TOKENS} are needed"
    if not isfinite(figures.nll_reference):
        return "undecided", "the reference itself predicts NaN or Inf on this text"
    if not isfinite(figures.kld_mean):
        return "different", "the candidate predicts NaN or Inf on this text"
    return _by_logits(tensors, figures, floor)


def _fault_in_files(inventory: InventoryComparison, tensors: list[TensorComparison], biases: list[str]) -> str | None:
    if biases:
        return "; ".join(biases)
    if inventory.config:
        name, (mine, theirs) = next(iter(inventory.config.items()))
        return f"config.json makes another function of the tensors: {name} is {theirs}, the reference has {mine}"
    for names, what in ((inventory.missing, "missing"), (inventory.extra, "extra"), (inventory.misshapen, "misshapen")):
        if names:
            return f"{len(names)} tensors are {what}, the first is {names[0]}"
    vectors = [tensor.name for tensor in tensors if tensor.kind == "different" and tensor.is_vector]
    return f"{len(vectors)} norms or biases differ, the first is {vectors[0]}" if vectors else None


def _by_logits(tensors: list[TensorComparison], figures: LogitFigures, floor: LogitFigures) -> tuple[Verdict, str]:
    bar = NOISE_MULTIPLE * max(floor.kld_mean, SMALLEST_KLD)
    tail_bar = NOISE_MULTIPLE * max(floor.kld_99, SMALLEST_KLD)
    margin = STANDARD_ERRORS * figures.kld_mean_se
    measured = f"mean KLD {figures.kld_mean:.2g}, 99 % {figures.kld_99:.2g}; the bar is {bar:.2g} and {tail_bar:.2g}"
    if figures.kld_mean - margin > bar:
        return "different", f"the logits differ by more than the reference's own noise ({measured})"
    if figures.kld_mean + margin > bar or figures.kld_99 > tail_bar:
        return "undecided", f"the logits differ by about the reference's own noise ({measured}): more text would tell"
    if all(tensor.kind == "identical" for tensor in tensors):
        return "equivalent", "every tensor is byte-identical and the logits agree"
    return "equivalent", f"the logits agree within the reference's own noise ({measured})"
