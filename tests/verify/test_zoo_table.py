"""docs/zoo.md is what scripts/zoo_table.py makes of the committed run, and that run found everything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.verify.faults import FAULTS
from tests.verify.harmless import HARMLESS

ROOT = Path(__file__).parent.parent.parent
RESULT = ROOT / "benchmarks" / "results" / "zoo.json"
SMALL = ("tiny-qwen2", "gqa 28/4")


def check(*arguments: str | Path) -> int:
    line = [sys.executable, str(ROOT / "scripts" / "zoo_table.py"), "--check", *map(str, arguments)]
    return subprocess.run(line, check=False).returncode


def test_the_page_is_that_of_the_committed_run() -> None:
    assert check() == 0, "run scripts/zoo_table.py"


def test_a_page_edited_by_hand_is_found(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    page = tmp_path / "zoo.md"
    page.write_text(text.replace("different", "equivalent", 1), encoding="utf-8")
    assert check("--page", page) == 1


@pytest.mark.parametrize("kind", ["faults", "harmless"])
def test_the_run_is_of_the_zoo_as_it_is(kind: str) -> None:
    results = json.loads(RESULT.read_text())
    every = {"faults": [f.name for f in FAULTS], "harmless": [c.name for c in HARMLESS]}[kind]
    marked = {"faults": [f.name for f in FAULTS if f.real], "harmless": [c.name for c in HARMLESS if c.real]}[kind]
    assert len(results) >= 3
    for model, found in results.items():
        names = [entry["name"] for entry in found[kind]]
        assert names == (every if model in SMALL else marked), f"run scripts/zoo_table.py --run {model}"


def test_all_was_detected_named_and_nothing_else_flagged() -> None:
    for found in json.loads(RESULT.read_text()).values():
        assert [e["name"] for e in found["faults"] if e["verdict"] == "equivalent"] == []
        assert [e["name"] for e in found["faults"] if set(e["codes"]) != set(e["expected"])] == []
        assert [e["name"] for e in found["harmless"] if e["verdict"] != "equivalent" or e["codes"]] == []
