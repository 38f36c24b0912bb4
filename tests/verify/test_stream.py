"""Batches that lose no token, rows in memory and on disk, and matrices read in rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen2tool.checkpoint.view import Derived, read
from qwen2tool.convert.read import open_qwen2
from qwen2tool.verify import stream
from qwen2tool.verify.run import verify
from qwen2tool.verify.stream import MOST_PADDING, Matrix, Rows, Store, text_of
from tests.verify.common import random_samples

LENGTHS = (5, 20, 20, 19, 30, 7, 18)
SAMPLES = [sample for n, length in enumerate(LENGTHS) for sample in random_samples(1, length, unscored=3, seed=n)]


def test_a_text_scores_what_the_samples_score() -> None:
    text = text_of(SAMPLES)
    ids = [token for row in text.ids for token in row]
    assert sorted(map(len, text.ids)) == [*map(len, text.ids)] and text.tokens == sum(LENGTHS)
    assert len(text.rows) == sum(length - 3 for length in LENGTHS)
    assert text.targets.tolist() == [ids[row + 1] for row in text.rows.tolist()]
    wanted = sorted(token for sample in SAMPLES for token in sample.ids[3:])
    assert sorted(text.targets.tolist()) == wanted


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("most", [1, 40, 60, 1000])
def test_batches_cover_the_text_and_padding_comes_off_again(most: int, left: bool) -> None:
    text = text_of(SAMPLES)
    rows = torch.randn(text.tokens, 3)
    batches = text.batches(most, left)
    assert [b.rows.start for b in batches] == [0, *(b.rows.stop for b in batches[:-1])]
    assert batches[-1].rows.stop == text.tokens
    for batch in batches:
        padded = batch.pad(rows[batch.rows])
        size = padded.shape[0] * padded.shape[1]
        assert len(batch.lengths) == 1 or (size <= most and size - batch.tokens <= MOST_PADDING * size)
        assert torch.equal(batch.unpad(padded), rows[batch.rows])
        first = padded[0, -batch.lengths[0] :] if left else padded[0, : batch.lengths[0]]
        assert torch.equal(first, rows[batch.rows][: batch.lengths[0]])
    assert most < 1000 or max(len(batch.lengths) for batch in batches) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_on_disk_are_rows_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(9, 4)
    with (tmp_path / "rows").open("w+b") as handle:
        for rows in (Rows(9, 4, dtype), Rows(9, 4, dtype, handle)):
            rows.write(slice(3, 9), values[3:])
            rows.write(slice(0, 3), values[:3])
            assert torch.equal(rows.read(slice(2, 7)), values[2:7].to(dtype))
            assert torch.equal(rows.pick(torch.tensor([8, 0, 3])), values[[8, 0, 3]].to(dtype))


def test_what_is_too_much_goes_to_disk_and_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = Store(budget=100)
    for name in "ab":
        store.rows(name, 5, 4, torch.float32).write(slice(0, 5), torch.full((5, 4), ord(name)))
    assert store.rows("a", 5, 4, torch.float32).read(slice(4, 5)).tolist() == [[ord("a")] * 4]
    assert store.rows("b", 5, 4, torch.float32).read(slice(4, 5)).tolist() == [[ord("b")] * 4]
    (folder,) = tmp_path.iterdir()
    assert [file.name for file in folder.iterdir()] == ["b.rows"]
    store.close()
    assert not [*tmp_path.iterdir()]


def test_a_comparison_on_disk_gives_the_figures_of_one_in_memory(
    base_folder: Path, merged_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = verify(base_folder, merged_folder, random_samples())
    monkeypatch.setattr(Store.__init__, "__defaults__", (None, 0))
    monkeypatch.setattr(stream, "SMALL_BYTES", 0)
    disk = verify(base_folder, merged_folder, random_samples())
    assert (disk.figures, disk.floors, disk.layers) == (memory.figures, memory.floors, memory.layers)


def test_rows_of_a_stored_matrix_and_of_a_computed_one(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SMALL_BYTES", 0)
    stored = open_qwen2(base_folder).tensors["lm_head.weight"]
    whole = read(stored)
    computed = Derived(name="x", dtype="BF16", shape=stored.shape, sources=(), compute=lambda: whole)
    for matrix in (Matrix(stored), Matrix(computed)):
        assert matrix.height == 384
        assert torch.equal(matrix.block(slice(300, 400)), whole[300:])
        assert torch.equal(matrix.pick([5, 383, 0, 4, 5]), whole[[5, 383, 0, 4, 5]])
