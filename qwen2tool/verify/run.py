"""`verify`: the three stages in order; later ones run even where an earlier one found a fault, to say what it costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from qwen2tool.checkpoint.adapter import Adapter, fingerprint, open_adapter, require_fit
from qwen2tool.checkpoint.folder import Checkpoint, open_checkpoint
from qwen2tool.checkpoint.geometry import rope_disagreement
from qwen2tool.checkpoint.inventory import require_whole, take_inventory
from qwen2tool.checkpoint.load import Dtype
from qwen2tool.data.samples import Sample
from qwen2tool.errors import UserError
from qwen2tool.verify.biases import describe_biases
from qwen2tool.verify.inventory import InventoryComparison, compare_inventories
from qwen2tool.verify.logits import Predictions, compare, predict, predict_candidate, targets_of
from qwen2tool.verify.report import Report
from qwen2tool.verify.statistics import LogitFigures
from qwen2tool.verify.tensors import compare_tensors
from qwen2tool.verify.verdict import decide

COARSENESS: dict[str, Dtype] = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors' dtypes from the finest to the coarsest, with the dtype that a model of them runs in."""


def verify(
    reference: Path | str,
    candidate: Path | str,
    samples: Sequence[Sample],
    *,
    adapter: Path | None = None,
    adapter_on: Literal["16bit", "nf4"] = "16bit",
    device: str = "cpu",
    dtype: Dtype | None = None,
    max_tokens: int = 4096,
) -> Report:
    """Compares `candidate` with `reference`, or with `reference` + `adapter`.

    Args:
        samples: text to compare on; taken from the start until `max_tokens` are reached, the last one cut.
        adapter_on: with an adapter, what carries it: the 16-bit base, or that base in NF4 (the function QLoRA trained).
        device: "cpu" or "cuda".
        dtype: in which the model is meant to run: the reference's rounding noise in it is the floor. None: the coarser
            of what the two are stored in. The comparison itself is in fp32.

    Raises:
        UserError: a reference that is not a whole Qwen2, an adapter that does not fit, a damaged file, a quantised
            checkpoint or another architecture on either side, a token id beyond the reference's vocabulary.
    """
    start = time.perf_counter()
    mine, theirs = open_checkpoint(reference), open_checkpoint(candidate)
    _require_comparable(mine, theirs)
    opened = _open_adapter(adapter, adapter_on, mine)
    chosen = first_samples(samples, max_tokens, mine)
    inventory = compare_inventories(mine, theirs)
    tensors = compare_tensors(mine, theirs, opened)
    biases = describe_biases(inventory.missing, tensors, mine.geometry.num_hidden_layers)
    figures = floor = None
    floor_of = ""
    hindrance = _cannot_run(inventory, theirs, chosen)
    if hindrance is None:
        running = dtype or _coarser(mine, theirs)
        figures, floor, floor_of = _compare_logits(mine, theirs, opened, adapter_on == "nf4", chosen, device, running)
    verdict, reason = decide(inventory, tensors, biases, figures, floor, hindrance)
    return Report(
        reference=str(reference),
        candidate=str(candidate),
        adapter=str(adapter) if adapter else None,
        adapter_on=adapter_on if adapter else None,
        verdict=verdict,
        reason=reason,
        inventory=inventory,
        tensors=tensors,
        biases=biases,
        figures=figures,
        floor=floor,
        floor_of=floor_of,
        notes=tuple(_notes(mine, theirs, opened, adapter_on, inventory, hindrance)),
        environment=environment(device),
        seconds=time.perf_counter() - start,
    )


def _require_comparable(reference: Checkpoint, candidate: Checkpoint) -> None:
    """Passes a whole reference and a candidate of its kind."""
    for side in (reference, candidate):
        _require_plain(side)
    require_reference(reference)


def _require_plain(side: Checkpoint) -> None:
    if side.geometry.model_type != "qwen2":
        raise UserError(f"{side.path}: model_type is {side.geometry.model_type!r}, not 'qwen2'", "Convert it first")
    if side.geometry.quantization is not None:
        raise UserError(f"{side.path}: is quantised", "Compare the 16- or 32-bit checkpoint")
    for name, info in side.tensors.items():
        if info.dtype not in COARSENESS:
            raise UserError(f"{side.path}: {name} is {info.dtype}", "Compare the 16- or 32-bit checkpoint")


def require_reference(reference: Checkpoint) -> None:
    """Passes a whole Qwen2 in 16 or 32 bit.

    Raises:
        UserError: with exit code 2 also where something is missing: code 1 says that the other side differs, which
            nobody can know then.
    """
    _require_plain(reference)
    try:
        require_whole(reference)
    except UserError as error:
        raise UserError(f"the reference is not whole: {error.what}", error.fix) from None


