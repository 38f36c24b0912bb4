"""`verify`: the levels in order; later ones run even where an earlier one found a fault, to say what it costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qwen2tool.checkpoint.adapter import ADAPTER_CONFIG
from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.inventory import require_whole
from qwen2tool.checkpoint.load import Dtype
from qwen2tool.checkpoint.view import View
from qwen2tool.console import progress
from qwen2tool.data.samples import Sample
from qwen2tool.errors import UserError
from qwen2tool.verify.biases import describe_biases
from qwen2tool.verify.diagnose import Diagnosis, diagnose
from qwen2tool.verify.inventory import InventoryComparison, cannot_run, compare_inventories
from qwen2tool.verify.layer_figures import LayerFigures
from qwen2tool.verify.layers import LayerComparison, Setting, same_layers
from qwen2tool.verify.logits import LastStates, compare_logits
from qwen2tool.verify.notes import notes_on
from qwen2tool.verify.patterns.sentences import without_config
from qwen2tool.verify.report import Report, largest
from qwen2tool.verify.sides import Base, Sides, open_sides
from qwen2tool.verify.statistics import LogitFigures
from qwen2tool.verify.stream import Store, text_of
from qwen2tool.verify.tensors import TensorComparison, compare_tensors
from qwen2tool.verify.usable import refusal, require_usable
from qwen2tool.verify.verdict import decide
from qwen2tool.verify.work import Work, stamp

COARSENESS: dict[str, Dtype] = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors' dtypes from the finest to the coarsest, with the dtype that a model of them runs in."""
Names = str | Path | Sequence[str | Path] | None


