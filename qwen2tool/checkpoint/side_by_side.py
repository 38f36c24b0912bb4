"""Several checkpoints beside each other: fields that differ, tensors that only some have, biases that are not equal.

Biases are compared number by number, since a permuted one has the norm of the original; other tensors by name, dtype
and shape alone. Whether two models are the same function is the question of `verify-equivalence`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from qwen2tool.checkpoint.biases import bias_name
from qwen2tool.checkpoint.report import SCHEMA_VERSION, Report
from qwen2tool.console import format_number, print_table, say

COMPARED = (
    "geometry",
    "parameters",
    "rope",
    "sliding",
    "head",
    "quantization",
    "tokenizer",
    "generation",
    "chat_template",
)
FROM_FILES = ("format", "bytes", "tensor_bytes")
SHOWN = 12
WIDEST = 48


def compare(reports: Sequence[Report]) -> dict[str, Any]:
    """What differs; lists hold one value a checkpoint, in their order.

    Keys: `fields` {dotted key: [value]}; `tensors` with `missing` {name: [whether it is there]}, `dtypes` and `shapes`
    {name: [value or null]}; `biases` {name: {norms: [number or null], largest_difference}}.
    """
    return {"fields": _fields(reports), "tensors": _tensors(reports), "biases": _biases(reports)}


def to_json(reports: Sequence[Report]) -> dict[str, Any]:
    """All reports and their differences; the exit code is 1 where one of them is wrong."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "comparison",
        "exit_code": max(report.exit_code for report in reports),
        "reports": [report.to_json() for report in reports],
        "differences": compare(reports),
    }


def _fields(reports: Sequence[Report]) -> dict[str, list[Any]]:
    flat = [dict(_flatten(report)) for report in reports]
    keys = dict.fromkeys(key for fields in flat for key in fields)
    rows = {key: [fields.get(key) for fields in flat] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def _flatten(report: Report) -> Iterator[tuple[str, Any]]:
    sections = report.sections
    yield "verdict", report.verdict
    yield "biases.present", sections["biases"]["present"]
    yield "biases.zero", len(sections["biases"]["zero"])
    yield "biases.dtypes", sections["biases"]["dtypes"]
    for name in COMPARED:
        if isinstance(sections[name], dict):
            yield from ((f"{name}.{key}", value) for key, value in sections[name].items())
        else:
            yield name, sections[name]
    yield "tensors.count", sections["tensors"]["count"]
    yield from ((f"files.{key}", sections["files"][key]) for key in FROM_FILES)


def _tensors(reports: Sequence[Report]) -> dict[str, dict[str, list[Any]]]:
    names = dict.fromkeys(name for report in reports for name in report.checkpoint.tensors)
    rows = {name: [report.checkpoint.tensors.get(name) for report in reports] for name in names}
    dtypes = {name: [info and info.dtype for info in row] for name, row in rows.items()}
    shapes = {name: [info and list(info.shape) for info in row] for name, row in rows.items()}
    return {
        "missing": {name: [info is not None for info in row] for name, row in rows.items() if None in row},
        "dtypes": {name: found for name, found in dtypes.items() if len(set(found) - {None}) > 1},
        "shapes": {name: found for name, found in shapes.items() if len({str(it) for it in found if it}) > 1},
    }


def _biases(reports: Sequence[Report]) -> dict[str, dict[str, Any]]:
    """Those that are not equal number by number among the checkpoints whose biases were read."""
    import numpy as np

    read = [report.numbers for report in reports if report.numbers is not None]
    if len(read) < 2:
        return {}
    keys = dict.fromkeys((layer, p) for numbers in read for layer, row in numbers.items() for p in row)
    found = {}
    for layer, projection in keys:
        row = [None if r.numbers is None else r.numbers.get(layer, {}).get(projection) for r in reports]
        there = [vector for vector in row if vector is not None]
        alike = [vector for vector in there if vector.shape == there[0].shape]
        largest = max((float(np.abs(vector - there[0]).max(initial=0.0)) for vector in alike), default=0.0)
        if largest != 0 or len(alike) < len(read):
            norms = [None if vector is None else float(np.linalg.norm(vector)) for vector in row]
            found[bias_name(layer, projection)] = {"norms": norms, "largest_difference": largest}
    return found


def print_side_by_side(reports: Sequence[Report]) -> None:
    """Headlines, then what differs, then findings and verdict of each."""
    names = [f"{chr(ord('A') + index % 26)}" for index in range(len(reports))]
    found = compare(reports)
    for name, report in zip(names, reports, strict=True):
        say(f"{name} {report.path}: biases {report.judgement.state}: {report.headline}")
    say("")
    rows = [(key, *map(_cell, values)) for key, values in found["fields"].items()]
    if rows:
        print_table("fields that differ", ("field", *names), rows, numeric_from=len(names) + 1)
    _print_tensors(found["tensors"], names)
    _print_biases(found["biases"], names)
    say("")
    for name, report in zip(names, reports, strict=True):
        for finding in report.findings:
            say(f"WRONG in {name}: {finding}")
    for name, report in zip(names, reports, strict=True):
        say(f"verdict {name}: {report.verdict}")
    say("no differences" if not any((found["fields"], *found["tensors"].values(), found["biases"])) else "they differ")


def _cell(value: Any) -> str:
    text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= WIDEST else text[: WIDEST - 3] + "..."


def _print_tensors(tensors: dict[str, dict[str, list[Any]]], names: list[str]) -> None:
    missing = list(tensors["missing"].items())
    if missing:
        say("")
        rows = [(name, *("present" if it else "MISSING" for it in row)) for name, row in missing[:SHOWN]]
        print_table("tensors that only some hold" + _of(len(missing)), ("tensor", *names), rows, len(names) + 1)
    for kind in ("dtypes", "shapes"):
        changes = Counter(tuple("-" if it is None else str(it) for it in row) for row in tensors[kind].values())
        if changes:
            say("")
            rows = [(str(number), *change) for change, number in changes.most_common(SHOWN)]
            print_table(f"{kind} that differ" + _of(len(changes)), ("tensors", *names), rows, len(names) + 1)


def _print_biases(biases: dict[str, dict[str, Any]], names: list[str]) -> None:
    if not biases:
        return
    say("")
    rows = [
        (
            name,
            *("MISSING" if norm is None else format_number(norm) for norm in it["norms"]),
            it["largest_difference"] or "-",
        )
        for name, it in list(biases.items())[:SHOWN]
    ]
    columns = ("bias", *(f"norm in {name}" for name in names), "largest difference")
    print_table("biases that differ" + _of(len(biases)), columns, rows)


def _of(total: int) -> str:
    return f" ({SHOWN} of {total}; --json has all)" if total > SHOWN else f" ({total})"
