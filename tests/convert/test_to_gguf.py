"""`--to gguf` and back: exact where the type is, a stated rounding where it is not, the biases exact in any case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qwen2tool.convert.run import Options, convert
from qwen2tool.errors import UserError
from tests.checkpoint.edits import drop
from tests.convert.common import config_of, hashes
from tests.convert.qwen1_model import write_qwen1, write_tiktoken
from tests.convert.test_qwen1_tokenizer import BUNDLED, ORDINARY
from tests.tiny import write_tiny


def manifest_beside(file: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(file.with_suffix(".qwen2tool-convert.json").read_text())
    return value


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_there_and_back_is_exact(base_folder, tmp_path, kind):
    file = tmp_path / "model.gguf"
    report = convert(base_folder, file, Options(to="gguf", gguf_type=kind))
    assert report.damage is None and manifest_beside(file)["damage"] is None
    convert(file, tmp_path / "back", Options(dtype="bfloat16"))
    assert hashes(tmp_path / "back") == hashes(base_folder)
    before, after = config_of(base_folder), config_of(tmp_path / "back")
    assert {key: after[key] for key in before} == before
    mine, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (base_folder, tmp_path / "back"))
    assert mine("Grüße, 你好 <|im_start|>user")["input_ids"] == theirs("Grüße, 你好 <|im_start|>user")["input_ids"]


def test_q8_0_states_what_it_rounded(base_folder, tmp_path):
    file = tmp_path / "model.gguf"
    report = convert(base_folder, file, Options(to="gguf", gguf_type="q8_0"))
    assert report.damage is not None and 0.001 < report.damage["median_relative_error"] < 0.01
    manifest = manifest_beside(file)
    assert manifest["damage"] == report.damage and manifest["to"] == "gguf" and len(manifest["tensors"]) == 39
    assert manifest["tensors"]["model.layers.0.mlp.up_proj.weight"]["how"] == "from BF16 to Q8_0"
    back = convert(file, tmp_path / "back")
    assert "the biases are exact" in back.lossy
    convert(base_folder, tmp_path / "wide", Options(dtype="float32"))
    before, after = hashes(tmp_path / "wide"), hashes(tmp_path / "back")
    vectors = [name for name in before if name.endswith(("bias", "norm.weight"))]
    assert len(vectors) == 16 and all(before[name] == after[name] for name in vectors)
    changed = [name for name in before if before[name] != after[name]]
    assert report.damage["what"] == f"{len(changed)} tensors rounded to Q8_0"


def test_a_file_is_not_written_over_itself(base_folder, tmp_path):
    file = tmp_path / "model.gguf"
    convert(base_folder, file, Options(to="gguf", gguf_type="f32"))
    with pytest.raises(UserError, match="already exists"):
        convert(base_folder, file, Options(to="gguf"))
    with pytest.raises(UserError, match="would delete what it is made from"):
        convert(file, file, Options(to="gguf"), overwrite=True)
    whole = file.read_bytes()
    damaged = write_tiny(tmp_path / "damaged")
    drop(damaged, "v_proj.bias")
    with pytest.raises(UserError, match="would delete what it is made from"):
        convert(damaged, file, Options(to="gguf"), biases_from=file, overwrite=True)
    assert file.read_bytes() == whole
    convert(base_folder, file, Options(to="gguf", gguf_type="q8_0"), overwrite=True)


def test_lost_biases_are_restored_on_the_way(base_copy, base_folder, tmp_path):
    drop(base_copy, "v_proj.bias")
    with pytest.raises(UserError, match="3 of 9 q/k/v biases are missing"):
        convert(base_copy, tmp_path / "model.gguf", Options(to="gguf"))
    convert(base_copy, tmp_path / "model.gguf", Options(to="gguf", gguf_type="bf16"), biases_from=base_folder)
    assert len(manifest_beside(tmp_path / "model.gguf")["biases"]["restored"]) == 3
    convert(tmp_path / "model.gguf", tmp_path / "back", Options(dtype="bfloat16"))
    assert hashes(tmp_path / "back") == hashes(base_folder)


def test_qwen1_in_one_step_is_qwen1_in_two(tmp_path):
    """With its tokenizer; without one it is refused, since a GGUF holds its own."""
    source = write_qwen1(tmp_path / "qwen1", vocab_size=3328)
    with pytest.raises(UserError, match=r"tokenizer\.json") as refused:
        convert(source, tmp_path / "none.gguf", Options(to="gguf"))
    assert refused.value.fix and not (tmp_path / "none.gguf").exists()
    write_tiktoken(source / "qwen.tiktoken", BUNDLED, ORDINARY)
    convert(source, tmp_path / "one.gguf", Options(to="gguf", gguf_type="bf16"))
    convert(source, tmp_path / "qwen2")
    convert(tmp_path / "one.gguf", tmp_path / "back", Options(dtype="bfloat16"))
    assert hashes(tmp_path / "back") == hashes(tmp_path / "qwen2")
    one, two = (PreTrainedTokenizerFast.from_pretrained(tmp_path / name) for name in ("back", "qwen2"))
    assert one("Grüße, 世界!")["input_ids"] == two("Grüße, 世界!")["input_ids"]
