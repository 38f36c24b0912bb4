"""Headers: what safetensors writes is read the same, and every kind of damage is named."""

from __future__ import annotations

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.header import ITEM_BYTES, read_header
from qwen2tool.errors import UserError
from tests.checkpoint.files import entry, raw_file, split_header

GOOD = {"a": entry(0, 4), "b": entry(4, 10, [3], "BF16")}


def test_same_as_safetensors(tmp_path):
    tensors = {
        "x": torch.randn(3, 5),
        "y": torch.randn(7).bfloat16(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "t.safetensors", metadata={"format": "pt", "key": "value"})
    header = read_header(tmp_path / "t.safetensors")
    with safe_open(tmp_path / "t.safetensors", "pt") as theirs:
        assert set(header.tensors) == set(theirs.keys()) and header.metadata == theirs.metadata()
        for name, info in header.tensors.items():
            view = theirs.get_slice(name)
            assert (info.dtype, list(info.shape)) == (view.get_dtype(), view.get_shape())
            assert (info.nbytes, info.numel) == (tensors[name].nbytes, tensors[name].numel())


def test_order_is_that_of_the_data(tmp_path):
    file = raw_file(tmp_path / "f", {"b": entry(4, 10), "a": entry(0, 4)}, bytes(10))
    assert list(read_header(file).tensors) == ["a", "b"]


def test_empty_tensor_beside_one_that_starts_there(tmp_path):
    header = {"full": entry(0, 4), "empty": entry(0, 0), "last": entry(4, 4)}
    file = raw_file(tmp_path / "f", header, bytes(4))
    with safe_open(file, "pt") as theirs:  # the format allows it
        assert set(theirs.keys()) == set(read_header(file).tensors) == set(header)


@pytest.mark.parametrize(
    ("header", "data", "length", "words"),
    [
        (GOOD, bytes(9), None, "truncated: .* tensor 'b' is cut"),
        (GOOD, bytes(3), None, "truncated: .* tensor 'a' is cut"),
        (GOOD, bytes(12), None, "2 bytes after the last tensor"),
        (GOOD, bytes(10), 10**9, r"claims 1000000000 bytes in a file of \d+"),
        (GOOD, bytes(10), 2**64 - 1, "no safetensors header"),
        (GOOD, bytes(10), 20, "corrupt safetensors header"),
        ("", b"", None, "corrupt safetensors header"),
        ("{", b"", None, "not JSON"),
        (b"\xff\xfe\x00garbage", b"", None, "not JSON"),
        ("[" * 100_000, b"", None, "not JSON"),
        ("[1]", b"", None, "a list, not an object"),
        ({"__metadata__": [1], "a": entry(0, 4)}, bytes(4), None, "__metadata__ in the header is no object"),
        ({"a": entry(0, 4), "b": entry(3, 7)}, bytes(7), None, "'b' overlaps or leaves a gap"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4), None, "'b' overlaps or leaves a gap"),
        ({"a": entry(0, 4), "b": entry(5, 7)}, bytes(7), None, "'b' overlaps or leaves a gap"),
        ({"a": entry(1, 5)}, bytes(5), None, "'a' overlaps or leaves a gap"),
        ({"a": entry(0, 4, [5])}, bytes(4), None, r"claims shape \[5\] of U8 but 4 bytes"),
        ({"a": entry(4, 0, [4])}, bytes(4), None, r"claims shape \[4\] of U8 but -4 bytes"),
        ({"a": entry(0, 4, [2**40, 2**40])}, bytes(4), None, "but 4 bytes"),
        ({"a": entry(0, 4, [-2, -2])}, bytes(4), None, "corrupt header entry for tensor 'a'"),
        ({"a": entry(0, 4, [2.0, 2])}, bytes(4), None, "corrupt header entry"),
        ({"a": entry(0, 4, [True, 4])}, bytes(4), None, "corrupt header entry"),
        ({"a": entry(0, 4, dtype=["U8"])}, bytes(4), None, "corrupt header entry"),
        ({"a": entry(0, 4, dtype=None)}, bytes(4), None, "corrupt header entry"),
        ({"a": entry(0, 4) | {"data_offsets": [0]}}, bytes(4), None, "corrupt header entry"),
        ({"a": entry(0, 4) | {"data_offsets": {"0": 4}}}, bytes(4), None, "corrupt header entry"),
        ({"a": 3}, bytes(4), None, "corrupt header entry"),
        ({"\ud800": entry(0, 4)}, bytes(4), None, "corrupt header entry"),
        ({"a": entry(0, 4, [8], "F4")}, bytes(4), None, "tensor 'a' has dtype 'F4', which is not read here"),
    ],
)
def test_damage_is_named(header, data, length, words, tmp_path):
    file = raw_file(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(UserError, match=words) as caught:
        read_header(file)
    assert caught.value.what.startswith(str(file)) and caught.value.what.isprintable()
    if "F4" not in words:
        with pytest.raises((SafetensorError, UnicodeError, TypeError)):  # the format's own reader refuses it as well
            safe_open(file, "pt").__enter__()


def test_the_undamaged_control(tmp_path):
    assert list(read_header(raw_file(tmp_path / "good", GOOD, bytes(10))).tensors) == ["a", "b"]


@pytest.mark.parametrize("size", range(9))
def test_shorter_than_a_header(size, tmp_path):
    (tmp_path / "stub").write_bytes(b"\x07" * size)
    with pytest.raises(UserError, match="no safetensors header"):
        read_header(tmp_path / "stub")


def test_every_cut_is_found(base_folder, tmp_path):
    whole = (base_folder / "model-00001-of-00002.safetensors").read_bytes()
    header, _ = split_header(base_folder / "model-00001-of-00002.safetensors")
    cuts = [0, 7, 8, 100, len(whole) // 2, len(whole) - 1]
    for cut in cuts:
        (tmp_path / "cut").write_bytes(whole[:cut])
        with pytest.raises(UserError):
            read_header(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(whole)
    assert len(read_header(tmp_path / "cut").tensors) == len(header) - 1


def test_sizes_are_those_of_torch():
    from qwen2tool.checkpoint.reader import TORCH_DTYPE

    assert ITEM_BYTES.keys() == TORCH_DTYPE.keys()
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPE.items()} == ITEM_BYTES


@pytest.mark.parametrize("name", ["a\nverdict: qwen2", "a\x1b[31m", "a\u202e"])
def test_names_that_would_write_lines_of_a_report(name, tmp_path):
    """Other readers take them; printed, they could forge a verdict or recolour a terminal."""
    file = raw_file(tmp_path / "bad.safetensors", {name: entry(0, 4)}, bytes(4))
    with pytest.raises(UserError, match="corrupt header entry for tensor") as caught:
        read_header(file)
    assert caught.value.what.isprintable()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a Git LFS pointer"),
        ("<!DOCTYPE html><html>", "a web page"),
        ("<html><head>", "a web page"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.gguf"])
def test_what_a_careless_download_leaves_is_named(name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        open_checkpoint(tmp_path / name)
    assert "damaged" not in caught.value.fix
