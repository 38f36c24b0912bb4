"""`qwen2tool convert` as a user meets it: a table, JSON, exit codes, one line of error."""

from __future__ import annotations

import json

import pytest

from qwen2tool.commands.convert import _bytes
from qwen2tool.errors import UserError
from tests.checkpoint.edits import drop, edit_json, rewrite
from tests.cli_runner import run
from tests.convert.common import hashes


def test_there_and_back(base_folder, tmp_path):
    there = run("convert", base_folder, tmp_path / "llama", "--to", "llama")
    assert there.code == 0 and "39 copied, 3 zeros" in there.out and "tokenizer.json" in there.out
    back = run("convert", tmp_path / "llama", tmp_path / "back", "--max-shard-size", "100kB", "--json")
    found = json.loads(back.out)
    assert back.code == 0 and found["read_as"] == "Llama layout" and found["tensors"] == {"copied": 39}
    assert found["damage"] is None and found["biases"] is None and found["seconds"] > 0
    assert hashes(tmp_path / "back") == hashes(base_folder)


def test_exit_codes(base_copy, base_folder, tmp_path):
    """1: something is wrong with the checkpoint; 2: it cannot be done as asked."""
    drop(base_copy, "model.layers.0.self_attn.q_proj.bias")
    damaged = run("convert", base_copy, tmp_path / "out", "--to", "llama")
    assert damaged.code == 1 and "1 of 9 q/k/v biases are missing" in damaged.error and "--biases-from" in damaged.error
    healed = run("convert", base_copy, tmp_path / "out", "--biases-from", base_folder)
    assert healed.code == 0 and "1 from base; of the other 38 tensors 38 are its own byte for byte" in healed.out
    assert run("convert", base_folder, tmp_path / "out").code == 2, "exists"
    assert run("convert", base_folder, tmp_path / "out", "--overwrite").code == 0
    lossy = run("convert", base_folder, tmp_path / "half", "--dtype", "float16")
    assert lossy.code == 2 and "--allow-lossy" in lossy.error and not (tmp_path / "half").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--to", "mistral"), "--to is 'mistral'"),
        (("--dtype", "int8"), "--dtype is 'int8'"),
        (("--gguf-type", "q4_k"), "--gguf-type is 'q4_k'"),
        (("--max-shard-size", "many"), "--max-shard-size is 'many'"),
        (("--drop-biases",), "--drop-biases"),
    ],
)
def test_wrong_flags_are_named(base_folder, tmp_path, flags, words):
    outcome = run("convert", base_folder, tmp_path / "out", *flags)
    assert outcome.code == 2 and words in outcome.error and not (tmp_path / "out").exists()


def test_a_loss_stands_in_the_table(base_folder, tmp_path):
    lossy = run("convert", base_folder, tmp_path / "out", "--to", "llama", "--drop-biases", "--allow-lossy")
    assert lossy.code == 0 and "LOST" in lossy.out and "mean KLD" in lossy.out
    packed = run("convert", base_folder, tmp_path / "nf4", "--to", "nf4")
    assert "21 tensors rounded to NF4" in packed.out and "18 other tensors exact" in packed.out
    back = run("convert", tmp_path / "nf4", tmp_path / "back")
    assert back.code == 0 and "do not come back" in back.err


@pytest.mark.parametrize("to", ["qwen2", "gguf"])
def test_zero_biases_are_warned_of(base_copy, base_folder, tmp_path, to):
    """As a load that did not find them leaves them; it is the source's fault, so the conversion goes on."""
    zero = ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.self_attn.v_proj.bias"]
    rewrite(base_copy, lambda state: [state[name].zero_() for name in zero])
    outcome = run("convert", base_copy, tmp_path / f"out.{to}", "--to", to, "--json")
    words = f"2 of 9 q/k/v biases hold nothing but zeros (the first is {zero[0]})"
    assert outcome.code == 0 and outcome.err.count("warning: ") == 1 and words in outcome.err
    (warning,) = json.loads(outcome.out)["warnings"]
    assert words in warning and "--biases-from" in warning
    rewrite(base_copy, lambda state: [state[n].zero_() for n in state if n.endswith("_proj.bias")])
    assert "all q/k/v biases hold nothing but zeros, as" in run("convert", base_copy, tmp_path / "all").err
    healed = run("convert", base_copy, tmp_path / f"healed.{to}", "--to", to, "--biases-from", base_folder)
    sound = run("convert", base_folder, tmp_path / f"sound.{to}", "--to", to, "--json")
    assert healed.code == 0 and "warning" not in healed.err + sound.err and json.loads(sound.out)["warnings"] == []


def test_damaged_files_beside_the_weights_are_warned_of(base_copy, tmp_path):
    """The weights are converted, the file is copied byte for byte, and nobody has to find out when a chat fails."""
    data = (base_copy / "tokenizer.json").read_bytes()
    (base_copy / "tokenizer.json").write_bytes(data[:1000])
    (base_copy / "chat_template.jinja").write_text("{% for m in messages %}")
    outcome = run("convert", base_copy, tmp_path / "out", "--to", "llama", "--json")
    first, second = json.loads(outcome.out)["warnings"]
    assert outcome.code == 0 and outcome.err.count("warning: ") == 2
    assert "tokenizer.json: ends early" in first
    assert "chat_template.jinja: the chat template is no valid one (line 1: Unexpected end of template)" in second
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == data[:1000]
    refused = run("convert", base_copy, tmp_path / "out.gguf", "--to", "gguf")
    assert refused.code == 2 and "tokenizer.json: not valid JSON (it ends early)" in refused.err
    (base_copy / "tokenizer.json").write_bytes(data)
    (base_copy / "chat_template.jinja").write_bytes(b"\xff")
    refused = run("convert", base_copy, tmp_path / "out.gguf", "--to", "gguf")
    assert refused.code == 2 and "chat_template.jinja: not UTF-8 text" in refused.err
    (base_copy / "chat_template.jinja").unlink()
    assert "warning" not in run("convert", base_copy, tmp_path / "sound.gguf", "--to", "gguf").err
    edit_json(base_copy / "tokenizer_config.json", lambda settings: settings.update(chat_template=[5]))
    refused = run("convert", base_copy, tmp_path / "out.gguf", "--to", "gguf")
    assert refused.code == 2 and "tokenizer_config.json: chat_template is a list of other things" in refused.err


@pytest.mark.parametrize(("text", "count"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("100kB", 100_000), ("7", 7)])
def test_sizes(text, count):
    assert _bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "0.1", "5 PB"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="--max-shard-size"):
        _bytes(text)
