"""inspect of what is no folder of safetensors: GGUF files, and models on a hub through the real client."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen2tool.checkpoint.biases import read_biases
from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.report import inspect_checkpoint
from qwen2tool.checkpoint.side_by_side import compare
from tests.checkpoint.edits import drop, edit_config, edit_json
from tests.convert.gguf_files import (
    HEADS,
    KV_HEADS,
    gguf_bytes,
    numbers,
    permuted,
    small_metadata,
    small_tensors,
    write_small,
)
from tests.hub.client import from_shell
from tests.hub.server import Hub, Repo, running_hub

COMMIT = "1" * 40


def test_a_gguf_file(tmp_path):
    report = inspect_checkpoint(write_small(tmp_path / "small.gguf"), values=True)
    found = report.to_json()
    assert (report.verdict, report.findings, report.exit_code) == ("qwen2", (), 0)
    assert found["files"]["format"] == "gguf" and found["biases"]["dtypes"] == {"F32": 3}
    stored = np.frombuffer(small_tensors()["blk.0.attn_k.bias"][2], "<f4").astype(float)
    assert found["biases"]["stats"]["0"]["k"]["l2"] == pytest.approx(np.linalg.norm(stored))
    tokens = {key: found["tokenizer"][key] for key in ("count", "rows_needed", "vocabulary_rows", "padded_rows")}
    assert tokens == {"count": 13, "rows_needed": 13, "vocabulary_rows": 16, "padded_rows": 3}
    assert found["chat_template"] == "tokenizer.chat_template"
    assert found["generation"]["stops_at"] == [{"id": 11, "token": "<|im_end|>"}]
    assert found["generation"]["kind"] == "instruct" and found["values"]["not_read"] == {}
    assert not any(note.startswith("there is no") for note in report.notes)


def test_blocks_of_a_gguf_are_counted_and_not_read(tmp_path):
    tensors = small_tensors()
    shape = tensors["blk.0.ffn_up.weight"][0]
    tensors["blk.0.ffn_up.weight"] = (shape, "Q8_0", bytes(shape[0] * shape[1] // 32 * 34))
    (tmp_path / "q.gguf").write_bytes(gguf_bytes(small_metadata(), tensors))
    report = inspect_checkpoint(tmp_path / "q.gguf", values=True)
    assert report.findings == () and report.sections["quantization"]["evidence"] == {"GGUF Q8_0": 1}
    assert report.sections["values"]["not_read"] == {"Q8_0": 1}
    assert "1 tensors of Q8_0 were not read: their numbers are packed" in report.notes


def test_a_gguf_that_lost_a_bias(tmp_path):
    tensors = small_tensors()
    del tensors["blk.0.attn_v.bias"]
    tensors["blk.0.attn_q.bias"] = ([HEADS * 32], "F32", bytes(4 * HEADS * 32))
    (tmp_path / "lossy.gguf").write_bytes(gguf_bytes(small_metadata(), tensors))
    report = inspect_checkpoint(tmp_path / "lossy.gguf")
    assert report.headline == "1 of 3 q/k/v biases are MISSING" and len(report.findings) == 2


def test_biases_of_a_llama_gguf_are_put_back_in_order(tmp_path):
    """llama.cpp permutes a llama's q and k; the hazard and a comparison need them as a Hugging Face folder has them."""
    plain = write_small(tmp_path / "qwen2.gguf")
    tensors = small_tensors()
    for name, heads in (("q", HEADS), ("k", KV_HEADS)):
        shape, kind, data = tensors[f"blk.0.attn_{name}.bias"]
        moved = permuted(torch.frombuffer(bytearray(data), dtype=torch.float32), heads)
        tensors[f"blk.0.attn_{name}.bias"] = (shape, kind, moved.numpy().tobytes())
    (tmp_path / "llama.gguf").write_bytes(gguf_bytes(small_metadata("llama"), tensors))
    (tmp_path / "wrong.gguf").write_bytes(gguf_bytes(small_metadata("llama"), small_tensors()))
    truth, there, wrong = (read_biases(open_checkpoint(tmp_path / f"{n}.gguf")) for n in ("qwen2", "llama", "wrong"))
    assert truth is not None and there is not None and wrong is not None
    assert all(np.array_equal(truth[0][p], there[0][p]) for p in "qkv")
    assert not np.array_equal(truth[0]["k"], wrong[0]["k"])
    reports = [inspect_checkpoint(file) for file in (plain, tmp_path / "llama.gguf")]
    assert compare(reports)["biases"] == {}
    assert reports[0].sections["hazard"]["layers"] == reports[1].sections["hazard"]["layers"]


