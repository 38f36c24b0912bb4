"""The printed report, as a pipe gets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2tool.verify.run import verify
from qwen2tool.verify.show import print_report
from tests.verify.common import random_samples, variant, without


def test_verdict_figures_and_width(tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dropped = variant(base_folder, tmp_path / "dropped", without("bias"))
    print_report(verify(base_folder, dropped, random_samples()))
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[0] == "different: the q, k and v biases of all 3 layers are missing"
    assert "tensors: 30 identical, 0 one rounding, 0 different, 9 missing, 0 extra" in lines
    assert "biases: 0 in the candidate, 9 in the reference" in lines
    assert [line.split()[0] for line in lines if line.startswith(("noise ", "candidate "))] == ["noise", "candidate"]
    assert max(map(len, lines)) <= 100
    assert "zeros" in output.err


def test_a_difference_is_listed_with_its_size(
    base_folder: Path, merged_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_report(verify(base_folder, merged_folder, random_samples(1)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("different: the logits differ by ")
    listed = [line for line in lines if line.startswith("model.layers.")]
    assert len(listed) == 8 and all(len(line.split()) == 4 for line in listed)
