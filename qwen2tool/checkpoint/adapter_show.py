"""The report on an adapter for reading: what it is, its targets one by one, then the verdict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qwen2tool.console import format_bytes, format_number, format_ranges, print_table, say

if TYPE_CHECKING:
    from qwen2tool.checkpoint.adapter_report import AdapterReport

Sections = dict[str, Any]


def print_adapter(report: AdapterReport) -> None:
    """Prints `report`; the verdict, findings and notes come last, where a terminal ends."""
    sections = report.sections
    print_table("", ("adapter", str(report.path)), _facts(sections), numeric_from=2)
    if sections["targets"]:
        say("")
        columns = ("target", "layers", "rank", "scaling", "out x in", "stored as", "parameters")
        print_table("", columns, _target_rows(sections["targets"]), numeric_from=6)
    if sections["values"] is not None and sections["values"]["updates"]:
        say("")
        updates = {name: sections["values"]["updates"].get(name) for name in sections["targets"]}
        rows = ((name, u["mean"], u["largest"], _layer(u["layer"])) for name, u in updates.items() if u)
        print_table("norm of the update s BA", ("target", "mean", "largest", "in layer"), rows)
    say("")
    for finding in report.findings:
        say(f"WRONG: {finding}")
    for note in report.notes:
        say(f"note: {note}")
    say(f"verdict: {report.verdict}")


def _layer(layer: int | None) -> str:
    return "-" if layer is None else str(layer)


def _facts(sections: Sections) -> Iterator[tuple[str, str]]:
    method, base, tensors = sections["method"], sections["base"], sections["tensors"]
    yield "method", ", ".join(filter(None, (str(method["peft_type"]), "rsLoRA" if method["rslora"] else "")))
    yield "base", f"{base['name'] or 'not named'}" + (f", revision {base['revision']}" if base["revision"] else "")
    yield "base's fingerprint", _fingerprint(base)
    yield "rank and alpha", f"{sections['settings']['r']} and {sections['settings']['lora_alpha']}"
    yield "layers", f"{len(sections['layers']['covered'])} of {sections['layers']['count']}"
    yield "parameters", f"{tensors['numbers']:,} in {tensors['count']} tensors"
    yield "file", f"{tensors['file']}, {format_bytes(tensors['bytes'])} of tensors"
    others = {kind: count for kind, count in tensors["kinds"].items() if kind != "lora"}
    if others:
        yield "beside LoRA", ", ".join(f"{count} of kind {kind}" for kind, count in others.items())
    yield "merge", "possible" if sections["merge"]["possible"] else "refused"


def _fingerprint(base: Sections) -> str:
    if base["fingerprint"] is None:
        return "not stated"
    said = {True: "that of the base that is here", False: "not that of the base that is here", None: "not compared"}
    return f"{base['fingerprint'][:16]}..., {said[base['matches']]}"


def _target_rows(targets: Sections) -> Iterator[tuple[str, ...]]:
    for name, target in targets.items():
        missing = f", not {format_ranges(target['missing'])}" if target["missing"] else ""
        yield (
            name,
            (format_ranges(target["layers"]) or "-") + missing,
            _span(target["ranks"]),
            _span(target["scalings"]),
            ", ".join(target["shapes"]) or "-",
            ", ".join(target["dtypes"]),
            f"{target['numbers']:,}",
        )


def _span(values: list[float]) -> str:
    """One number, or the smallest and largest of several."""
    if not values:
        return "unknown"
    ends = [format_number(value) for value in dict.fromkeys((values[0], values[-1]))]
    return " to ".join(ends)
