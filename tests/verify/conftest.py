"""A tiny checkpoint with a tied head, and the bf16 merge of the shared base and adapter by PEFT; both read-only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny import write_tiny
from tests.verify.common import peft_merged, variant


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors of a tiny model are too small to share out: on a busy machine a second thread costs tenfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if "long" in request.keywords else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tied") / "tied", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def merged_folder(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, adapter_folder: Path) -> Path:
    target = tmp_path_factory.mktemp("merged") / "merged"
    return variant(base_folder, target, lambda state: peft_merged(base_folder, adapter_folder, torch.bfloat16))
