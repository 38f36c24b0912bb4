"""Damaged files beside sound weights: each is a finding, transformers fails on it too, and all else is still told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from qwen2tool.checkpoint.report import inspect_checkpoint
from qwen2tool.checkpoint.show import print_report
from qwen2tool.convert.read import open_qwen2
from qwen2tool.errors import UserError
from tests.checkpoint.edits import drop, edit_json
from tests.cli_runner import run
from tests.convert.gguf_files import numbers, small_metadata, string, strings, u32, write_small
from tests.hub.client import from_shell
from tests.hub.server import Repo, running_hub

GIT_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 11421896\n"
TURNS = [{"role": "user", "content": "Hello"}]
DAMAGE = {
    "cut": ("tokenizer.json", lambda data: data[: len(data) // 2], "ends early"),
    "cut behind a brace": ("tokenizer.json", lambda data: data[: data.rindex(b"}", 0, 600) + 1], "not valid JSON"),
    "without a vocabulary": (
        "tokenizer.json", lambda data: b'{"added_tokens": [{"id": 0, "content": "a"}]}', "no vocabulary"
    ),
    "cut in the vocabulary": (
        "tokenizer.json", lambda data: data[: data.index(b'": 40,')] + b"}", "not valid JSON"
    ),
    "empty": ("tokenizer.json", lambda data: b"", "empty"),
    "not UTF-8": ("tokenizer.json", lambda data: data[:100] + b"\xff" + data[100:], "not UTF-8 text (byte 100)"),
    "a list": ("tokenizer.json", lambda data: b"[]", "no JSON object"),
    "ids of a wrong type": ("tokenizer.json", lambda data: data.replace(b'": 40,', b'": "40",'), "no vocabulary"),
    "a pointer": ("tokenizer.json", lambda data: GIT_LFS, "a Git LFS pointer"),
    "settings cut": ("tokenizer_config.json", lambda data: data[:-20], "it ends early"),
    "settings not UTF-8": ("tokenizer_config.json", lambda data: b"\xff" + data, "not UTF-8 text (byte 0)"),
    "settings a list": ("tokenizer_config.json", lambda data: b"[1]", "a list, not an object"),
    "settings a web page": ("tokenizer_config.json", lambda data: b"<!DOCTYPE html><html>", "a web page"),
    "added tokens a list": (
        "tokenizer_config.json", lambda data: data.replace(b"{", b'{"added_tokens_decoder": [1], ', 1), "no object"
    ),
    "a template of a wrong type": ("tokenizer_config.json", lambda data: b'{"chat_template": 5}', "no text but 5"),
    "a template list": ("tokenizer_config.json", lambda data: b'{"chat_template": [5]}', "other things than named"),
    "generation cut": ("generation_config.json", lambda data: data[:-10], "it ends early"),
    "generation not UTF-8": ("generation_config.json", lambda data: b'{"a": "\xff"}', "not UTF-8 text (byte 7)"),
    "generation a list": ("generation_config.json", lambda data: b"[]", "a list, not an object"),
    "generation a number": ("generation_config.json", lambda data: b"5", "an int, not an object"),
    "template cut": ("chat_template.jinja", lambda data: b"{% for m in messages %}{{ m.content }}", "no valid one"),
    "template not UTF-8": ("chat_template.jinja", lambda data: b"\xff\xfe{{ a }}", "not UTF-8 text"),
}  # fmt: skip


@pytest.fixture
def folder(base_copy) -> Path:
    return base_copy


def reads(folder: Path) -> bool:
    """Whether transformers makes a prompt from the tokenizer, and reads the generation settings, as they are."""
    try:
        AutoTokenizer.from_pretrained(folder).apply_chat_template(TURNS)
        GenerationConfig.from_pretrained(folder)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_a_finding_and_hides_nothing(kind, folder):
    assert reads(folder)
    whole = inspect_checkpoint(folder)
    assert whole.exit_code == 0 and whole.sections["files"]["damaged"] == {}
    name, damage, words = DAMAGE[kind]
    data = (folder / name).read_bytes() if (folder / name).is_file() else b""
    (folder / name).write_bytes(damage(data))
    assert not reads(folder)
    report = inspect_checkpoint(folder)
    assert (report.verdict, report.headline, report.exit_code) == ("qwen2", whole.headline, 1)
    assert len(report.findings) == 1 and report.findings[0].startswith(f"{name}: ") and words in report.findings[0]
    assert list(report.sections["files"]["damaged"]) == [name]
    same = ("geometry", "config", "parameters", "tensors", "rope", "sliding", "head", "biases", "hazard", "memory")
    assert all(report.sections[part] == whole.sections[part] for part in same)
    assert (report.sections["tokenizer"] == whole.sections["tokenizer"]) != (name == "tokenizer.json")
    assert not any(note.startswith("there is no") for note in report.notes), report.notes


def test_damage_and_lost_biases_are_both_told(folder, capsys):
    drop(folder, "layers.1.self_attn.k_proj.bias")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes(b"{")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(folder / "nowhere.json")
    report = inspect_checkpoint(folder)
    assert report.headline == "1 of 9 q/k/v biases are MISSING" and len(report.findings) == 4
    assert any("tokenizer.json: a link to a file that is not there" in finding for finding in report.findings)
    print_report(report)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "tokenizer damaged (tokenizer.json)" in lines and "chat template damaged (tokenizer_config.json)" in lines
    assert any(line.endswith("; generation_config.json is damaged") for line in lines)


@pytest.mark.parametrize("stops", ["2", {"a": 2}, [2, "0"], True])
def test_stops_that_are_no_ids(folder, stops):
    edit_json(folder / "generation_config.json", lambda settings: settings.update(eos_token_id=stops))
    report = inspect_checkpoint(folder)
    assert len(report.findings) == 1 and "neither an id nor a list of ids" in report.findings[0]
    assert report.sections["generation"]["stops_at"][0]["id"] == 2, "config.json's"


@pytest.mark.parametrize("name", ["vocab.json", "added_tokens.json"])
def test_the_two_files_of_older_tokenizers(folder, name):
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "added_tokens.json").write_text("{}")
    assert inspect_checkpoint(folder).findings == ()
    (folder / name).write_text("[]")
    report = inspect_checkpoint(folder)
    assert report.sections["tokenizer"] is None and [*report.sections["files"]["damaged"]] == [name]


def test_keys_of_added_tokens_that_are_no_ids(folder):
    before = inspect_checkpoint(folder).sections["tokenizer"]
    odd = {key: {"content": f"<{key[:3]}>"} for key in ("²", "9" * 5000, "-1", "x")}
    edit_json(folder / "tokenizer_config.json", lambda settings: settings.update(added_tokens_decoder=odd))
    assert inspect_checkpoint(folder).sections["tokenizer"] == before


@pytest.mark.parametrize(
    "template",
    ["{% generation %}{{ a }}{% endgeneration %}", "{% for a in b %}{% break %}{% endfor %}", "{{ a | tojson }}",
     [{"name": "default", "template": "{{ a }}"}, {"name": "tool_use", "template": "{{ b }}"}]],
)  # fmt: skip
def test_templates_as_transformers_takes_them(folder, template):
    edit_json(folder / "tokenizer_config.json", lambda settings: settings.update(chat_template=template))
    report = inspect_checkpoint(folder)
    assert (report.findings, report.sections["chat_template"]) == ((), "tokenizer_config.json")


@pytest.mark.parametrize(
    "template", ["{% if a %}", "{{ a", "{% no %}", f"{{{{ {'9' * 5000} }}}}", " ", f"{{{{{'(' * 5000}"]
)
def test_templates_that_cannot_be_read(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    report = inspect_checkpoint(folder)
    assert len(report.findings) == 1 and report.sections["chat_template"] is None
    assert "\n" not in report.findings[0] and len(report.findings[0]) < 250


def test_a_gguf_says_so_too(tmp_path):
    whole = inspect_checkpoint(write_small(tmp_path / "whole.gguf"))
    assert whole.findings == () and whole.sections["tokenizer"]["count"] == 13
    bad = string("x")[:-1] + b"\xff"
    for key, value in {
        "tokenizer.chat_template": bad,
        "tokenizer.ggml.tokens": strings(["a"] * 16)[:-1] + b"\xff",
        "tokenizer.ggml.token_type": numbers([1] * 5),
    }.items():
        file = write_small(tmp_path / "bad.gguf", small_metadata() | {key: value})
        report = inspect_checkpoint(file)
        assert (report.headline, report.exit_code, len(report.findings)) == (whole.headline, 1, 1)
        damaged = "tokenizer.ggml.tokens" if "token_type" in key else key
        assert [*report.sections["files"]["damaged"]] == [damaged] and damaged in report.findings[0]
        assert not any(note.startswith("there is no") for note in report.notes)
    template = write_small(tmp_path / "cut.gguf", small_metadata() | {"tokenizer.chat_template": string("{% if a %}")})
    assert "no valid one" in inspect_checkpoint(template).findings[0]
    number = write_small(tmp_path / "number.gguf", small_metadata() | {"tokenizer.ggml.tokens": u32(5)})
    assert "no list of texts" in inspect_checkpoint(number).findings[0]


def test_a_gguf_whose_text_is_none_is_not_converted(tmp_path):
    """What `inspect` can leave out, a conversion would lose."""
    file = write_small(tmp_path / "a.gguf", small_metadata() | {"tokenizer.chat_template": string("x")[:-1] + b"\xff"})
    with pytest.raises(UserError, match=r"tokenizer\.chat_template: not UTF-8"):
        open_qwen2(file)
    assert open_qwen2(write_small(tmp_path / "whole.gguf"), whole=False)


def test_on_the_command_line_and_in_json(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "whole")
    (folder / "generation_config.json").write_bytes(b'{"eos_token_id": ')
    done = run("inspect", folder, "--json")
    assert done.code == 1 and not done.err
    assert json.loads(done.out)["files"]["damaged"] == {
        "generation_config.json": "not valid JSON (it ends early); repair the file or copy it again"
    }
    both = run("inspect", tmp_path / "whole", folder)
    assert both.code == 1 and "generation_config.json: not valid JSON" in both.out
    assert run("inspect", tmp_path / "whole").code == 0


def test_on_a_hub(folder, tmp_path):
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes(b'{"cut": ')
    with running_hub() as hub:
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        hub.repos["me/cut"] = Repo(private=False, files={"1" * 40: files}, branches={"main": "1" * 40})
        options = {"HF_TOKEN": "reader", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = from_shell(tmp_path, hub.url, "qwen2tool", "inspect", "me/cut", env=options)
    assert done.returncode == 1, done.stderr
    assert "all 9 q/k/v biases are there" in done.stdout
    assert done.stdout.count("not valid JSON (it ends early)") >= 2
    assert "not read (tokenizer.json)" in done.stdout
