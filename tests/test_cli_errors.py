"""Bad input gets a sentence: it names the thing and the remedy, the exit code is not 0, nothing is half-written."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli_runner import run
from tests.tiny import write_adapter, write_shards, write_tiny
from tests.training.common import write_instructions

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def edit_json(file: Path, change) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def edit_shard(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def drop_tensor(folder: Path, name: str) -> None:
    """As a careless tool would: gone from shard and index alike."""
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(name))
    for shard in (FIRST, SECOND):
        edit_shard(folder / shard, lambda tensors: tensors.pop(name, None))


def truncate(folder: Path) -> None:
    with (folder / SECOND).open("r+b") as handle:
        handle.truncate((folder / SECOND).stat().st_size - 1000)


def corrupt(folder: Path) -> None:
    with (folder / FIRST).open("r+b") as handle:
        handle.seek(40)
        handle.write(b"\xff\xfe not json")


def forget_shard(folder: Path) -> None:
    (folder / SECOND).unlink()


def forget_tensor(folder: Path) -> None:
    edit_shard(folder / FIRST, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))


def smuggle_tensor(folder: Path) -> None:
    edit_shard(folder / FIRST, lambda tensors: tensors.update({"model.stowaway.weight": torch.ones(2)}))


def other_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(model_type="mistral"))


def wrong_shape(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(intermediate_size=128))


def lose_bias(folder: Path) -> None:
    drop_tensor(folder, "model.layers.1.self_attn.k_proj.bias")


DAMAGE = [
    (truncate, [SECOND, "truncated"]),
    (corrupt, [FIRST, "corrupt"]),
    (forget_shard, [INDEX, SECOND, "not there"]),
    (forget_tensor, [INDEX, "model.layers.0.mlp.up_proj.weight", FIRST]),
    (smuggle_tensor, [FIRST, "model.stowaway.weight", "index does not know it"]),
    (other_architecture, ["model_type", "mistral"]),
    (lose_bias, ["model.layers.1.self_attn.k_proj.bias", "missing"]),
    (wrong_shape, ["gate_proj.weight", "config.json asks for"]),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
@pytest.mark.parametrize("command", ["train", "merge", "push"])
def test_damaged_checkpoint_is_refused_by_every_command(base_copy, adapter_folder, tmp_path, damage, words, command):
    damage(base_copy)
    out = tmp_path / "out"
    arguments = {
        "train": ("train", "--model", base_copy, "--data", write_instructions(tmp_path / "d.jsonl"), "--output", out),
        "merge": ("merge", base_copy, adapter_folder, out),
        "push": ("push", base_copy, "me/model", "--dry-run"),
    }
    outcome = run(*arguments[command])
    assert outcome.code in (1, 2)
    assert all(word in outcome.error for word in words), outcome.error
    assert not list(tmp_path.glob("*out*")), "nothing half-written"


@pytest.mark.parametrize(("damage", "words"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_damaged_checkpoint_is_found_by_inspect(base_copy, damage, words):
    assert run("inspect", base_copy).code == 0
    damage(base_copy)
    outcome = run("inspect", base_copy)
    assert outcome.code in (1, 2)
    text = outcome.out + outcome.err
    assert words[0] in text or (damage is lose_bias and "missing biases" in text), text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", "nowhere"), ["nowhere", "no such file or folder"]),
        (("inspect", "EMPTY"), ["not a checkpoint", "config.json"]),
        (("merge", "BASE", "nowhere", "out"), ["nowhere", "not a PEFT adapter"]),
        (("merge", "BASE", "BASE", "out"), ["not a PEFT adapter"]),
        (("verify-equivalence", "BASE", "nowhere"), ["nowhere"]),
        (("verify-equivalence", "BASE", "BASE", "--text", "nowhere"), ["nowhere", "no such file"]),
        (("verify-equivalence", "BASE", "BASE", "--max-tokens", "0"), ["--max-tokens"]),
        (("verify-equivalence", "BASE", "BASE", "--text", "x", "--data", "y"), ["--text and --data"]),
        (("push", "EMPTY", "me/model", "--dry-run"), ["EMPTY"]),
        (("train", "--model", "BASE", "--output", "out"), ["--data is missing"]),
        (("train", "--model", "BASE", "--data", "nowhere", "--output", "out"), ["nowhere", "no such file"]),
        (
            ("train", "--model", "BASE", "--data", "DATA", "--adapter", "nowhere", "--output", "out"),
            ["nowhere", "not a PEFT"],
        ),
        (("train", "nowhere.yaml"), ["nowhere.yaml", "no such settings file"]),
        (("train", "--frobnicate"), ["--frobnicate"]),
        (("merge", "BASE", "ADAPTER", "out", "--dtype", "int8"), ["--dtype", "int8", "bfloat16"]),
    ],
)
def test_wrong_arguments_are_named(base_folder, adapter_folder, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").mkdir()
    write_instructions(Path("DATA"), 2)
    Path("BASE").symlink_to(base_folder)
    Path("ADAPTER").symlink_to(adapter_folder)
    outcome = run(*arguments)
    assert outcome.code == 2
    assert all(word in outcome.error for word in words), outcome.error
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"instruction": "Q", "output": "A"}\n{"instruction": "Q", ', ["data.jsonl line 2", "malformed JSON"]),
        ('{"instruction": "Q", "output": ""}', ["data.jsonl line 1", "no answer"]),
    ],
)
def test_bad_records_are_named(base_folder, tmp_path, text, words):
    (tmp_path / "data.jsonl").write_text(text)
    outcome = run("train", "--model", base_folder, "--data", tmp_path / "data.jsonl", "--output", tmp_path / "out")
    assert outcome.code == 2 and all(word in outcome.error for word in words), outcome.error
    assert not (tmp_path / "out").exists()


def test_unknown_settings_key_names_the_nearest(tmp_path):
    (tmp_path / "run.yaml").write_text("model: m\ndata: d\noutput: o\nlearning_rates: 1\n")
    outcome = run("train", tmp_path / "run.yaml")
    assert outcome.code == 2 and "learning_rates" in outcome.error and "'learning_rate'" in outcome.error


def test_adapter_for_another_shape(adapter_folder, tmp_path):
    other = write_tiny(tmp_path / "other", hidden_size=96, num_attention_heads=6)
    outcome = run("merge", other, adapter_folder, tmp_path / "out")
    assert outcome.code == 2 and "down_proj" in outcome.error and "is for a weight of shape" in outcome.error
    assert not (tmp_path / "out").exists()


def test_adapter_of_another_base(base_folder, tmp_path):
    write_instructions(tmp_path / "data.jsonl", 4)
    trained = ("--data", tmp_path / "data.jsonl", "--output", tmp_path / "run", "--rank", "2", "--max-steps", "1")
    assert run("train", "--model", base_folder, *trained).code == 0
    other = write_tiny(tmp_path / "other", seed=5)
    outcome = run("merge", other, tmp_path / "run" / "adapter", tmp_path / "out")
    assert outcome.code == 2 and "another base" in outcome.error and "--allow-other-base" in outcome.error
    assert run("merge", base_folder, tmp_path / "run" / "adapter", tmp_path / "out").code == 0


@pytest.mark.parametrize("command", ["merge", "train"])
def test_output_that_exists(base_folder, adapter_folder, tmp_path, command):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    data = write_instructions(tmp_path / "data.jsonl", 4)
    arguments = {
        "merge": ("merge", base_folder, adapter_folder, out),
        "train": ("train", "--model", base_folder, "--data", data, "--output", out, "--max-steps", "1", "--rank", "2"),
    }[command]
    outcome = run(*arguments)
    assert outcome.code == 2 and "already exists" in outcome.error and "--overwrite" in outcome.error
    refused = run(*arguments, "--overwrite")
    assert refused.code == 2 and "out: holds mine.txt, and is no checkpoint, adapter, training run" in refused.error
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "adapter_config.json").write_text("{}")
    assert run(*arguments, "--overwrite").code == 0
    assert not (out / "mine.txt").exists()


def in_subprocess(*arguments: str | Path, **options) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "qwen2tool", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, cwd=Path(__file__).parent.parent, **pipes, **options)


def test_full_disk_while_merging(base_folder, adapter_folder, tmp_path):
    """A limit on the size of a file stands for the full disk: both fail the write, with nothing to be done about it."""
    limit = (base_folder / FIRST).stat().st_size // 2
    out = tmp_path / "out"
    process = in_subprocess(
        "merge",
        base_folder,
        adapter_folder,
        out,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit,) * 2),
    )
    _, err = process.communicate()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and len(errors) == 1, err
    assert str(out) in errors[0] and "disk full" in errors[0] and "Traceback" not in err
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_killed_while_merging(tmp_path):
    """SIGKILL in the middle of the write: no output, and the next run succeeds and clears what was left."""
    base = write_tiny(tmp_path / "base", hidden_size=256, intermediate_size=4096, vocab_size=8192)
    adapter = write_adapter(tmp_path / "adapter", base)
    out = tmp_path / "out"
    process = in_subprocess("merge", base, adapter, out)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*/*.safetensors")) and process.poll() is None:
        assert time.monotonic() < deadline
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the merge must still have been writing"
    assert not out.exists() and list(tmp_path.glob(".out.partial-*"))
    assert run("merge", base, adapter, out).code == 0
    assert run("inspect", out).code == 0
    assert not list(tmp_path.glob(".out.partial-*"))


def test_interrupted_while_training(base_folder, tmp_path):
    """Ctrl-C: one line and the shell's own exit code; what was logged stays, no adapter appears."""
    data = write_instructions(tmp_path / "data.jsonl", 8)
    out = tmp_path / "out"
    process = in_subprocess(
        "train", "--model", base_folder, "--data", data, "--output", out, "--epochs", "5000", "--device", "cpu",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and "Traceback" not in err
    assert any(line.startswith("error: interrupted.") for line in err.splitlines())
    assert not (out / "adapter").exists()


def test_full_disk_while_saving_the_adapter(base_folder, tmp_path):
    data = write_instructions(tmp_path / "data.jsonl", 4)
    out = tmp_path / "out"
    process = in_subprocess(
        "train", "--model", base_folder, "--data", data, "--output", out, "--max-steps", "1", "--device", "cpu",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000,) * 2),
    )  # fmt: skip
    _, err = process.communicate()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and len(errors) == 1 and "disk full" in errors[0] and "Traceback" not in err, err
    assert not list(out.glob("*adapter*"))


def test_bin_files_are_inspected_and_not_trained(base_copy, tmp_path):
    state = load_file(base_copy / FIRST) | load_file(base_copy / SECOND)
    for shard in (FIRST, SECOND, INDEX):
        (base_copy / shard).unlink()
    torch.save(state, base_copy / "pytorch_model.bin")
    assert run("inspect", base_copy).code == 0
    data = write_instructions(tmp_path / "data.json", 4)
    outcome = run("train", "--model", base_copy, "--data", data, "--output", tmp_path / "run")
    assert outcome.code == 2 and "stored as bin" in outcome.error and not (tmp_path / "run").exists()
    (base_copy / "pytorch_model.bin").write_bytes(b"\x80\x02")
    outcome = run("inspect", base_copy)
    assert outcome.code == 2 and "not a file of torch" in outcome.error


def test_single_file_checkpoint_is_as_good(base_copy, base_folder):
    state = load_file(base_copy / FIRST) | load_file(base_copy / SECOND)
    for shard in (FIRST, SECOND, INDEX):
        (base_copy / shard).unlink()
    write_shards(base_copy, state, shards=1)
    assert run("inspect", base_copy).code == 0
