"""Memory that nobody wrote is NaN: what reads it before writing it shows in the result."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """For one test, torch fills what `empty` and its relatives return with NaN (integers with their largest value)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # filling comes with it; cuBLAS warns of its workspace
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Dd]eterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
