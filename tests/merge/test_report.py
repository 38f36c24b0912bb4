"""The report's figures are those of its parts, and print."""

from __future__ import annotations

import json

import pytest

from qwen2tool.merge.report import MergeReport, Survival, print_report

REPORT = MergeReport(
    output="out",
    merged_tensors=3,
    untouched_tensors=10,
    byte_identical=True,
    survival={"a": Survival(0.1, 0.0), "b": Survival(0.5, 0.7), "c": Survival(0.2, 0.3)},
    side_files=("tokenizer.json",),
    notes=("the adapter changes nothing",),
    seconds=1.5,
    peak_memory=3_000_000,
)


def test_median_and_worst():
    assert REPORT.median_survival == (0.2, 0.3)
    assert REPORT.worst == "b"


def test_json_holds_every_figure():
    found = json.loads(json.dumps(REPORT.to_json()))
    assert found["median_survival"] == {"relative_error": 0.2, "unchanged": 0.3}
    assert found["worst_survival"] == {"name": "b", "relative_error": 0.5, "unchanged": 0.7}
    assert (found["merged_tensors"], found["untouched_tensors"], found["peak_memory"]) == (3, 10, 3_000_000)
    assert "survival" not in found and found["notes"] == ["the adapter changes nothing"]


@pytest.mark.parametrize("identical", [True, False])
def test_printed(identical, capsys):
    print_report(MergeReport(**{**vars(REPORT), "byte_identical": identical}))
    out, err = capsys.readouterr()
    assert "3 merged, 10 others" in out and "20.00% (median), 50.00% in b" in out and "3.0 MB" in out
    assert ("byte-identical" in out) is identical
    assert "note: the adapter changes nothing" in err