def _open_adapter(path: Path | None, adapter_on: str, base: Checkpoint) -> Adapter | None:
    if path is None:
        if adapter_on == "nf4":
            raise UserError("--adapter-on is nf4, but there is no --adapter", "Name the adapter, or leave it out")
        return None
    adapter = open_adapter(path)
    # Another base than the trained one is a note: a merge onto it was asked for by name, and has to be judged as it is.
    require_fit(adapter, base, allow_other_base=True)
    return adapter


def first_samples(samples: Sequence[Sample], max_tokens: int, reference: Checkpoint) -> list[Sample]:
    """The samples that `max_tokens` leave room for, the last one cut, without those that score nothing.

    Raises:
        UserError: a token id beyond the reference's vocabulary.
    """
    chosen: list[Sample] = []
    room = max_tokens
    for sample in samples:
        kept = sample.shortened(room)
        largest, known = max(kept.ids, default=0), reference.geometry.vocab_size
        if largest >= known:
            raise UserError(
                f"record {sample.record}: token id {largest}, {reference.path} knows {known}",
                "Tokenise the text with the reference's own tokenizer",
            )
        if any(kept.scored[1:]):
            chosen.append(kept)
            room -= len(kept.ids)
        if room < 2:
            break
    return chosen


def _cannot_run(inventory: InventoryComparison, candidate: Checkpoint, samples: Sequence[Sample]) -> str | None:
    """Why the logits cannot be compared; missing biases are no reason, transformers has zeros for them."""
    found = take_inventory(candidate)
    lost = [name for name in found.missing if name not in found.missing_biases]
    if lost:
        return f"the candidate has no {lost[0]}"
    if found.misshapen:
        return f"the candidate's {next(iter(found.misshapen))} does not have the shape that its config.json asks for"
    if "vocab_size" in inventory.config:
        return "the two have different vocabularies"
    return None if samples else "nothing in the text is scored"


def _compare_logits(
    mine: Checkpoint,
    theirs: Checkpoint,
    adapter: Adapter | None,
    nf4: bool,
    samples: Sequence[Sample],
    device: str,
    running: Dtype,
) -> tuple[LogitFigures, LogitFigures, str]:
    """(candidate's figures, floor's figures, what the floor is); one model in memory at a time."""

    def reference(dtype: Dtype, attention: Literal["sdpa", "eager"], label: str) -> Predictions:
        return predict(
            mine, samples, adapter=adapter, dtype=dtype, device=device, nf4=nf4, attention=attention, label=label
        )

    targets = targets_of(samples)
    truth = reference("float32", "sdpa", "reference, float32")
    if running == "float32":  # no rounding to measure: another order of the same sums
        noisy, floor_of = reference("float32", "eager", "reference, float32 eager"), "eager against sdpa, float32"
    else:  # sdpa: 16-bit eager attention rounds its scores, which real k biases make large
        noisy, floor_of = reference(running, "sdpa", f"reference, {running}"), f"{running} against float32"
    floor = compare(truth, noisy, targets)
    del noisy
    figures = compare(truth, predict_candidate(theirs, samples, device, "candidate, float32"), targets)
    return figures, floor, floor_of


def _coarser(*checkpoints: Checkpoint) -> Dtype:
    """The coarsest dtype of any matrix: what the function is stored in is what it is going to run in."""
    order = list(COARSENESS)
    stored = {info.dtype for side in checkpoints for info in side.tensors.values() if len(info.shape) == 2}
    return COARSENESS[max(stored, key=order.index)]


def _notes(
    mine: Checkpoint,
    theirs: Checkpoint,
    adapter: Adapter | None,
    adapter_on: str,
    inventory: InventoryComparison,
    hindrance: str | None,
) -> list[str]:
    """What a reader of the figures has to know beside them."""
    notes = []
    if hindrance is not None:
        notes.append(f"logits not compared: {hindrance}")
    elif any(name.endswith(".bias") for name in inventory.missing):
        notes.append("the candidate ran with zeros for its missing biases, exactly as transformers loads it")
    if adapter and adapter.base_fingerprint not in (None, fingerprint(mine)):
        notes.append(f"the adapter was trained on another base than {mine.path}")
    if adapter and adapter_on == "nf4":
        notes.append("tensors are held against the 16-bit base + adapter, logits against the adapter on the NF4 base")
    if (disagreement := rope_disagreement(theirs.config)) and not rope_disagreement(mine.config):
        notes.append(f"config.json of the candidate: {disagreement}")
    if mine.geometry.tie_word_embeddings != theirs.geometry.tie_word_embeddings:
        notes.append("tie_word_embeddings differs; the heads were compared by what they hold")
    return notes


def environment(device: str) -> dict[str, str]:
    """The device by name, and the versions that a figure depends on."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    return {"device": name, **{package: version(package) for package in ("torch", "transformers", "peft")}}
