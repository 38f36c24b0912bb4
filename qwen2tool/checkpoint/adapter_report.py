"""`inspect` of a PEFT adapter: what it adapts, how strongly, in which layers, and whether any of it got lost.

Header only, without torch; with `values` every tensor is read once. Nothing is refused that can be shown: what a merge
would refuse is a note. Findings make the adapter wrong for everybody: half a pair, a rank that its config denies, a
layer that is missing, NaN, or a B that is all zero everywhere, which is an adapter that was never trained or was lost.

`AdapterReport.to_json()`; keys are only ever added while `schema_version` stays 1:

    schema_version  1
    kind            "adapter"
    path, verdict, exit_code, findings [sentence], notes [sentence]
    verdict         lora adapter | lora adapter with (what else) | not a lora adapter (peft_type)
    method          peft_type, task_type, peft_version, bias, init_lora_weights, rslora, extras [name of a setting]
    base            name (as adapter_config.json has it), revision, fingerprint (of our trainer, or null),
                    local (a folder here), layers (of a local base, or null), matches (true | false | null: not
                    compared)
    settings        r, lora_alpha, rank_pattern, alpha_pattern, lora_dropout, target_modules, exclude_modules,
                    layers_to_transform, modules_to_save (as written)
    targets         {name: {modules, layers [covered], missing [layers], ranks, alphas, scalings (ascending), shapes
                    ["out x in"], dtypes, numbers}}
    layers          count (of the base where it is here, else highest + 1), covered
    tensors         count, numbers, bytes, file, dtypes {name: count}, kinds {lora, embedding, magnitude, lora_bias,
                    bias, tokens, full, other: count}, unpaired [module], others [name]
    merge           possible, reason (sentence of what stands in the way, or null)
    values          null, or
        not_finite  [name]
        zero        {A, B: modules where that side is all zero}, pairs
        updates     {target: {mean, largest, layer}}: the Frobenius norm of scaling * B @ A, the layer of the largest
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2tool.checkpoint.adapter import REFUSED_KEYS, fingerprint, open_adapter, untargeted
from qwen2tool.checkpoint.adapter_parts import ADAPTER_BIN, AdapterFiles, Part, Scale, is_adapter, open_parts, scale_of
from qwen2tool.checkpoint.folder import Checkpoint, open_checkpoint
from qwen2tool.console import format_ranges
from qwen2tool.errors import EXIT_FINDING, UserError

__all__ = ["AdapterReport", "inspect_adapter", "is_adapter"]

SCHEMA_VERSION = 1
QWEN2_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTINGS = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "modules_to_save",
)
EXTRAS = {
    "magnitude": "DoRA magnitudes",
    "embedding": "LoRA on an embedding",
    "lora_bias": "biases of its own",
    "bias": "trained biases of the base",
    "tokens": "trained tokens",
    "full": "whole modules",
    "other": "tensors of another kind",
}
EFFECTS = {
    "magnitude": "DoRA: a merge has to rescale every row of W + sBA by a trained magnitude",
    "embedding": "an embedding is adapted: where the head is tied to it, a merge changes both",
    "lora_bias": "biases beside lora_B: a merge has to add them to the base's biases, scaled",
    "bias": "biases of the base were trained: a merge has to replace the base's with them",
    "tokens": "rows of the embedding were trained: a merge has to replace them, and to leave a tied head alone",
    "full": "whole modules were trained (modules_to_save): a merge has to replace the base's, and to untie a tied head",
    "other": "tensors that no plain LoRA has",
}
Pairs = dict[str, dict[str, Part]]


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """What was found; `sections` are the parts of `to_json()` from `method` on."""

    path: Path
    verdict: str
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    sections: dict[str, Any]

    @property
    def exit_code(self) -> int:
        return EXIT_FINDING if self.findings or self.verdict.startswith("not") else 0

    def to_json(self) -> dict[str, Any]:
        """The whole report as JSON values; the module docstring lists the keys."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "adapter",
            "path": str(self.path),
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "findings": list(self.findings),
            "notes": list(self.notes),
            **self.sections,
        }


