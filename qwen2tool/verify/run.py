"""`verify`: the three stages in order; later ones run even where an earlier one found a fault, to say what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from qwen2tool.checkpoint.adapter import Adapter, open_adapter, require_fit
from qwen2tool.checkpoint.folder import Checkpoint, open_checkpoint
from qwen2tool.checkpoint.inventory import require_whole
from qwen2tool.checkpoint.load import Dtype
from qwen2tool.data.samples import Sample
from qwen2tool.verify.inventory import InventoryComparison, compare_inventories
from qwen2tool.verify.logits import Predictions, compare, predict, predict_damaged, targets_of
from qwen2tool.verify.report import Report
from qwen2tool.verify.statistics import LogitFigures
from qwen2tool.verify.tensors import compare_tensors, describe_biases
from qwen2tool.verify.verdict import decide

SIXTEEN_BIT: dict[str, Dtype] = {"BF16": "bfloat16", "F16": "float16"}


def verify(
    reference: Path | str,
    candidate: Path | str,
    samples: Sequence[Sample],
    *,
    adapter: Path | None = None,
    adapter_on: Literal["16bit", "nf4"] = "16bit",
    device: str = "cpu",
    max_tokens: int = 4096,
) -> Report:
    """Compares `candidate` with `reference`, or with `reference` + `adapter`.

    Args:
        samples: text to compare on; taken from the start until `max_tokens` are reached.
        adapter_on: with an adapter, what carries it: the 16-bit base, or that base in NF4 (the function QLoRA trained).
        device: "cpu" or "cuda".

    Raises:
        UserError: a reference that is not a whole Qwen2, an adapter that does not fit, a damaged file.
    """
    mine, theirs = open_checkpoint(reference), open_checkpoint(candidate)
    require_whole(mine)
    opened = open_adapter(adapter) if adapter else None
    if opened:
        require_fit(opened, mine)
    inventory = compare_inventories(mine, theirs)
    tensors = compare_tensors(mine, theirs, opened)
    biases = describe_biases(inventory.missing, tensors, mine.geometry.num_hidden_layers)
    notes: list[str] = []
    figures = floor = None
    floor_of = ""
    if (hindrance := _cannot_run(inventory, theirs)) is not None:
        notes.append(f"logits not compared: {hindrance}")
    else:
        if inventory.missing:
            notes.append("the candidate ran with zeros for what is missing, as transformers fills it in")
        chosen = _first(samples, max_tokens)
        figures, floor, floor_of = _compare_logits(mine, theirs, opened, adapter_on == "nf4", chosen, device)
    verdict, reason = decide(inventory, tensors, biases, figures, floor)
    return Report(
        reference=str(reference),
        candidate=str(candidate),
        adapter=str(adapter) if adapter else None,
        verdict=verdict,
        reason=reason,
        inventory=inventory,
        tensors=tensors,
        biases=biases,
        figures=figures,
        floor=floor,
        floor_of=floor_of,
        notes=tuple(notes),
        environment=_environment(device),
    )


def _cannot_run(inventory: InventoryComparison, candidate: Checkpoint) -> str | None:
    if candidate.geometry.model_type != "qwen2":
        return f"the candidate is a {candidate.geometry.model_type!r}"
    if candidate.geometry.quantization is not None:
        return "the candidate is quantised"
    lost = [name for name in inventory.missing if not name.endswith(".bias")]
    if lost or inventory.misshapen:
        return f"{(lost or list(inventory.misshapen))[0]} is missing or of another shape"
    return None


def _first(samples: Sequence[Sample], max_tokens: int) -> list[Sample]:
    chosen: list[Sample] = []
    for sample in samples:
        if chosen and sum(len(s.ids) for s in chosen) + len(sample.ids) > max_tokens:
            break
        chosen.append(sample)
    return chosen


def _compare_logits(
    mine: Checkpoint, theirs: Checkpoint, adapter: Adapter | None, nf4: bool, samples: Sequence[Sample], device: str
) -> tuple[LogitFigures, LogitFigures, str]:
    """(candidate's figures, floor's figures, what the floor is); one model in memory at a time."""

    def reference(dtype: Dtype, attention: Literal["sdpa", "eager"], label: str) -> Predictions:
        return predict(
            mine, samples, adapter=adapter, dtype=dtype, device=device, nf4=nf4, attention=attention, label=label
        )

    targets = targets_of(samples)
    truth = reference("float32", "sdpa", "reference, float32")
    # The dtype that the pair is stored in; where that is fp32 on both sides, another order of the same sums.
    stored = next((d for side in (theirs, mine) if (d := _storage(side))), None)
    if stored:
        noisy = reference(stored, "sdpa", f"reference, {stored}")
    else:
        noisy = reference("float32", "eager", "reference, float32 eager")
    floor = compare(truth, noisy, targets)
    del noisy
    figures = compare(truth, predict_damaged(theirs, samples, device, "candidate, float32"), targets)
    return figures, floor, f"reference in {stored} against float32" if stored else "reference, eager against sdpa"


def _storage(checkpoint: Checkpoint) -> Dtype | None:
    dtypes = [info.dtype for info in checkpoint.tensors.values() if len(info.shape) == 2]
    return SIXTEEN_BIT.get(max(set(dtypes), key=dtypes.count))


def _environment(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    return {"device": name, **{package: version(package) for package in ("torch", "transformers", "peft")}}