def verify(
    reference: Path | str,
    candidate: Path | str,
    samples: Sequence[Sample],
    *,
    adapter: Names = None,
    adapter_on: Base = "16bit",
    candidate_adapter: Names = None,
    device: str = "cpu",
    dtype: Dtype | None = None,
    max_tokens: int = 4096,
    gradients: bool = False,
    tolerance: float | None = None,
    work: Path | None = None,
    generate: int = 0,
    tasks: Sequence[str] = (),
    tokenizer: Any = None,
) -> Report:
    """Compares `candidate` with `reference`, or with `reference` + adapters.

    Args:
        reference, candidate: folders, files or Hub ids of anything that holds a Qwen2; an adapter's folder is its base
            with the adapter.
        samples: text to compare on; taken from the start until `max_tokens` are reached, the last one cut.
        adapter: one or several on the reference, in order.
        adapter_on: what carries them: the base as it is, or that base in NF4 (the function QLoRA trained).
        candidate_adapter: one or several on the candidate.
        device: "cpu" or "cuda".
        dtype: in which the model is meant to run: the reference's rounding noise in it is the floor. None: the coarser
            of what the two are stored in. The comparison itself is in fp32.
        gradients: compare those of LoRA and of each layer's input too.
        tolerance: a mean KLD that is allowed, instead of the noise.
        work: a folder in which a killed run is taken up again.
        generate: tokens of greedy continuations to compare; whole models are in memory then, one at a time.
        tasks: of lm-eval, on which to score both; the same holds.
        tokenizer: to show continuations as text.

    Raises:
        UserError: a reference that is not a whole Qwen2, an adapter that does not fit, a damaged file, a format that is
            not read or another architecture on either side, a token id beyond the reference's vocabulary, a task that
            cannot be run.
    """
    start = time.perf_counter()
    adapters = _listed(adapter)
    sides = open_sides(
        reference,
        candidate,
        adapters=adapters,
        adapter_on=adapter_on,
        candidate_adapters=_listed(candidate_adapter),
    )
    require_usable(sides.reference.view)
    _require_answerable(sides, generate, tasks)
    chosen = first_samples(samples, max_tokens, sides.stored)
    running = dtype or _coarser(sides.stored, sides.candidate.view)
    kept = Work(work, _key(sides, chosen, adapter_on, device, running, gradients) if work else {})
    found = _measure(sides, chosen, Setting(device=device, dtype=running, gradients=gradients), adapter_on, kept)
    generations, scores = None, None
    if found.hindrance is None:
        generations = _generations(sides, chosen, generate, device, running, tokenizer) if generate else None
        scores = _scores(sides, tasks, device, running) if tasks else None
    kept.finish()
    diagnoses = _diagnose(sides, found)
    verdict, reason = decide(
        found.inventory,
        found.tensors,
        found.biases,
        found.figures,
        largest(found.floors),
        found.hindrance,
        tolerance=tolerance,
        layers=found.layers,
        dtype=running,
        on_nf4=adapter_on == "nf4",
        mistakes=[diagnosis.sentence for diagnosis in diagnoses if diagnosis.is_fault],
    )
    return Report(
        reference=str(reference),
        candidate=str(candidate),
        adapters=tuple(map(str, adapters)),
        adapter_on=adapter_on if sides.reference.adapters else None,
        kinds=(sides.reference.view.kind, sides.candidate.view.kind),
        verdict=verdict,
        reason=without_config(reason) if sides.candidate.view.origin.format == "gguf" else reason,
        diagnoses=diagnoses,
        inventory=found.inventory,
        tensors=found.tensors,
        biases=found.biases,
        dtype=running,
        layers=found.layers,
        figures=found.figures,
        floors=found.floors,
        tolerance=tolerance,
        notes=tuple(notes_on(sides, found.inventory, found.floors, found.hindrance, running, adapter_on)),
        environment=environment(device),
        seconds=time.perf_counter() - start,
        generations=generations,
        tasks=scores,
    )


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What the levels found; `hindrance` says why the functions were not compared."""

    inventory: InventoryComparison
    tensors: list[TensorComparison]
    biases: list[str]
    hindrance: str | None
    figures: LogitFigures | None
    floors: dict[str, LogitFigures]
    layers: list[LayerFigures]


def _measure(sides: Sides, samples: Sequence[Sample], setting: Setting, adapter_on: str, kept: Work) -> _Measured:
    inventory = compare_inventories(sides.stored, sides.candidate.view)
    if not inventory.unusable and (why := refusal(sides.candidate.view)) is not None:
        inventory = replace(inventory, unusable=(why,))
    tensors = _compare_tensors(sides, kept)
    figures: LogitFigures | None = None
    floors: dict[str, LogitFigures] = {}
    layers: list[LayerFigures] = []
    hindrance = _hindrance(sides, inventory, samples)
    if hindrance is None:
        same = frozenset() if adapter_on == "nf4" or inventory.config else _same_layers(inventory, tensors)
        figures, floors, layers = _compare_functions(sides, samples, replace(setting, identical=same), kept)
    return _Measured(
        inventory=inventory,
        tensors=tensors,
        biases=_describe_biases(sides, inventory, tensors),
        hindrance=hindrance,
        figures=figures,
        floors=floors,
        layers=layers,
    )


def _describe_biases(sides: Sides, inventory: InventoryComparison, tensors: list[TensorComparison]) -> list[str]:
    if inventory.other_width:
        return []
    missing = [name for name in inventory.missing if name not in inventory.renamed]
    return describe_biases(missing, tensors, sides.stored.geometry.num_hidden_layers)


def _listed(names: Names) -> list[str | Path]:
    if names is None:
        return []
    return [names] if isinstance(names, str | Path) else list(names)


def require_reference(reference: Checkpoint) -> None:
    """Passes a whole Qwen2 in 16 or 32 bit, as its files are.

    Raises:
        UserError: with exit code 2 also where something is missing: code 1 says that the other side differs, which
            nobody can know then.
    """
    if reference.format == "gguf" or not (reference.folder / "config.json").is_file():
        raise UserError(
            f"{reference.path}: a file without a config.json, and training takes a folder",
            f"Make one with `qwen2tool convert {reference.path} OUT`, and use that",
        )
    if reference.geometry.quantization is not None:
        raise UserError(f"{reference.path}: is quantised", "Use the 16- or 32-bit checkpoint")
    for name, info in reference.tensors.items():
        if info.dtype not in COARSENESS:
            raise UserError(f"{reference.path}: {name} is {info.dtype}", "Use the 16- or 32-bit checkpoint")
    try:
        require_whole(reference)
    except UserError as error:
        raise UserError(f"the reference is not whole: {error.what}", error.fix) from None
    require_usable(reference)


def first_samples(samples: Sequence[Sample], max_tokens: int, reference: Checkpoint | View) -> list[Sample]:
    """The samples that `max_tokens` leave room for, the last one cut, without those that score nothing.

    Raises:
        UserError: a token id beyond the reference's vocabulary.
    """
    chosen: list[Sample] = []
    room = max_tokens
    for sample in samples:
        kept = sample.shortened(room)
        largest_id, known = max(kept.ids, default=0), reference.geometry.vocab_size
        if largest_id >= known:
            raise UserError(
                f"record {sample.record}: token id {largest_id}, {reference.path} knows {known}",
                "Tokenise the text with the reference's own tokenizer",
            )
        if any(kept.scored[1:]):
            chosen.append(kept)
            room -= len(kept.ids)
        if room < 2:
            break
    return chosen


def _key(
    sides: Sides, samples: Sequence[Sample], adapter_on: str, device: str, dtype: str, gradients: bool
) -> dict[str, Any]:
    """What a work folder holds for: sources, text, settings and versions."""
    origins = [sides.stored.origin, sides.candidate.view.origin]
    files = [file for origin in origins for file in (*origin.shards, origin.folder / "config.json")]
    sources = {
        s.file for view in (sides.candidate.view,) for t in view.tensors.values() for s in getattr(t, "sources", ())
    }
    files += sorted(sources - set(files))
    files += sorted({file.parent / ADAPTER_CONFIG for file in sources})  # a candidate's adapters, and their scaling
    files += [file for adapter in sides.reference.adapters for file in sorted(adapter.path.iterdir())]
    return {
        "files": stamp(files),
        "text": [(sample.ids, sample.scored) for sample in samples],
        "settings": [adapter_on, device, dtype, gradients],
        "environment": environment(device),
    }


def _hindrance(sides: Sides, inventory: InventoryComparison, samples: Sequence[Sample]) -> str | None:
    """Why the functions cannot be compared."""
    if inventory.unusable:
        return "readers refuse the candidate's config.json"
    if (why := cannot_run(sides.candidate.view)) is not None:
        return why
    if "vocab_size" in inventory.config:
        return "the two have different vocabularies"
    if "hidden_size" in inventory.config:
        return "the two have hidden states of different widths"
    return None if samples else "nothing in the text is scored"


def _compare_tensors(sides: Sides, kept: Work) -> list[TensorComparison]:
    if (done := kept.get("tensors")) is not None:
        return [TensorComparison(**values) for values in done]
    found = compare_tensors(sides.stored, sides.candidate.view, sides.reference.update)
    kept.put("tensors", [asdict(comparison) for comparison in found])
    return found


def _same_layers(inventory: InventoryComparison, tensors: Sequence[TensorComparison]) -> frozenset[int]:
    names = [*inventory.missing, *inventory.extra, *inventory.misshapen, *(t.name for t in tensors)]
    return same_layers(names, [t.name for t in tensors if t.kind == "identical"])


def _compare_functions(
    sides: Sides, samples: Sequence[Sample], setting: Setting, kept: Work
) -> tuple[LogitFigures, dict[str, LogitFigures], list[LayerFigures]]:
    """(candidate's figures, the floor's by run, layers)."""
    text, store = text_of(samples), Store(kept.rows)
    try:
        comparison = LayerComparison(sides.reference, sides.candidate, text, setting, store)
        layers = _through_layers(comparison, kept)
        last = {
            stream.name: LastStates(side=sides.reference, rows=stream.now, dtype=stream.dtype)
            for stream in (comparison.truth, *comparison.noise)
        }
        other = LastStates(side=sides.candidate, rows=comparison.other.now, dtype=torch.float32)
        truth, *noise = last.values()
        *floors, figures = compare_logits(truth, [*noise, other], text, setting.device)
    finally:
        store.close()
    return figures, {run.name: f for run, f in zip(setting.noise, floors, strict=True)}, layers


def _through_layers(comparison: LayerComparison, kept: Work) -> list[LayerFigures]:
    """All layers, from where the work folder leaves off; after each, its figures and the streams' state are kept."""
    done = kept.get("layers") or {"figures": [], "state": None}
    layers = [LayerFigures(**values) for values in done["figures"]]
    if done["state"] is None:
        comparison.embed()
    else:
        comparison.resume(done["state"])
    with progress("comparing layers", comparison.passes) as advance:
        advance(comparison.passes * len(layers) / comparison.depth)
        for index in range(len(layers), comparison.depth):
            layers.append(comparison.step(index, advance))
            kept.put("layers", {"figures": [asdict(layer) for layer in layers], "state": comparison.state})
    return layers


