"""The demo's own claims: it ends well on the bundled model, and says so when a check lets the broken copy through."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.demo.damage import damaged_copy
from qwen2tool.hub import plan
from tests.cli_runner import run


def numbers(text: str, label: str) -> list[float]:
    line = next(line for line in text.splitlines() if line.startswith(label))
    return [float(word.replace(",", "")) for word in re.findall(r"-?\d[\d,]*\.?\d*(?:e-?\d+)?", line[len(label) :])]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    return run("demo", "--folder", folder), folder


def test_the_closing_table_shows_learning_and_proof(outcome):
    result, _ = outcome
    assert result.code == 0, result.err
    before, after = numbers(result.out, "SFT loss, first and last tenth of the steps")
    assert after < before - 0.5
    before, after = numbers(result.out, "perplexity on held-out instructions (SFT)")
    assert after < 0.8 * before
    before, after = numbers(result.out, "reward accuracy on held-out pairs (DPO)")
    assert before == 0.5 and after >= 0.7
    before, after = numbers(result.out, "reward margin on held-out pairs (DPO)")
    assert before == 0 and after > 0.5
    whole, broken = numbers(result.out, "mean KLD")
    assert whole < 1e-3 < 1 < broken
    for command in ("inspect", "train", "merge", "push"):
        assert re.search(rf"^{command} +accepted +refused$", result.out, re.MULTILINE)


def test_everything_is_left_to_look_at(outcome):
    _, folder = outcome
    names = {path.name for path in folder.iterdir()}
    assert {
        "sft",
        "dpo",
        "merged",
        "without-biases",
        "sft-train.jsonl",
        "dpo-held-out.jsonl",
    } <= names and "never" not in names
    assert json.loads((folder / "sft" / "report.json").read_text())["steps"] > 100
    assert (
        len(open_checkpoint(folder / "merged").tensors) - len(open_checkpoint(folder / "without-biases").tensors) == 15
    )


def test_a_check_that_lets_the_broken_copy_through_fails_the_demo(tmp_path, monkeypatch):
    """The negative control, on a run cut short: push stops checking."""
    from qwen2tool.demo import run as demo_room

    monkeypatch.setattr(demo_room, "SFT", demo_room.SFT | {"max_steps": 2})
    monkeypatch.setattr(demo_room, "DPO", demo_room.DPO | {"max_steps": 2})
    good = run("demo", "--folder", tmp_path / "good")
    assert good.code == 0
    honest, merged = plan.plan_push, tmp_path / "bad" / "merged"
    monkeypatch.setattr(plan, "plan_push", lambda path, repo: honest(merged, repo))
    bad = run("demo", "--folder", tmp_path / "bad")
    assert bad.code == 1 and re.search(r"^push +accepted +accepted$", bad.out, re.MULTILINE)


@pytest.mark.parametrize("how", ["drop", "zero"])
def test_damaged_copy_loses_what_it_says_and_nothing_else(base_folder, tmp_path, how):
    lost = damaged_copy(base_folder, tmp_path / "copy", lambda layer, projection: (layer, projection) == (1, "v"), how)
    assert lost == 1

    def tensors(folder: Path):
        return {n: t for shard in sorted(folder.glob("*.safetensors")) for n, t in load_file(shard).items()}

    before, after = tensors(base_folder), tensors(tmp_path / "copy")
    name = "model.layers.1.self_attn.v_proj.bias"
    assert (name in after) == (how == "zero") and not (how == "zero" and after[name].any())
    assert all(before[n].equal(after[n]) for n in before if n != name)


def test_a_base_that_cannot_be_used_costs_nothing(base_copy, tmp_path):
    folder = tmp_path / "earlier"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    refused = run("demo", "--folder", folder, "--overwrite")
    assert refused.code == 2 and "earlier: holds mine.txt, and is no" in refused.error
    (folder / "trainer_state.json").write_text("{}")
    assert run("demo", "--model", tmp_path / "nope", "--folder", folder, "--overwrite").code == 2
    (base_copy / "tokenizer.json").unlink()
    assert run("demo", "--model", base_copy, "--folder", folder, "--overwrite").code == 2
    assert run("demo", "--model", base_copy, "--folder", tmp_path / "new").code == 2
    assert (folder / "mine.txt").exists() and not (tmp_path / "new").exists()
