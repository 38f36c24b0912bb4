"""A published Qwen2.5-0.5B, if there is one: its biases reach 211, and its tokenizer is the real one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen2tool.convert.run import Options, convert
from tests.checkpoint.edits import drop
from tests.convert.common import config_of, hashes, manifest_of
from tests.convert.corpus import TEXTS

FOLDER = os.environ.get("QWEN2TOOL_REAL_MODEL")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not FOLDER, reason="QWEN2TOOL_REAL_MODEL names no checkpoint folder"),
]


@torch.no_grad()
def real_logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    """The folder's own class and tokenizer, on its answer to a question."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ids = AutoTokenizer.from_pretrained(folder)("def reverse(text):\n    return text[::-1]", return_tensors="pt")
    return model(**ids).logits


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("real") / "llama"
    convert(str(FOLDER), out, Options(to="llama"))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llamas_layout_is_the_same_function(llama_folder, dtype):
    mine, theirs = real_logits(Path(str(FOLDER)), dtype), real_logits(llama_folder, dtype)
    assert torch.equal(mine, theirs) and config_of(llama_folder)["model_type"] == "llama"


def test_the_tokenizer_splits_every_script_alike(llama_folder):
    mine, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (Path(str(FOLDER)), llama_folder))
    assert all(mine(text)["input_ids"] == theirs(text)["input_ids"] for text in TEXTS)


def test_without_biases_and_whole_again(llama_folder, tmp_path):
    """As mergekit's passthrough leaves it; the fault is seen by the logits, the cure by every byte."""
    original = Path(str(FOLDER))
    truth = real_logits(original, torch.float32)
    drop(llama_folder, "_proj.bias")
    damaged = real_logits(llama_folder, torch.float32)
    assert not torch.equal(damaged.argmax(-1), truth.argmax(-1))
    report = convert(llama_folder, tmp_path / "whole", biases_from=original)
    assert report.biases is not None and len(report.biases["restored"]) == 72
    assert report.biases["byte_equal"] == report.biases["compared"]
    assert hashes(tmp_path / "whole") == hashes(original)
    before, after = config_of(original), config_of(tmp_path / "whole")
    assert {key: after[key] for key in before} == before
    assert len(manifest_of(tmp_path / "whole")["tensors"]) == len(hashes(original))
