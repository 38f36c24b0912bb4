"""`qwen2tool inspect` as a user runs it: what it accepts, what it prints first, its exit codes."""

from __future__ import annotations

import json

import pytest
import torch

from tests.checkpoint.edits import drop, edit_config, load_state, rewrite
from tests.cli_runner import run

K1 = "model.layers.1.self_attn.k_proj.bias"


def test_the_state_of_the_biases_is_the_first_line(base_copy):
    sound = run("inspect", base_copy)
    assert sound.code == 0 and sound.out.startswith("biases sound: all 9 q/k/v biases are there")
    rewrite(base_copy, lambda state: state[K1].zero_())
    zero = run("inspect", base_copy)
    assert zero.code == 1
    assert zero.out.startswith("biases WRONG: all 9 q/k/v biases are there, but 1 of them holds nothing but zeros")
    assert ["1", "present", "all", "zero", "present"] in [line.split() for line in zero.out.splitlines()]
    drop(base_copy, "_proj.bias")
    assert run("inspect", base_copy).out.startswith("biases WRONG: 9 of 9 q/k/v biases are MISSING")


def test_another_architecture_has_unknown_biases(base_copy):
    edit_config(base_copy, model_type="mistral")
    outcome = run("inspect", base_copy)
    assert outcome.code == 1 and outcome.out.startswith("biases unknown: not qwen2 (model_type is 'mistral')")


def test_every_kind_of_file(base_folder, base_copy, tmp_path):
    rewrite(base_copy, lambda state: None)
    assert run("inspect", base_copy / "model.safetensors").code == 0
    torch.save(load_state(base_folder), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((base_folder / "config.json").read_text())
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        outcome = run("inspect", path, "--values", "--json")
        found = json.loads(outcome.out)
        assert outcome.code == 0 and found["files"]["format"] == "bin" and found["biases"]["read"]
        assert found["values"]["matrices"]["count"] == 23


def test_an_adapter(adapter_folder):
    outcome = run("inspect", adapter_folder, "--json")
    assert outcome.code == 0 and json.loads(outcome.out)["kind"] == "adapter"
    assert "lora adapter" in run("inspect", adapter_folder).out


def test_several(base_folder, base_copy):
    drop(base_copy, K1)
    outcome = run("inspect", base_folder, base_copy)
    assert outcome.code == 1 and "WRONG in B: 1 of 9 q/k/v biases are missing" in outcome.out
    assert run("inspect", base_folder, base_folder).code == 0
    found = json.loads(run("inspect", base_folder, base_copy, "--json").out)
    assert found["kind"] == "comparison" and found["exit_code"] == 1


def test_a_picture(base_folder, tmp_path):
    file = tmp_path / "out.png"
    assert run("inspect", base_folder, "--plot", file).code == 0 and file.is_file()
    again = run("inspect", base_folder, "--plot", file)
    assert again.code == 2 and "exists" in again.error and "--overwrite" in again.error
    assert run("inspect", base_folder, "--plot", file, "--overwrite").code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("BASE", "BASE", "--plot", "x.png"), "draws one checkpoint"),
        (("BASE", "--plot", "x.jpg"), "not a .png"),
        (("BASE", "ADAPTER"), "an adapter"),
        (("ADAPTER", "--plot", "x.png"), "an adapter"),
        (("BASE", "--revision", "main"), "revision"),
        ((), "Missing argument"),
    ],
)
def test_what_cannot_be_done(arguments, words, base_folder, adapter_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"BASE": base_folder, "ADAPTER": adapter_folder}
    outcome = run("inspect", *(names.get(argument, argument) for argument in arguments))
    assert outcome.code == 2 and words in outcome.error and list(tmp_path.glob("*.png")) == []
