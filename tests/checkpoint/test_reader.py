"""Data comes back as safetensors wrote it, one tensor or one block of rows at a time."""

from __future__ import annotations

import io

import pytest
import torch
from safetensors.torch import save_file

from qwen2tool.checkpoint import raw, reader
from qwen2tool.checkpoint.header import ITEM_BYTES, TensorInfo, read_header
from qwen2tool.checkpoint.raw import copy_tensor, raw_chunks
from qwen2tool.checkpoint.reader import (
    TORCH_DTYPE,
    read_tensor,
    row_blocks,
    same_data,
    write_tensor,
)
from qwen2tool.errors import UserError
from tests.checkpoint.files import bytes_of, entry, raw_file


def sample(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bits, read as `dtype`: every value that the format can hold, NaN among them."""
    count = dtype.itemsize
    for size in shape:
        count *= size
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return bits.view(dtype).view(shape)


@pytest.mark.parametrize("name", TORCH_DTYPE)
def test_written_by_safetensors_read_by_us(name, tmp_path):
    tensors = {"matrix": sample(TORCH_DTYPE[name], 5, 3), "other": sample(TORCH_DTYPE[name], 7)}
    save_file(tensors, tmp_path / "f")
    infos = read_header(tmp_path / "f").tensors
    for key, tensor in tensors.items():
        found = read_tensor(infos[key])
        assert infos[key].dtype == name and (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert bytes_of(found) == bytes_of(tensor) == b"".join(raw_chunks(infos[key]))
        handle = io.BytesIO()
        copy_tensor(infos[key], handle)
        write_tensor(found, handle)
        assert handle.getvalue() == 2 * bytes_of(tensor)


def test_scalar_and_empty(tmp_path):
    tensors = {"scalar": torch.tensor(3.5), "empty": torch.zeros(3, 0, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "f")
    infos = read_header(tmp_path / "f").tensors
    assert read_tensor(infos["scalar"]) == 3.5 and read_tensor(infos["scalar"]).shape == ()
    assert read_tensor(infos["empty"]).shape == (3, 0) and list(raw_chunks(infos["empty"])) == []


def test_memory_is_its_own(tmp_path):
    save_file({"x": torch.ones(4)}, tmp_path / "f")
    info = read_header(tmp_path / "f").tensors["x"]
    read_tensor(info).fill_(7)
    assert read_tensor(info).equal(torch.ones(4))


def test_write_takes_any_strides():
    matrix = torch.arange(12.0).view(3, 4)
    for view in (matrix.T, matrix[:, 1::2], matrix[1:2].expand(5, 4)):
        handle = io.BytesIO()
        write_tensor(view, handle)
        assert handle.getvalue() == view.contiguous().numpy().tobytes()


@pytest.mark.parametrize("read", [read_tensor, lambda info: b"".join(raw_chunks(info))])
def test_file_that_shrank_after_it_was_opened(read, tmp_path):
    save_file({"x": torch.ones(100)}, tmp_path / "f")
    info = read_header(tmp_path / "f").tensors["x"]
    with (tmp_path / "f").open("r+b") as handle:
        handle.truncate(info.end - 1)
    with pytest.raises(UserError, match="ends inside tensor x"):
        read(info)


def test_dtype_that_torch_lacks(tmp_path, monkeypatch):
    info = read_header(raw_file(tmp_path / "f", {"x": entry(0, 4, [1], "F32")}, bytes(4))).tensors["x"]
    monkeypatch.delitem(reader.TORCH_DTYPE, "F32")
    with pytest.raises(UserError, match="x has dtype F32, which torch cannot hold"):
        read_tensor(info)


def test_only_the_first_bytes(tmp_path, monkeypatch):
    save_file({"x": torch.arange(100, dtype=torch.uint8)}, tmp_path / "f")
    info = read_header(tmp_path / "f").tensors["x"]
    monkeypatch.setattr(raw, "CHUNK_BYTES", 8)
    assert [len(piece) for piece in raw_chunks(info, 20)] == [8, 8, 4]
    assert b"".join(raw_chunks(info, 20)) == bytes(range(20)) and b"".join(raw_chunks(info, 1000)) == bytes(range(100))


@pytest.mark.parametrize("count", [0, 7, 8, 20])
def test_equal_byte_for_byte_across_pieces(count, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "COMPARED_BYTES", 8)
    numbers = torch.arange(count, dtype=torch.uint8)
    changed = numbers.clone()
    changed[-1:] += 1
    save_file({"x": numbers, "y": changed}, tmp_path / "f")
    others = {"pad": torch.ones(3, dtype=torch.uint8), "x": numbers, "z": numbers.view(torch.int8).clone()}
    save_file(others, tmp_path / "g")
    here, there = (read_header(tmp_path / name).tensors for name in "fg")
    assert same_data(here["x"], there["x"])
    assert same_data(here["x"], here["y"]) == (count == 0)
    assert not same_data(here["x"], there["z"])  # the same bytes, read as another dtype


def test_a_file_that_shrank_equals_nothing(tmp_path):
    for name in "fg":
        save_file({"x": torch.ones(100)}, tmp_path / name)
    here, there = (read_header(tmp_path / name).tensors["x"] for name in "fg")
    for name in "fg":
        with (tmp_path / name).open("r+b") as handle:
            handle.truncate(here.end - 1)
    assert not same_data(here, there)


@pytest.mark.parametrize("height", [1, 63, 64, 127, 128, 129, 1000])
@pytest.mark.parametrize("limit", [1, 700, 10_000])
def test_blocks_are_the_matrix(height, limit, tmp_path):
    matrix = torch.arange(height * 10, dtype=torch.float32).view(height, 10)
    save_file({"first": torch.ones(3), "matrix": matrix}, tmp_path / "f")
    info = read_header(tmp_path / "f").tensors["matrix"]
    blocks = list(row_blocks(info, limit))
    assert torch.cat([read_tensor(block) for _, block in blocks]).equal(matrix)
    assert torch.cat([matrix[rows] for rows, _ in blocks]).equal(matrix)
    assert all(read_tensor(block).equal(matrix[rows]) for rows, block in blocks)
    sizes = [block.shape[0] for _, block in blocks]
    assert min(sizes) >= min(height, 64) and max(sizes) - min(sizes) <= 1
    assert max(sizes) * 10 <= max(limit, 1280)


@pytest.mark.parametrize("shape", [(), (5,), (0, 4), (2, 3, 4)])
def test_what_is_no_matrix_is_one_block(shape, tmp_path):
    save_file({"x": torch.ones(shape)}, tmp_path / "f")
    info = read_header(tmp_path / "f").tensors["x"]
    ((_, block),) = row_blocks(info, 1)
    assert isinstance(block, TensorInfo) and read_tensor(block).equal(torch.ones(shape))


def test_blocks_of_the_least_height_multiply_as_the_whole():
    """With a handful of rows BLAS sums in another order, and a merge in blocks is no longer PEFT's."""
    a, b = torch.randn(64, 896), torch.randn(640, 64)
    whole = b @ a
    assert torch.cat([rows @ a for rows in b.split(64)]).equal(whole)


def test_item_sizes():
    assert all(ITEM_BYTES[name] == dtype.itemsize for name, dtype in TORCH_DTYPE.items())
