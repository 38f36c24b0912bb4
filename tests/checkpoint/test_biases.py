"""Biases read with numpy are those that torch reads, from every format and dtype, and without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qwen2tool.checkpoint.biases import read_biases, read_vector, stats_of
from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.header import read_header
from qwen2tool.checkpoint.values import measure_tensor
from qwen2tool.errors import UserError
from tests.checkpoint.edits import load_state, put

SPECIAL = [0.0, -0.0, 1.0, -2.5, 1e-3, 211.0, 60000.0]


def stored(tensor: torch.Tensor, tmp_path):
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    return read_header(tmp_path / "x.safetensors").tensors["x"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_are_those_of_torch(tmp_path, dtype):
    x = torch.tensor([*SPECIAL, float("nan"), float("inf"), float("-inf")]).to(dtype)
    np.testing.assert_array_equal(read_vector(stored(x, tmp_path)), x.double().numpy())
    assert not np.array_equal(read_vector(stored(x * 3, tmp_path)), x.double().numpy())


@pytest.mark.parametrize("values", [SPECIAL, [0.0, 0.0], [float("nan"), 3.0, float("inf")], [3e200, 4e200]])
def test_statistics_are_those_of_any_tensor(tmp_path, values):
    info = stored(torch.tensor(values, dtype=torch.float64), tmp_path)
    here, there = stats_of(read_vector(info)), measure_tensor(info)
    assert here.l2 == pytest.approx(there.l2, rel=1e-6)
    if values[0] == 3e200:
        assert here.l2 == pytest.approx(5e200)
    assert replace(here, l2=0.0) == replace(there, l2=0.0)


def test_every_bias_of_a_checkpoint(base_folder):
    state = load_state(base_folder)
    found = read_biases(open_checkpoint(base_folder))
    assert found is not None and list(found) == [0, 1, 2]
    for layer, row in found.items():
        assert list(row) == ["q", "k", "v"] or set(row) == {"q", "k", "v"}
        for p, vector in row.items():
            wanted = state[f"model.layers.{layer}.self_attn.{p}_proj.bias"].double().numpy()
            np.testing.assert_array_equal(vector, wanted)


def test_a_bin_holds_the_same_numbers(base_folder, tmp_path):
    torch.save(load_state(base_folder), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((base_folder / "config.json").read_text())
    ours, bins = read_biases(open_checkpoint(base_folder)), read_biases(open_checkpoint(tmp_path))
    assert ours is not None and bins is not None and ours.keys() == bins.keys()
    assert all(np.array_equal(ours[i][p], bins[i][p]) for i in ours for p in "qkv")


def test_what_is_no_bias_is_left_out(base_copy):
    put(base_copy, "model.layers.0.self_attn.q_proj.bias", torch.ones(64, dtype=torch.int8))
    put(base_copy, "model.layers.0.self_attn.k_proj.bias", torch.ones(4, 8))
    found = read_biases(open_checkpoint(base_copy))
    assert found is not None and set(found[0]) == {"v"} and set(found[1]) == {"q", "k", "v"}


def test_of_a_model_on_the_hub_nothing_is_read(base_folder):
    assert read_biases(replace(open_checkpoint(base_folder), commit="0123456789abcdef")) is None


def test_a_file_that_shrank(base_copy):
    checkpoint = open_checkpoint(base_copy)
    last = max(checkpoint.tensors.values(), key=lambda info: (info.file.name, info.end))
    with last.file.open("r+b") as handle:
        handle.truncate(last.end - 1)
    with pytest.raises(UserError, match="ends inside tensor"):
        read_vector(last)


def test_no_torch_is_needed(base_folder):
    code = (
        "import sys; from qwen2tool.checkpoint.report import inspect_checkpoint; "
        "print(inspect_checkpoint(sys.argv[1]).sections['biases']['read'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, base_folder], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
