"""Tokenizers out of GGUF files give the ids of the tokenizer that went in, on text of many scripts."""

from __future__ import annotations

import json
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import qwen2tool
from qwen2tool.checkpoint.gguf_file import open_gguf
from qwen2tool.convert.gguf_tokenizer import side_files_of, side_files_of_gguf
from qwen2tool.convert.gguf_vocab import Kind, tokenizer_of_gguf
from qwen2tool.convert.gguf_vocab_json import tokenizer_of_folder
from qwen2tool.convert.read import open_qwen2
from qwen2tool.errors import UserError
from tests.convert.common import write_gguf
from tests.convert.corpus import NOT_NFC, TEXTS
from tests.convert.gguf_files import numbers, small_metadata, string, strings, u32, write_small
from tests.tiny import write_tiny

ASSET = Path(qwen2tool.__file__).parent / "assets" / "tiny-qwen2"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """name -> (source folder, GGUF file): Qwen2's rule, added tokens last; GPT-2's rule, added tokens first."""
    root = tmp_path_factory.mktemp("tokenizers")
    sources = {"qwen2": ASSET, "gpt-2": write_tiny(root / "hf")}
    for name, folder in sources.items():
        write_gguf(open_qwen2(folder), root / f"{name}.gguf", "q8_0")
    return {name: (folder, root / f"{name}.gguf") for name, folder in sources.items()}


def loaded(side_files, path):
    path.mkdir(parents=True)
    for name, text in side_files.items():
        (path / name).write_bytes(text)
    return Tokenizer.from_file(str(path / "tokenizer.json")), path


def differences(one: Tokenizer, other: Tokenizer) -> list[str]:
    return [text for text in TEXTS if one.encode(text).ids != other.encode(text).ids]


@pytest.mark.parametrize("rule", ["qwen2", "gpt-2"])
@pytest.mark.parametrize("kept", [True, False])
def test_ids_are_the_same(files, tmp_path, rule, kept):
    folder, file = files[rule]
    checkpoint = open_gguf(file)
    tokenizer = tokenizer_of_gguf(checkpoint)
    assert tokenizer.pre == rule
    if not kept:  # a file of llama.cpp's converter holds none of our JSON
        tokenizer = replace(tokenizer, sidecar={})
    ours, _ = loaded(side_files_of(tokenizer, file, 512), tmp_path / "out")
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    changed = [TEXTS[NOT_NFC]] if rule == "gpt-2" and not kept else []  # that tokenizer does not normalise
    assert differences(ours, theirs) == changed
    for text in TEXTS:
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text) or (
            rule == "gpt-2"
        )
    assert ours.get_vocab() == theirs.get_vocab()


def test_transformers_loads_the_folder_and_its_template(files, tmp_path):
    folder, file = files["qwen2"]
    tokenizer = replace(tokenizer_of_gguf(open_gguf(file)), sidecar={})
    _, path = loaded(side_files_of(tokenizer, file, 512), tmp_path / "out")
    ours, theirs = AutoTokenizer.from_pretrained(path), AutoTokenizer.from_pretrained(folder)
    assert len(ours) == len(theirs)
    assert (ours.eos_token, ours.pad_token, ours.bos_token) == (theirs.eos_token, theirs.pad_token, theirs.bos_token)
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids, text
        ids = theirs(text).input_ids
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    chat = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hi"}]
    wanted = theirs.apply_chat_template(chat, tokenize=False)
    assert ours.apply_chat_template(chat, tokenize=False) == wanted
    (path / "chat_template.jinja").unlink()  # transformers 4 reads the other copy
    assert AutoTokenizer.from_pretrained(path).apply_chat_template(chat, tokenize=False) == wanted


def test_files_that_we_wrote_come_back_field_by_field(files):
    for folder, file in files.values():
        found = side_files_of_gguf(open_gguf(file))
        template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
        assert found["chat_template.jinja"].decode() == template
        for name in ("tokenizer_config.json", "generation_config.json"):
            assert json.loads(found[name]) == json.loads((folder / name).read_text())
        ours, theirs = json.loads(found["tokenizer.json"]), json.loads((folder / "tokenizer.json").read_text())
        assert {k: v for k, v in ours.items() if k != "model"} == {k: v for k, v in theirs.items() if k != "model"}
        assert ours["model"]["merges"] == theirs["model"]["merges"]


def test_kept_json_that_no_longer_fits_is_not_used(files):
    _, file = files["qwen2"]
    tokenizer = tokenizer_of_gguf(open_gguf(file))
    assert tokenizer.kinds[3042] == Kind.CONTROL
    kinds = [*tokenizer.kinds]
    kinds[3042] = Kind.USER_DEFINED
    edited = replace(tokenizer, kinds=kinds, ids=tokenizer.ids | {"eos": 3040})
    found = side_files_of(edited, file, 512)
    added = {token["id"]: token["special"] for token in json.loads(found["tokenizer.json"])["added_tokens"]}
    assert added == {3040: True, 3041: True, 3042: False}
    assert json.loads(found["tokenizer_config.json"])["eos_token"] == "<|endoftext|>"
    assert json.loads(found["generation_config.json"])["eos_token_id"] == 3040
    for odd in ("nonsense", "[]", '{"model": 3}', '{"model": {}, "added_tokens": 7}', '{"model": {"type": "BPE"}}'):
        broken = replace(tokenizer, sidecar=dict.fromkeys(tokenizer.sidecar, odd))
        assert json.loads(side_files_of(broken, file, 512)["tokenizer.json"])["model"]["type"] == "BPE"


