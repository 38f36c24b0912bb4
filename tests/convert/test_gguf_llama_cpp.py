"""A real llama.cpp loads what is written, and computes what transformers computes.

Needs llama-cpp-python (a source package: `pip install llama-cpp-python` compiles llama.cpp, 6 minutes on one core),
which is no dependency: without it these tests are skipped. Keys and values are cached in fp32, since llama.cpp's
default of fp16 alone costs a KLD of 1e-5. Measured (version 0.3.36, mean / max KLD from transformers in fp32):
tiny-qwen2 f32 4e-11 / 8e-10, f16 6e-7 / 3e-6, bf16 4e-5 / 2e-4, q8_0 1.5e-3 / 5e-3 (llama.cpp rounds activations to the
type of the weights, too).
"""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import qwen2tool
from qwen2tool.checkpoint.view import Derived
from qwen2tool.convert.read import open_qwen2
from tests.convert.common import write_gguf
from tests.convert.corpus import TEXTS
from tests.convert.gguf_files import write_llama_gguf
from tests.convert.llama_oracle import plain_buffers  # noqa: F401  (a fixture)
from tests.tiny import write_tiny

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (it compiles llama.cpp)")
pytestmark = pytest.mark.usefixtures("plain_buffers")
ASSET = Path(qwen2tool.__file__).parent / "assets" / "tiny-qwen2"
IDS = [(17 * i + 5) % 300 + 3 for i in range(60)]
MOST_KLD = {"f32": 1e-7, "f16": 3e-5, "bf16": 2e-3, "q8_0": 3e-2}
"""Ten times what was measured, or less."""


def opened(file):
    return llama_cpp.Llama(
        str(file), n_ctx=128, n_batch=128, n_threads=1, logits_all=True, type_k=0, type_v=0, flash_attn=False,
        verbose=False,
    )  # fmt: skip


def their_logits(file) -> torch.Tensor:
    model = opened(file)
    model.eval(IDS)
    logits = torch.tensor(model.scores[: len(IDS)]).double()
    model.close()
    return logits


def our_logits(folder) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].double()


def most_kld(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.log_softmax(-1), other.log_softmax(-1)
    return float((one.exp() * (one - other)).sum(-1).max())


@pytest.mark.parametrize("kind", MOST_KLD)
def test_the_same_function(tmp_path, kind):
    write_gguf(open_qwen2(ASSET), tmp_path / "m.gguf", kind)
    assert most_kld(our_logits(ASSET), their_logits(tmp_path / "m.gguf")) < MOST_KLD[kind]


def test_one_bias_less_is_another_function(tmp_path):
    view = open_qwen2(ASSET)
    name = "model.layers.2.self_attn.k_proj.bias"
    shape = view.tensors[name].shape
    zero = Derived(name=name, dtype="F32", shape=shape, sources=(), compute=lambda: torch.zeros(shape))
    write_gguf(replace(view, tensors=dict(view.tensors) | {name: zero}), tmp_path / "m.gguf", "f32")
    assert most_kld(our_logits(ASSET), their_logits(tmp_path / "m.gguf")) > 10 * MOST_KLD["f32"]


@pytest.mark.parametrize("permute_biases", [True, False])
def test_llamas_rows_are_what_llama_cpp_wants(tmp_path, permute_biases):
    """The files that `view_of_gguf` is tested on are read by llama.cpp as the model that they were made from."""
    folder = write_tiny(tmp_path / "hf", dtype=torch.float32)
    view = open_qwen2(folder)
    write_gguf(view, tmp_path / "m.gguf", "f32")
    write_llama_gguf(view, tmp_path / "m.gguf", tmp_path / "llama.gguf", permute_biases=permute_biases)
    same = most_kld(our_logits(folder), their_logits(tmp_path / "llama.gguf")) < MOST_KLD["f32"]
    assert same is permute_biases


def test_yarn(tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    plain = {"rope_type": "default", "rope_theta": 1e4}
    folder = write_tiny(tmp_path / "hf", dtype=torch.float32, rope_parameters=yarn)
    other = write_tiny(tmp_path / "plain", dtype=torch.float32, rope_parameters=plain)
    write_gguf(open_qwen2(folder), tmp_path / "m.gguf", "f32")
    theirs = their_logits(tmp_path / "m.gguf")
    assert most_kld(our_logits(folder), theirs) < MOST_KLD["f32"]
    assert most_kld(our_logits(other), theirs) > 10 * MOST_KLD["f32"]


def test_tokenizers_agree_on_every_script(tmp_path):
    write_gguf(open_qwen2(ASSET), tmp_path / "m.gguf", "q8_0")
    theirs, ours = opened(tmp_path / "m.gguf"), Tokenizer.from_file(str(ASSET / "tokenizer.json"))
    for text in (unicodedata.normalize("NFC", text) for text in TEXTS):
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ours.encode(text).ids, text
    assert (theirs.token_eos(), theirs.token_bos()) == (3042, 3040)
    assert "im_start" in theirs.metadata["tokenizer.chat_template"]
    theirs.close()
