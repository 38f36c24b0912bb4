"""A published GGUF file (QWEN2TOOL_REAL_GGUF) against a folder of the same model (QWEN2TOOL_REAL_MODEL).

The file stores 4 to 8 bit weights, F32 biases, and the tied table twice; the folder holds what it dequantises to,
rounded once to bf16, with the table of `output.weight`.
"""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen2tool.checkpoint.view import read
from qwen2tool.convert.read import open_qwen2
from qwen2tool.convert.run import Options, convert
from tests.convert.common import write_gguf
from tests.convert.corpus import NOT_NFC, TEXTS
from tests.convert.llama_oracle import plain_buffers  # noqa: F401  (a fixture)

NEEDED = ("QWEN2TOOL_REAL_MODEL", "QWEN2TOOL_REAL_GGUF")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not all(map(os.environ.get, NEEDED)), reason=f"needs {' and '.join(NEEDED)}"),
]
PROMPTS = ("Write a Python function that reverses a string.", "写一个反转字符串的函数", "12 + 30 = ?")


@pytest.fixture(scope="module")
def folder():
    return Path(os.environ["QWEN2TOOL_REAL_MODEL"])


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "hf"
    convert(os.environ["QWEN2TOOL_REAL_GGUF"], out, Options(tie_head=True))
    return out


def test_every_tensor_is_the_folders(folder, converted):
    ours, theirs = open_qwen2(converted), open_qwen2(folder)
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in theirs.tensors.items():
        found = read(ours.tensors[name])
        assert torch.equal(found.bfloat16(), read(tensor)), name
        assert not name.endswith(".bias") or torch.equal(found, read(tensor).float()), name


def test_config_and_generation_settings(folder, converted):
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (converted, folder))
    different = {key for key in theirs if ours.get(key) != theirs[key]}
    assert different == {"torch_dtype", "sliding_window"}  # fp32 numbers; a window that no layer has
    generation = json.loads((converted / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [151645, 151643] and generation["pad_token_id"] == 151643


def test_tokenizers_agree(folder, converted):
    ours, theirs = (Tokenizer.from_file(str(path / "tokenizer.json")) for path in (converted, folder))
    assert ours.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text).ids, text
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def texts_in(folder: Path) -> list[str]:
    """Records of .json and .jsonl files as JSON text, paragraphs of .txt files."""
    found: list[str] = []
    for file in sorted(folder.iterdir()):
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            found += [json.dumps(record, ensure_ascii=False) for record in json.loads(text)]
        elif file.suffix == ".jsonl":
            found += [json.loads(line)["text"] for line in text.splitlines()]
        elif file.suffix == ".txt":
            found += text.split("\n\n")
    return found


@pytest.mark.skipif("QWEN2TOOL_TEXTS" not in os.environ, reason="needs QWEN2TOOL_TEXTS, a folder of .json and .txt")
def test_tokenizers_agree_on_a_folder_of_texts(folder, converted):
    """Measured on 3,291 records and paragraphs, English and Chinese, prose, tool calls and web pages."""
    ours, theirs = (Tokenizer.from_file(str(path / "tokenizer.json")) for path in (converted, folder))
    texts = texts_in(Path(os.environ["QWEN2TOOL_TEXTS"]))
    assert texts and not [text for text in texts if ours.encode(text).ids != theirs.encode(text).ids]


def continuation(folder, prompt) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return model.generate(**inputs, max_new_tokens=24, do_sample=False, repetition_penalty=1.0)[0].tolist()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_same_is_generated(folder, converted, prompt):
    assert continuation(converted, prompt) == continuation(folder, prompt)


def test_the_file_as_it_is_has_an_untied_head():
    view = open_qwen2(os.environ["QWEN2TOOL_REAL_GGUF"])
    assert not view.geometry.tie_word_embeddings and "head is untied" in view.lossy
    few = [read(view.tensors[name])[:1000] for name in ("model.embed_tokens.weight", "lm_head.weight")]
    assert 0.03 < torch.dist(*few) / few[1].norm() < 0.06


@pytest.mark.usefixtures("plain_buffers")
@pytest.mark.parametrize(("kind", "most"), [("bf16", 1e-2), ("q8_0", 1e-1)])
def test_llama_cpp_computes_the_same(folder, tmp_path, kind, most):
    """Measured, mean / max KLD: bf16 3e-5 / 5e-4, q8_0 7e-4 / 6e-3 (f32 1e-10 / 5e-9, f16 4e-7 / 5e-6)."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (it compiles llama.cpp)")
    write_gguf(open_qwen2(folder), tmp_path / "m.gguf", kind)
    theirs = llama_cpp.Llama(
        str(tmp_path / "m.gguf"), n_ctx=256, n_batch=256, logits_all=True, type_k=0, type_v=0, flash_attn=False,
        verbose=False,
    )  # fmt: skip
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for index, text in enumerate(TEXTS):
        if index != NOT_NFC:
            assert theirs.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text).ids, text
    ids = tokenizer.encode(TEXTS[0] + TEXTS[1] + TEXTS[9]).ids
    theirs.reset()
    theirs.eval(ids)
    found = torch.tensor(theirs.scores[: len(ids)]).double().log_softmax(-1)
    theirs.close()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    assert float((wanted.exp() * (wanted - found)).sum(-1).max()) < most