def inspect_adapter(path: str | Path, values: bool = False) -> AdapterReport:
    """Inspects the PEFT adapter at `path` (its folder); with `values` its tensors are read as well.

    Raises:
        UserError: no adapter there, or damaged files.
    """
    files = open_parts(path)
    base, base_note = _open_base(files)
    pairs = _pairs(files)
    sections: dict[str, Any] = {
        "method": _method(files),
        "base": _base(files, base),
        "settings": {key: files.config.get(key) for key in SETTINGS},
        "layers": _layers(files, base),
    }
    sections["targets"] = _targets(files, pairs, sections["layers"]["count"])
    sections["tensors"] = _tensors(files, pairs)
    sections["merge"] = _merge(files)
    sections["values"] = None
    if values:
        from qwen2tool.checkpoint.adapter_values import measure

        sections["values"] = measure(files, pairs)
        if base is not None and sections["base"]["fingerprint"]:
            sections["base"]["matches"] = fingerprint(base) == sections["base"]["fingerprint"]
    findings = (
        *(f"{name}: {why}" for name, why in files.damaged.items()),
        *_pair_findings(files, pairs),
        *_cover_findings(sections),
        *_base_findings(files, pairs, base, sections),
    )
    notes = (*_notes(files, sections), *base_note)
    return AdapterReport(
        path=files.path,
        verdict=_verdict(sections),
        findings=(*findings, *_value_findings(sections["values"])),
        notes=(*notes, *_value_notes(sections["values"])),
        sections=sections,
    )


def _verdict(sections: dict[str, Any]) -> str:
    kind = sections["method"]["peft_type"]
    if kind != "LORA":
        return f"not a lora adapter (peft_type is {ascii(kind)[:40]})"
    extras = [words for kind, words in EXTRAS.items() if sections["tensors"]["kinds"].get(kind)]
    return "lora adapter" + (f" with {', '.join(extras)}" if extras else "")


def _open_base(files: AdapterFiles) -> tuple[Checkpoint | None, list[str]]:
    """The base where it is a folder here, and a note where that cannot be opened; no network."""
    name = files.config.get("base_model_name_or_path")
    try:
        if isinstance(name, str) and name and (Path(name).expanduser() / "config.json").is_file():
            return open_checkpoint(name), []
    except UserError as error:
        return None, [f"the base that it names cannot be opened: {error.what}"]
    except (OSError, ValueError):
        return None, []
    return None, []


def _pairs(files: AdapterFiles) -> Pairs:
    """Module -> side -> part, of what is A or B of a linear layer."""
    pairs: Pairs = {}
    for part in files.parts:
        if part.kind == "lora":
            pairs.setdefault(part.module, {})[part.side] = part
    return pairs


def _method(files: AdapterFiles) -> dict[str, Any]:
    config = files.config
    return {
        **{key: config.get(key) for key in ("peft_type", "task_type", "peft_version", "bias", "init_lora_weights")},
        "rslora": bool(config.get("use_rslora")),
        "extras": [key for key in REFUSED_KEYS if config.get(key)],
    }


def _base(files: AdapterFiles, base: Checkpoint | None) -> dict[str, Any]:
    stated = files.provenance.get("base_fingerprint")
    return {
        "name": files.config.get("base_model_name_or_path"),
        "revision": files.config.get("revision"),
        "fingerprint": stated if isinstance(stated, str) else None,
        "local": base is not None,
        "matches": None,
        "layers": base.geometry.num_hidden_layers if base else None,
    }


def _layers(files: AdapterFiles, base: Checkpoint | None) -> dict[str, Any]:
    covered = sorted({part.layer for part in files.parts if part.layer is not None})
    highest = covered[-1] + 1 if covered else 0
    return {"count": base.geometry.num_hidden_layers if base else highest, "covered": covered}


