"""The results in benchmarks/results/*.json, and what their tables in the README are made with."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from common import ROOT

NOT_MEASURED = "Not measured yet."
RESULTS = ROOT / "benchmarks" / "results"


def table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(columns), *(list(map(str, row)) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def load(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text()))


def load_if_measured(name: str) -> dict[str, Any]:
    """A result file that need not exist: {} before the first measurement."""
    return load(name) if (RESULTS / f"{name}.json").is_file() else {}


def made_by(part: dict[str, Any], extra: tuple[str, ...] = ()) -> str:
    """Command, commit, machine and versions, those of `extra` packages where they were installed."""
    origin = part["made_by"]
    machine = origin["machine"]
    device = machine.get("gpu") or f"CPU, {machine['cpu_threads']} threads"
    packages = ("torch", "transformers", "peft", "bitsandbytes", *(name for name in extra if name in machine))
    versions = ", ".join(f"{name} {machine[name]}" for name in packages)
    return f"`{origin['command']}` at {origin['commit']}; {device}; {versions}."
