"""Shared fixtures: a tiny Qwen2 folder and an adapter for it, built once; tests that change one take a copy."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: kernels then run on CPU tensors

from tests.tiny import write_adapter, write_tiny

torch.set_num_threads(1)  # tiny models gain nothing from more, and two busy pools on one machine crawl


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: copy it (`base_copy`) before changing anything."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """Read-only LoRA on all seven linears of `base_folder`, rank 4, alpha 12."""
    return write_adapter(tmp_path_factory.mktemp("tiny") / "adapter", base_folder)


@pytest.fixture
def base_copy(tmp_path: Path, base_folder: Path) -> Path:
    """A copy of the tiny checkpoint to damage."""
    return Path(shutil.copytree(base_folder, tmp_path / "copy"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests are skipped, with the reason, where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
