"""The card: its YAML parsed back, its numbers against transformers and torch, its refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from qwen2tool.console import format_number
from qwen2tool.errors import UserError
from qwen2tool.hub.plan import PushPlan, plan_push
from tests.tiny import tiny_model

REPO = "me/tiny"


def fields(plan: PushPlan) -> dict[str, Any]:
    return dict(yaml.safe_load(plan.card.split("---\n")[1]))


@pytest.fixture
def adapter_copy(tmp_path: Path, adapter_folder: Path) -> Path:
    return Path(shutil.copytree(adapter_folder, tmp_path / "adapter"))


def set_base(adapter: Path, base: str) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))


def test_a_checkpoint_without_a_past_invents_none(base_folder: Path) -> None:
    plan = plan_push(base_folder, REPO)
    assert fields(plan) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["qwen2", "qwen2tool"],
    }
    assert "licence: that of the base model" in plan.card
    assert "base_model: left out, the folder names no base" in plan.notes


def test_numbers_are_those_of_transformers_and_torch(base_folder: Path) -> None:
    card = plan_push(base_folder, REPO).card
    assert f"of {tiny_model().num_parameters():,} parameters, stored as BF16." in card
    assert "9 of 9 q/k/v biases present" in card
    state = {name: tensor for shard in base_folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    for projection in "qkv":
        norms = [float(state[f"model.layers.{i}.self_attn.{projection}_proj.bias"].double().norm()) for i in range(3)]
        assert f"| {projection} | 3 | {format_number(min(norms))} | {format_number(max(norms))} |" in card
    for row in ("| layers | 3 |", "| key/value heads | 2 |", "| RoPE base | 1,000,000 |", "| tied embeddings | no |"):
        assert row in card


def test_an_adapter_card_names_its_base(adapter_copy: Path) -> None:
    set_base(adapter_copy, "Qwen/Qwen2.5-0.5B")
    plan = plan_push(adapter_copy, REPO)
    assert fields(plan) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Qwen2.5-0.5B",
        "base_model_relation": "adapter",
        "tags": ["qwen2", "qwen2tool", "lora"],
    }
    # rank 4 on (out, in): q 64x64, k and v 32x64, o 64x64, gate and up 100x64, down 64x100, in 3 layers
    assert f"of {3 * 4 * (128 + 96 + 96 + 128 + 164 + 164 + 164):,} parameters" in plan.card
    assert "| rank | 4 |\n| scaling (s in W + s B A) | 3 |" in plan.card
    assert 'from_pretrained("Qwen/Qwen2.5-0.5B"' in plan.card


def test_a_local_base_is_left_out(adapter_copy: Path, base_folder: Path) -> None:
    set_base(adapter_copy, str(base_folder))
    plan = plan_push(adapter_copy, REPO)
    assert "base_model" not in fields(plan)
    assert str(base_folder) not in plan.card
    assert f"base_model: left out, {base_folder} is a local path" in plan.notes
    assert f"adapter_config.json: names a local path, readable by all who see the repo: {base_folder}" in plan.notes


def test_a_merge_record_is_printed_without_home_folders(base_copy: Path) -> None:
    record = {
        "base": "/home/user/.cache/hub/models--Qwen--Qwen2-0.5B/snapshots/abc",
        "adapters": ["/home/user/runs/sft"],
        "dtype": "bfloat16",
    }
    (base_copy / "qwen2tool_merge.json").write_text(json.dumps(record))
    plan = plan_push(base_copy, REPO)
    assert fields(plan)["base_model"] == "Qwen/Qwen2-0.5B"
    assert fields(plan)["base_model_relation"] == "finetune"
    assert "## How it was made (`qwen2tool_merge.json`)" in plan.card
    assert '- adapters: `["sft"]`\n- dtype: `bfloat16`' in plan.card
    assert "/home/user" not in plan.card
    assert any("qwen2tool_merge.json: names a local path" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("text", "license"),
    [
        ("\n   Apache License\n   Version 2.0, January 2004\n", "apache-2.0"),
        ("---\nlicense: mit\n---\nMIT License", "mit"),
        ("Tongyi Qianwen LICENSE AGREEMENT\n like the Apache License Version 2.0", None),
    ],
)
def test_a_licence_is_named_only_where_it_is_known(base_copy: Path, text: str, license: str | None) -> None:
    (base_copy / "LICENSE").write_text(text)
    plan = plan_push(base_copy, REPO)
    assert fields(plan).get("license") == license
    assert ("licence: that of the base model" in plan.card) == (license is None)


def test_the_folders_own_card_is_used_as_it_is(base_copy: Path) -> None:
    text = "---\nbase_model: Qwen/Qwen2-0.5B\nlicense: mit\n---\n# Mine\n\nBy hand: é.\n"
    (base_copy / "README.md").write_text(text, encoding="utf-8")
    plan = plan_push(base_copy, REPO)
    assert plan.card == text
    assert next(f for f in plan.files if f.name == "README.md") == (
        "README.md",
        len(text.encode()),
        base_copy / "README.md",
    )


def test_a_named_card_goes_before_the_folders_own(base_copy: Path, tmp_path: Path) -> None:
    (base_copy / "README.md").write_text("# Folder\n")
    (tmp_path / "card.md").write_text("# Named\n")
    plan = plan_push(base_copy, REPO, card=tmp_path / "card.md")
    assert plan.card == "# Named\n"
    assert "README.md: has no front matter, so the Hub will show no base, licence or task" in plan.notes
    with pytest.raises(UserError, match=r"missing\.md: no such file"):
        plan_push(base_copy, REPO, card=tmp_path / "missing.md")


def test_the_unfilled_template_of_peft_is_replaced(adapter_folder: Path) -> None:
    assert "[More Information Needed]" in (adapter_folder / "README.md").read_text()
    plan = plan_push(adapter_folder, REPO)
    assert "[More Information Needed]" not in plan.card
    assert "README.md: generated, the one in the folder is an unfilled template" in plan.notes


@pytest.mark.parametrize("base", ["/home/user/base", "./base", "~/base", "runs/sft/final", "C:\\models\\base"])
def test_a_written_card_with_a_local_base_is_refused(base_copy: Path, base: str) -> None:
    (base_copy / "README.md").write_text(f"---\nbase_model:\n- Qwen/Qwen2-0.5B\n- '{base}'\n---\n# Mine\n")
    with pytest.raises(UserError, match="a local path, which the Hub rejects"):
        plan_push(base_copy, REPO)
    (base_copy / "README.md").write_text("---\nbase_model:\n- Qwen/Qwen2-0.5B\n---\n# Mine\n")
    plan_push(base_copy, REPO)


@pytest.mark.parametrize(
    ("card", "complaint"),
    [(b"---\na: [\n---\n", "no valid YAML"), (b"---\n- a\n---\n", "no mapping"), (b"\xff\xfe", "no UTF-8")],
)
def test_a_broken_card_is_refused(base_copy: Path, card: bytes, complaint: str) -> None:
    (base_copy / "README.md").write_bytes(card)
    with pytest.raises(UserError, match=complaint):
        plan_push(base_copy, REPO)