def _targets(files: AdapterFiles, pairs: Pairs, layers: int) -> dict[str, Any]:
    groups: dict[str, list[str]] = {}
    for module, sides in pairs.items():
        groups.setdefault(next(iter(sides.values())).target, []).append(module)
    order = {name: position for position, name in enumerate(QWEN2_LINEARS)}
    names = sorted(groups, key=lambda name: (order.get(name, len(order)), name))
    return {name: _target(files, pairs, groups[name], layers) for name in names}


def _target(files: AdapterFiles, pairs: Pairs, modules: list[str], layers: int) -> dict[str, Any]:
    parts = [part for module in modules for part in pairs[module].values()]
    covered = {part.layer for part in parts if part.layer is not None}
    scales = [scale_of(files.config, module) for module in modules]
    return {
        "modules": len(modules),
        "layers": sorted(covered),
        "missing": [layer for layer in range(layers) if layer not in covered] if covered else [],
        "ranks": sorted({part.info.shape[0] for part in parts if part.side == "A" and part.info.shape}),
        "alphas": _ascending(scales, "alpha"),
        "scalings": _ascending(scales, "scaling"),
        "shapes": sorted({shape for module in modules if (shape := _shape(pairs[module]))}),
        "dtypes": sorted({part.info.dtype for part in parts}),
        "numbers": sum(part.info.numel for part in parts),
    }


def _ascending(scales: list[Scale], field: str) -> list[float]:
    return sorted({getattr(scale, field) for scale in scales if getattr(scale, field) is not None})


def _size(sides: dict[str, Part]) -> tuple[int, int] | None:
    """(out, in) of the weight that a whole pair is for."""
    if set(sides) != {"A", "B"} or any(len(part.info.shape) != 2 for part in sides.values()):
        return None
    return sides["B"].info.shape[0], sides["A"].info.shape[1]


def _shape(sides: dict[str, Part]) -> str | None:
    size = _size(sides)
    return f"{size[0]} x {size[1]}" if size else None


def _tensors(files: AdapterFiles, pairs: Pairs) -> dict[str, Any]:
    infos = [part.info for part in files.parts]
    return {
        "count": len(infos),
        "numbers": sum(info.numel for info in infos),
        "bytes": sum(info.nbytes for info in infos),
        "file": files.file.name,
        "dtypes": dict(sorted(Counter(info.dtype for info in infos).items())),
        "kinds": dict(Counter(part.kind for part in files.parts)),
        "unpaired": [module for module, sides in pairs.items() if set(sides) != {"A", "B"}],
        "others": [part.info.name for part in files.parts if part.kind != "lora"],
    }


def _merge(files: AdapterFiles) -> dict[str, Any]:
    try:
        open_adapter(files.path)
    except UserError as error:
        return {"possible": False, "reason": error.what}
    return {"possible": True, "reason": None}


def _pair_findings(files: AdapterFiles, pairs: Pairs) -> Iterator[str]:
    """One sentence a kind of fault, with the first module that has it."""
    if not files.parts:
        yield "it holds no tensors"
    if passed_over := untargeted(files.config, pairs):
        yield (
            f"{len(passed_over)} of {len(pairs)} adapted modules are none that adapter_config.json targets, the first "
            f"is {passed_over[0]}: PEFT drops their tensors without a word"
        )
    faults: dict[str, list[str]] = {}
    for module, sides in pairs.items():
        fault = _fault(sides, scale_of(files.config, module))
        if fault:
            faults.setdefault(fault, []).append(module)
    for fault, modules in faults.items():
        more = f" (and {len(modules) - 1} more modules)" if len(modules) > 1 else ""
        yield f"{modules[0]}{more}: {fault}"


def _fault(sides: dict[str, Part], scale: Scale) -> str | None:
    if set(sides) != {"A", "B"}:
        return f"no lora_{'B' if 'A' in sides else 'A'}: it is lost, and the module's update with it"
    if _size(sides) is None:
        return "A or B is no matrix"
    ranks = {sides["A"].info.shape[0], sides["B"].info.shape[1]}
    if ranks != {scale.rank}:
        stated = "nothing usable" if scale.rank is None else f"{scale.rank:g}"
        return f"rank {' and '.join(map(str, sorted(ranks)))}, adapter_config.json says {stated}"
    return "adapter_config.json has no usable lora_alpha: the scaling is unknown" if scale.alpha is None else None


