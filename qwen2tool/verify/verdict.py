"""From figures to one word and one sentence: equivalent, different, or undecided.

A hand-set tolerance is either too loose for fp32 or too tight for bf16. The bar is the reference's own noise, measured
in the same run: how far its 16-bit run is from its fp32 run on the same text (`limits` holds the multiples). What the
files show outranks the logits, in both directions; and where matrices differ, so does a layer that does something else
on the same input than its rounding explains. A mistake that is named in the tensors (`diagnose`) is one
however little it does. A user's `tolerance` replaces all that but what vectors, names and config.json show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from qwen2tool.verify.inventory import InventoryComparison, in_words
from qwen2tool.verify.layer_figures import Beyond, LayerFigures, first_beyond, worst_beyond
from qwen2tool.verify.limits import (
    FEWEST_TOKENS,
    MATRIX_MULTIPLE,
    NOISE_MULTIPLE,
    ROUTE_LUCK,
    SMALLEST_99_KLD,
    SMALLEST_MEAN_KLD,
    STANDARD_ERRORS,
)
from qwen2tool.verify.statistics import LogitFigures
from qwen2tool.verify.tensors import TensorComparison

Verdict = Literal["equivalent", "different", "undecided"]
Decision = tuple[Verdict, str]
ROUNDING_ADVICE = "what was lost was lost in the rounding of the weights, so store them finer (merge --dtype float32)"
"""Where a right merge is another function: 0.76 of the update of a 7B trained for 30 steps was lost to bf16."""
NAMED = "the tensors show a mistake, which the diagnosis names, however little it does"
NAMED_MANY = "the tensors show mistakes, which the diagnosis names, however little they do"
NF4_ADVICE = (
    "the adapter was trained on the NF4 base, and this is a right merge onto the 16-bit base, which is another "
    "function; leave --adapter-on out to hold it against the 16-bit base"
)


def decide(
    inventory: InventoryComparison,
    tensors: list[TensorComparison],
    biases: list[str],
    figures: LogitFigures | None,
    floor: LogitFigures | None,
    hindrance: str | None = None,
    *,
    tolerance: float | None = None,
    layers: Sequence[LayerFigures] = (),
    dtype: str = "bfloat16",
    on_nf4: bool = False,
    mistakes: Sequence[str] = (),
) -> Decision:
    """The verdict and its reason.

    Args:
        biases: what `describe_biases` says.
        figures, floor: the candidate's and the reference's own; None where the logits were not compared.
        hindrance: why they were not.
        tolerance: the largest mean KLD that passes, instead of the noise.
        layers, dtype: the errors layer by layer, and what the model is meant to run in.
        on_nf4: whether the reference's logits are those of adapters on the base in NF4, unlike its tensors.
        mistakes: sentences that name one in the tensors, and that a reader is shown beside the reason.
    """
    advice = NF4_ADVICE if on_nf4 else ROUNDING_ADVICE
    verdict, reason = _decide(inventory, tensors, biases, figures, floor, hindrance, tolerance, layers, dtype, advice)
    if verdict != "different" and mistakes and tolerance is None:
        return "different", f"{NAMED if len(mistakes) == 1 else NAMED_MANY}; {reason}"
    return verdict, reason


def _decide(
    inventory: InventoryComparison,
    tensors: list[TensorComparison],
    biases: list[str],
    figures: LogitFigures | None,
    floor: LogitFigures | None,
    hindrance: str | None,
    tolerance: float | None,
    layers: Sequence[LayerFigures],
    dtype: str,
    advice: str,
) -> Decision:
    if (fault := _fault_in_files(inventory, tensors, biases)) is not None:
        return "different", fault
    identical = all(tensor.kind == "identical" for tensor in tensors)
    if figures is None or floor is None:
        if identical:
            return "equivalent", "every tensor is byte-identical and config.json agrees; no logits were compared"
        return "undecided", f"the logits could not be compared: {hindrance}"
    if floor.nll_reference != floor.nll_reference:
        return "undecided", "the reference itself predicts NaN or Inf on this text"
    if not figures.finite:
        return "different", "the candidate predicts NaN or Inf on this text"
    if identical:
        return _by_identity(figures)
    if figures.tokens < FEWEST_TOKENS:
        tokens = "1 token" if figures.tokens == 1 else f"{figures.tokens} tokens"
        return "undecided", f"the text scores only {tokens}; at least {FEWEST_TOKENS} are needed"
    different = [t for t in tensors if t.kind == "different"]
    if tolerance is not None:
        return _by_tolerance(different, figures, tolerance)
    if not floor.finite:
        return "undecided", "the reference in its 16-bit dtype predicts NaN or Inf: there is no noise to judge by"
    first = first_beyond(layers, dtype)
    decision = _by_logits(different, figures, floor, advice)
    if not different or first is None:
        return decision
    return _by_layers(decision, first, worst_beyond(layers, dtype) or first)


def _fault_in_files(inventory: InventoryComparison, tensors: list[TensorComparison], biases: list[str]) -> str | None:
    faults = ["readers refuse its config.json"] if inventory.unusable else []
    faults += biases
    for name, (mine, theirs) in inventory.config.items():
        faults.append(f"config.json has {name} {in_words(theirs)}, the reference {in_words(mine)}")
    if inventory.other_width:
        return "; ".join([*faults, _count(inventory.misshapen, "of another shape")])
    if inventory.renamed:
        faults.append(_count([*inventory.renamed], "there under another name"))
    known = {*inventory.renamed, *inventory.renamed.values()}
    missing = [n for n in inventory.missing if n not in known and not (biases and n.endswith(".bias"))]
    extra = [name for name in inventory.extra if name not in known]
    for names, what in ((missing, "missing"), (extra, "extra"), ([*inventory.misshapen], "of another shape")):
        if names:
            faults.append(_count(names, what))
    beyond = [t for t in tensors if t.kind == "different" and t.is_vector]
    # Biases are named above, in words; a q/k/v bias among them would be said twice.
    vectors = [t.name for t in beyond if not (biases and t.name.endswith(".bias"))]
    if vectors:
        faults.append(_count(vectors, "different beyond rounding"))
    return "; ".join(faults) or None


def _count(names: tuple[str, ...] | list[str], what: str) -> str:
    if len(names) == 1:
        return f"{names[0]} is {what}"
    return f"{len(names)} tensors are {what}, the first is {names[0]}"


def _by_identity(figures: LogitFigures) -> Decision:
    if figures.kld_mean <= SMALLEST_MEAN_KLD:
        return "equivalent", "every tensor is byte-identical, config.json and the logits agree"
    return "undecided", (
        f"every tensor is byte-identical, but the logits are not the same (mean KLD {figures.kld_mean:.2g}): "
        "this machine does not compute the same twice"
    )


def _by_logits(different: list[TensorComparison], figures: LogitFigures, floor: LogitFigures, advice: str) -> Decision:
    """The rule of the bars, for tensors that are not all identical."""
    mean_ratio = figures.kld_mean / max(floor.kld_mean, SMALLEST_MEAN_KLD)
    tail_ratio = figures.kld_99 / max(floor.kld_99, SMALLEST_99_KLD)
    margin = STANDARD_ERRORS * figures.kld_mean_se / max(floor.kld_mean, SMALLEST_MEAN_KLD)
    tensors = _account(different)
    noise = f"{mean_ratio:.3g} times the reference's own noise in the mean and {tail_ratio:.3g} at 99 %"
    if mean_ratio - margin > NOISE_MULTIPLE and not different:
        return "different", f"the logits differ by {noise}, though {tensors}: {advice}"
    if mean_ratio - margin > NOISE_MULTIPLE:
        return "different", f"the logits differ by {noise}, and {tensors}"
    if max(mean_ratio, tail_ratio) > NOISE_MULTIPLE:
        return "undecided", f"the logits differ by {noise}, too close to {NOISE_MULTIPLE} for this text; {tensors}"
    if different and max(mean_ratio, tail_ratio) > MATRIX_MULTIPLE:
        return "undecided", f"{tensors}, and the logits differ by {noise}: about as much as noise, but not noise alone"
    if any(t.is_table for t in different):
        return "undecided", f"{tensors}: rows of tokens that the text does not use cannot be judged by its logits"
    return "equivalent", f"{tensors}, and the logits differ by {noise}"


def _by_tolerance(different: list[TensorComparison], figures: LogitFigures, tolerance: float) -> Decision:
    found = f"the mean KLD is {figures.kld_mean:.2g}, {tolerance:.2g} is allowed; {_account(different)}"
    margin = STANDARD_ERRORS * figures.kld_mean_se
    if figures.kld_mean <= tolerance:
        return "equivalent", found
    return ("undecided" if figures.kld_mean - margin <= tolerance else "different"), found


def _by_layers(decision: Decision, first: Beyond, worst: Beyond) -> Decision:
    """Adds where it begins, and takes back an "equivalent": unlike a text's logits, a layer cannot make up for it."""
    verdict, reason = decision
    where = (
        f"on the same input the {first.part} of layer {first.layer} is off by {first.error:.2g}, "
        f"where the reference's own rounding makes {first.noise:.2g}"
    )
    if verdict != "different":
        verdict = "different" if worst.ratio > ROUTE_LUCK else "undecided"
    return verdict, f"{reason}; {where}"


def _account(different: list[TensorComparison]) -> str:
    if not different:
        return "every tensor is the expected one within one rounding"
    return _count([t.name for t in different], "different beyond rounding")