def test_a_vocabulary_without_token_types(tmp_path):
    metadata = small_metadata()
    metadata["tokenizer.ggml.token_type"] = numbers([1] * 16)
    tokens = inspect_checkpoint(write_small(tmp_path / "a.gguf", metadata)).sections["tokenizer"]
    assert (tokens["count"], tokens["padded_rows"]) == (16, 0)


@pytest.fixture(scope="module")
def hub():
    with running_hub() as running:
        yield running


def plant(hub: Hub, repo: str, folder: Path, **branches: Path) -> None:
    files = {COMMIT: {file.name: file.read_bytes() for file in folder.iterdir()}}
    names = {"main": COMMIT}
    for name, other in branches.items():
        names[name] = "2" * 40
        files["2" * 40] = {file.name: file.read_bytes() for file in other.iterdir()}
    hub.repos[repo] = Repo(private=False, files=files, branches=names)


def shell(hub: Hub, home: Path, *arguments: str):
    options = {"HF_TOKEN": "reader", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return from_shell(home, hub.url, "qwen2tool", "inspect", *arguments, env=options)


def test_a_model_on_a_hub_by_its_headers(hub, base_folder, base_copy, tmp_path):
    drop(base_copy, "layers.1.self_attn.k_proj.bias")
    plant(hub, "me/tiny", base_folder, lossy=base_copy)
    done = shell(hub, tmp_path, "me/tiny")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "biases sound: all 9 q/k/v biases are there, by name and shape; their numbers were not"
    )
    assert "on the Hub at 111111111111 (headers only)" in done.stdout
    assert "zero biases and the attention hazard would not be seen" in done.stdout
    found = json.loads(shell(hub, tmp_path, "me/tiny", "--revision", "lossy", "--json").stdout)
    assert found["headline"] == "1 of 9 q/k/v biases are MISSING" and found["exit_code"] == 1
    assert (found["biases"]["read"], found["biases"]["stats"], found["hazard"]) == (False, None, None)
    assert found["files"]["commit"] == "2" * 40 and found["files"]["shards"][0]["metadata"] is None


def test_what_a_hub_cannot_give(hub, base_folder, tmp_path):
    plant(hub, "me/whole", base_folder)
    values = shell(hub, tmp_path, "me/whole", "--values")
    assert values.returncode == 2 and "me/whole: on the Hub, where no tensor is read" in values.stderr
    plot = shell(hub, tmp_path, "me/whole", "--plot", str(tmp_path / "out.png"))
    assert plot.returncode == 2 and "biases were not read" in plot.stderr and not (tmp_path / "out.png").exists()


def test_an_adapter_on_a_hub(hub, adapter_folder, tmp_path):
    plant(hub, "me/adapter", adapter_folder)
    done = shell(hub, tmp_path, "me/adapter", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == "adapter"


@pytest.mark.parametrize(
    ("stops", "kind", "runs_on", "beyond"), [([2, 0], "instruct", 0, 0), (0, "base", 1, 0), (5000, None, 1, 1)]
)
def test_where_generation_stops(base_copy, stops, kind, runs_on, beyond):
    (base_copy / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    report = inspect_checkpoint(base_copy)
    found = report.sections["generation"]
    assert (found["kind"], found["end_of_turn_id"], found["file"]) == (kind, 2, True)
    assert sum("does not stop at <|im_end|> (2)" in note for note in report.notes) == runs_on
    assert len(report.findings) == beyond and report.exit_code == beyond
    assert all("stops at id 5000, which the vocabulary of 384 rows" in finding for finding in report.findings)


def test_config_and_generation_config_that_stop_elsewhere(base_copy):
    edit_config(base_copy, eos_token_id=1)
    assert any(
        "config.json stops at 1, generation_config.json at 0, 2" in n for n in inspect_checkpoint(base_copy).notes
    )
    edit_config(base_copy, eos_token_id=2)
    assert not any("readers of either" in note for note in inspect_checkpoint(base_copy).notes)


def test_without_generation_config_the_config_says_where(base_copy):
    (base_copy / "generation_config.json").unlink()
    found = inspect_checkpoint(base_copy).sections["generation"]
    assert found["stops_at"] == [{"id": 2, "token": "<|im_end|>"}] and not found["file"]


def test_a_model_without_template(base_copy):
    edit_json(base_copy / "tokenizer_config.json", lambda settings: settings.pop("chat_template"))
    assert "there is no chat template" in inspect_checkpoint(base_copy).notes
    shutil.copy(base_copy / "config.json", base_copy / "chat_template.jinja")
    assert inspect_checkpoint(base_copy).sections["chat_template"] == "chat_template.jinja"