def _intended(settings: dict[str, Any]) -> bool:
    """Whether the config itself picks layers: then a target that skips some is as it was meant."""
    targets = settings["target_modules"]
    picked = settings["layers_to_transform"] is not None or settings["exclude_modules"]
    return bool(picked) or not isinstance(targets, list) or any("." in str(name) for name in targets)


def _cover_findings(sections: dict[str, Any]) -> Iterator[str]:
    settings, layers = sections["settings"], sections["layers"]["count"]
    if _intended(settings):
        return
    for name, target in sections["targets"].items():
        if target["missing"]:
            yield (
                f"{name} is adapted in {len(target['layers'])} of {layers} layers, not in layer "
                f"{format_ranges(target['missing'])}, and adapter_config.json does not say so"
            )
    for name in settings["target_modules"]:
        if name in QWEN2_LINEARS and name not in sections["targets"]:
            yield f"adapter_config.json targets {name}, but no tensor adapts it"


def _base_findings(
    files: AdapterFiles, pairs: Pairs, base: Checkpoint | None, sections: dict[str, Any]
) -> Iterator[str]:
    if base is None:
        return
    wrong = [m for m, sides in pairs.items() if _size(sides) and _size(sides) != _weight_shape(base, m)]
    if wrong and base.geometry.quantization is None:
        there = _weight_shape(base, wrong[0])
        what = f"of shape {list(there)}" if there else "not there"
        yield (
            f"{len(wrong)} modules do not fit the base at {base.path}, the first is {wrong[0]}: adapted as "
            f"{_shape(pairs[wrong[0]])}, in the base it is {what}"
        )
    if sections["base"]["matches"] is False:
        yield f"the base at {base.path} is not the one it was trained on: its fingerprint differs"


def _weight_shape(base: Checkpoint, module: str) -> tuple[int, ...] | None:
    weight = base.tensors.get(f"{module}.weight")
    return weight.shape if weight else None


def _value_findings(values: dict[str, Any] | None) -> Iterator[str]:
    if values is None:
        return
    if values["not_finite"]:
        count = len(values["not_finite"])
        yield f"NaN or Inf in {count} tensor{'s' * (count > 1)}, the first is {values['not_finite'][0]}"
    if values["pairs"] and len(values["zero"]["B"]) == values["pairs"]:
        yield "lora_B is all zero in every module: it was never trained, or was lost; the adapter changes nothing"


def _value_notes(values: dict[str, Any] | None) -> Iterator[str]:
    if values is None:
        return
    for side, modules in values["zero"].items():
        if 0 < len(modules) < values["pairs"] or (side == "A" and modules):
            yield f"lora_{side} is all zero in {len(modules)} of {values['pairs']} modules, the first is {modules[0]}"


def _notes(files: AdapterFiles, sections: dict[str, Any]) -> Iterator[str]:
    for kind, effect in EFFECTS.items():
        if sections["tensors"]["kinds"].get(kind):
            yield effect
    if not sections["merge"]["possible"]:
        yield f"`qwen2tool merge` refuses it: {sections['merge']['reason']}"
    if _intended(sections["settings"]):
        for name, target in sections["targets"].items():
            if target["missing"]:
                yield f"{name} is adapted in layers {format_ranges(target['layers'])} only, as its config picks them"
    if len({scaling for target in sections["targets"].values() for scaling in target["scalings"]}) > 1:
        yield "modules are scaled differently (rank_pattern or alpha_pattern)"
    if sections["base"]["fingerprint"] is None:
        yield "it does not say by fingerprint which base it was trained on; only names and shapes can be checked"
    if files.file.name != ADAPTER_BIN and (files.path / ADAPTER_BIN).is_file():
        yield f"{ADAPTER_BIN} is there as well: PEFT reads {files.file.name}"
