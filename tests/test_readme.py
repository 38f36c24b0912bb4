"""The README's tables are those of the committed measurements, and its first screen is short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_tables_are_generated_from_the_results():
    check = [sys.executable, str(ROOT / "scripts" / "readme_tables.py"), "--check"]
    assert subprocess.run(check, cwd=ROOT, check=False).returncode == 0, "run scripts/readme_tables.py"


def test_a_stale_table_is_found(tmp_path):
    """The negative control, on a copy whose NLL was edited by hand."""
    for part in ("scripts", "benchmarks/results"):
        (tmp_path / part).mkdir(parents=True)
        for file in (ROOT / part).iterdir():
            if file.is_file():
                (tmp_path / part / file.name).write_bytes(file.read_bytes())
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "| 1.580 |" in text
    (tmp_path / "README.md").write_text(text.replace("| 1.580 |", "| 1.480 |"), encoding="utf-8")
    check = [sys.executable, str(tmp_path / "scripts" / "readme_tables.py"), "--check"]
    assert subprocess.run(check, cwd=tmp_path, check=False).returncode == 1


def test_from_clone_to_the_closing_table_in_25_lines():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("git clone"))
    assert next(n for n, line in enumerate(lines) if line.startswith("push  ")) - start <= 25
