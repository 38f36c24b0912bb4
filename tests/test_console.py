"""Numbers as people read them, and a peak of memory that is the process's own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qwen2tool.console import format_bytes, format_number


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.5, "0.5"), (3.14159, "3.142"), (5578.2, "5,578"), (1e-5, "1.00e-05"), (9.6e6, "9.60e+06")],
)
def test_numbers(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(("count", "text"), [(12, "12 B"), (1500, "1.5 kB"), (15.4e9, "15.4 GB"), (2e13, "20.0 TB")])
def test_bytes(count, text):
    assert format_bytes(count) == text


def test_peak_is_the_process_s_own():
    """A child of a process that holds 300 MB starts small, and sees what it takes itself."""
    child = "from qwen2tool.console import resident_peak as p; a = p(); b = bytearray(200_000_000); print(a, p())"
    parent = f"import subprocess, sys; x = bytearray(300_000_000); subprocess.run([sys.executable, '-c', {child!r}])"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 100e6 and 190e6 < after - before < 260e6