def _diagnose(sides: Sides, found: _Measured) -> list[Diagnosis]:
    adapters = sides.reference.adapters
    return diagnose(sides.stored, sides.candidate.view, found.inventory, found.tensors, found.figures, adapters)


def _require_answerable(sides: Sides, generate: int, tasks: Sequence[str]) -> None:
    """Passes what the last levels need, before the work of the first ones, not after it."""
    if generate:
        from qwen2tool.verify.behaviour import end_tokens

        end_tokens(sides.reference.view)
    if tasks:
        from qwen2tool.verify.tasks import require_tasks

        require_tasks(tasks)


def _generations(
    sides: Sides, samples: Sequence[Sample], tokens: int, device: str, dtype: Dtype, tokenizer: Any
) -> dict[str, Any]:
    from qwen2tool.verify.behaviour import compare_generations

    both = (sides.reference, sides.candidate)
    return compare_generations(*both, samples, tokens, device=device, dtype=dtype, tokenizer=tokenizer).to_json()


def _scores(sides: Sides, tasks: Sequence[str], device: str, dtype: Dtype) -> dict[str, Any]:
    from qwen2tool.verify.tasks import compare_tasks

    found = compare_tasks(sides.reference, sides.candidate, tasks, device=device, dtype=dtype)
    return {"scores": [score.to_json() for score in found]}


def _coarser(*views: View) -> Dtype:
    """The coarsest dtype of any matrix: what the function is stored in is what it is going to run in."""
    order = list(COARSENESS)
    stored = {t.dtype for view in views for t in view.tensors.values() if len(t.shape) == 2 and t.dtype in COARSENESS}
    return COARSENESS[max(stored, key=order.index, default="F32")]


def environment(device: str) -> dict[str, str]:
    """The device by name, and the versions that a figure depends on."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    return {"device": name, **{package: version(package) for package in ("torch", "transformers", "peft")}}
