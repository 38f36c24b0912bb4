"""Several checkpoints beside each other: what differs is shown, and nothing else."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from qwen2tool.checkpoint.report import inspect_checkpoint
from qwen2tool.checkpoint.side_by_side import compare, print_side_by_side, to_json
from tests.checkpoint.edits import drop, edit_config, load_state, put, rewrite

K1 = "model.layers.1.self_attn.k_proj.bias"
EMPTY = {"fields": {}, "tensors": {"missing": {}, "dtypes": {}, "shapes": {}}, "biases": {}}


def differences(*folders):
    return compare([inspect_checkpoint(folder) for folder in folders])


def test_a_copy_does_not_differ(base_folder, base_copy, capsys):
    assert differences(base_folder, base_copy) == EMPTY
    print_side_by_side([inspect_checkpoint(base_folder), inspect_checkpoint(base_copy)])
    assert capsys.readouterr().out.endswith("verdict A: qwen2\nverdict B: qwen2\nno differences\n")


def test_a_missing_bias(base_folder, base_copy, capsys):
    drop(base_copy, K1)
    reports = [inspect_checkpoint(base_folder), inspect_checkpoint(base_copy)]
    found = compare(reports)
    assert found["tensors"]["missing"] == {K1: [True, False]}
    norm = load_state(base_folder)[K1].double().norm().item()
    assert found["biases"] == {K1: {"norms": [pytest.approx(norm), None], "largest_difference": 0.0}}
    assert found["fields"]["verdict"] == ["qwen2", "qwen2 with missing biases"]
    assert found["fields"]["biases.present"] == [9, 8]
    assert to_json(reports)["exit_code"] == 1
    print_side_by_side(reports)
    out = capsys.readouterr().out
    assert "B " in out and "1 of 9 q/k/v biases are MISSING" in out and "they differ" in out
    rows = [line.split() for line in out.splitlines() if line.startswith(K1)]
    assert rows[0][1:] == ["present", "MISSING"] and rows[1][2:] == ["MISSING", "-"]


def test_one_changed_entry(base_folder, base_copy):
    rewrite(base_copy, lambda state: state[K1].__setitem__(3, state[K1][3] + 1))
    found = differences(base_folder, base_copy)["biases"]
    assert list(found) == [K1]
    assert found[K1]["largest_difference"] == pytest.approx(1.0, abs=0.05)


def test_a_permuted_bias_has_the_same_norm_and_differs(base_folder, base_copy):
    rewrite(base_copy, lambda state: state.update({K1: state[K1].flip(0)}))
    found = differences(base_folder, base_copy)["biases"]
    assert list(found) == [K1] and found[K1]["norms"][0] == pytest.approx(found[K1]["norms"][1])
    assert found[K1]["largest_difference"] > 0.1


def test_dtypes_and_shapes(base_folder, base_copy):
    norm = "model.norm.weight"
    rewrite(base_copy, lambda state: state.update({norm: state[norm].float()}))
    found = differences(base_folder, base_copy)
    assert found["tensors"] == {"missing": {}, "dtypes": {norm: ["BF16", "F32"]}, "shapes": {}}
    assert found["biases"] == {}
    put(base_copy, norm, torch.ones(63, dtype=torch.bfloat16))
    assert differences(base_folder, base_copy)["tensors"]["shapes"] == {norm: [[64], [63]]}


def test_a_bias_in_another_dtype_is_equal(base_folder, base_copy):
    rewrite(base_copy, lambda state: state.update({K1: state[K1].float()}))
    found = differences(base_folder, base_copy)
    assert found["biases"] == {} and found["fields"]["biases.dtypes"] == [{"BF16": 9}, {"BF16": 8, "F32": 1}]


def test_config_fields(base_folder, base_copy):
    edit_config(base_copy, rope_theta=5e5, rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    found = differences(base_folder, base_copy)["fields"]
    assert found["rope.theta"] == [1e6, 5e5]
    assert set(found) == {"rope.theta", "rope.readers"}


def test_three(base_folder, base_copy, tmp_path, capsys):
    third = shutil.copytree(base_folder, tmp_path / "third")
    drop(third, K1)
    reports = [inspect_checkpoint(folder) for folder in (base_folder, base_copy, third)]
    found = to_json(reports)
    assert json.loads(json.dumps(found)) == found
    assert found["differences"]["tensors"]["missing"] == {K1: [True, True, False]}
    assert [report["exit_code"] for report in found["reports"]] == [0, 0, 1]
    print_side_by_side(reports)
    out = capsys.readouterr().out
    assert all(f"\nverdict {name}: " in out for name in "ABC")