def test_the_corpus_tells_rules_apart(files):
    """The control: another splitting rule, or a lost added token, is seen by it."""
    folder, _ = files["qwen2"]
    whole = json.loads((folder / "tokenizer.json").read_text())
    right = Tokenizer.from_str(json.dumps(whole))
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    for change in ({"pre_tokenizer": gpt2}, {"added_tokens": whole["added_tokens"][:2]}, {"normalizer": None}):
        assert differences(right, Tokenizer.from_str(json.dumps(whole | change))), change


def test_small_file_by_hand(tmp_path):
    found = side_files_of_gguf(open_gguf(write_small(tmp_path / "m.gguf")))
    tokenizer, _ = loaded(found, tmp_path / "out")
    assert tokenizer.encode("abc ab<|im_end|><tool>c 12").ids == [6, 3, 4, 11, 12, 2, 3, 7, 8]
    assert tokenizer.decode([6, 5, 12, 11]) == "abc a<tool>"  # a control token is skipped, a user-defined one is not
    assert json.loads(found["generation_config.json"]) == {
        "bos_token_id": 9, "eos_token_id": [11, 9], "pad_token_id": 9,
    }  # fmt: skip
    settings = json.loads(found["tokenizer_config.json"])
    assert (settings["eos_token"], settings["pad_token"], settings["bos_token"]) == (
        "<|im_end|>",
        "<|endoftext|>",
        None,
    )


def test_a_token_in_front(tmp_path):
    changes = {
        "tokenizer.ggml.add_bos_token": b"\x07\x00\x00\x00\x01",
        "tokenizer.ggml.pre": string("deepseek-r1-qwen"),
    }
    found = side_files_of_gguf(open_gguf(write_small(tmp_path / "m.gguf", **changes)))
    tokenizer, _ = loaded(found, tmp_path / "out")
    assert tokenizer.encode("ab").ids == [9, 4]
    assert tokenizer.encode("ab", add_special_tokens=False).ids == [4]
    assert json.loads(found["tokenizer_config.json"])["bos_token"] == "<|endoftext|>"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer.ggml.model": string("llama")}, "not byte-level BPE"),
        ({"tokenizer.ggml.pre": string("llama-bpe")}, "'llama-bpe'"),
        ({"tokenizer.ggml.tokens": strings(["a"] * 16)}, "two ids have one token"),
        ({"tokenizer.ggml.tokens": strings(["a"] * 15)}, "15 tokens and 16 types for 16 rows"),
        ({"tokenizer.ggml.token_type": numbers([1] * 3)}, "3 types"),
        ({"tokenizer.ggml.token_type": numbers([6] * 16)}, "a token of type 6"),
        ({"tokenizer.ggml.token_type": strings(["1"] * 16)}, "no list of whole numbers"),
        ({"tokenizer.ggml.tokens": u32(3)}, "holds no list"),
        ({"tokenizer.ggml.merges": strings(["a b c"])}, "no pair of tokens"),
        ({"tokenizer.ggml.merges": strings(["a c"])}, "which are no tokens"),
    ],
)
def test_lists_that_make_no_tokenizer_are_refused(tmp_path, changes, words):
    with pytest.raises(UserError) as caught:
        side_files_of_gguf(open_gguf(write_small(tmp_path / "m.gguf", small_metadata(), **changes)))
    assert words in caught.value.what, caught.value.what


def stripping(whole):
    whole["added_tokens"][0]["lstrip"] = True


def lowercasing(whole):
    whole["normalizer"] = {"type": "Lowercase"}


def other_rule(whole):
    whole["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,3}"


def ending(whole):
    part = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    whole["post_processor"] = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, part]}


def far_id(whole):
    whole["added_tokens"][0]["id"] = 5000


def no_bpe(whole):
    whole["model"]["type"] = "Unigram"


def fallback(whole):
    whole["model"]["byte_fallback"] = True


def malformed(whole):
    whole["model"]["vocab"] = 7


@pytest.mark.parametrize("change", [stripping, lowercasing, other_rule, ending, far_id, no_bpe, fallback, malformed])
def test_tokenizers_that_llama_cpp_would_read_differently_are_refused(tmp_path, change):
    folder = tmp_path / "hf"
    shutil.copytree(ASSET, folder)
    config = open_qwen2(folder).config
    tokenizer_of_folder(folder, config)
    whole = json.loads((folder / "tokenizer.json").read_text())
    change(whole)
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match=r"tokenizer\.json: "):
        tokenizer_of_folder(folder, config)


def test_named_templates(tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(ASSET, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    write_gguf(open_qwen2(folder), tmp_path / "m.gguf", "q8_0")
    found = side_files_of_gguf(open_gguf(tmp_path / "m.gguf"))
    assert json.loads(found["tokenizer_config.json"])["chat_template"] == named
    assert found["chat_template.jinja"] == b"D"
