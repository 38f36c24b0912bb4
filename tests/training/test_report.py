"""The figures of a run by hand arithmetic."""

from __future__ import annotations

import pytest

from qwen2tool.training.report import ends, median


def test_ends_are_means_of_a_tenth():
    assert ends([float(n) for n in range(30)]) == (1.0, 28.0)  # (0 + 1 + 2) / 3 and (27 + 28 + 29) / 3
    assert ends([4.0, 2.0]) == (4.0, 2.0) and ends([3.0]) == (3.0, 3.0)


def test_median_leaves_the_warm_up_out():
    assert median([90.0, 1.0, 3.0, 2.0]) == 2.0
    assert median([7.0]) == 7.0 and median([]) == pytest.approx(0.0)
