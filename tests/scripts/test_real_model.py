"""Peers of scripts/real_model.py: what is run for which task, and that a peer that fails takes no other one along."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import common  # noqa: E402
import real_model  # noqa: E402


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "machine", dict)
    return argparse.Namespace(
        model=str(tmp_path), work=tmp_path, tasks=["sft", "dpo"], max_steps=None, result=tmp_path / "result.json"
    )


def peer_script(folder: Path, text: str) -> Path:
    (folder / "peer.py").write_text(text)
    return folder / "peer.py"


def test_a_peer_keeps_its_result_and_its_error(tmp_path):
    """The line counts although what came after it failed; without one there is the error alone."""
    script = peer_script(tmp_path, "print('RESULT {\"losses\": [1.5]}', flush=True)\nraise OSError('full')\n")
    found = common.run_peer(script)
    assert (found["exit_code"], found["losses"]) == (1, [1.5]) and found["error"].strip().endswith("OSError: full")
    assert "losses" not in common.run_peer(peer_script(tmp_path, "raise OSError('full')\n"))
    assert common.run_peer(peer_script(tmp_path, "print('RESULT {}')\n")) == {"exit_code": 0}


@pytest.mark.parametrize("tasks", [["sft"], ["dpo", "sft"], ["dpo"]])
def test_peers_of_the_tasks_asked_for(options, monkeypatch, tasks):
    lines = []

    def run_peer(script, *flags):
        lines.append(" ".join(map(str, flags)))
        return {"losses": [1.0]}

    monkeypatch.setattr(real_model, "run_peer", run_peer)
    monkeypatch.setattr(real_model, "score", lambda *_: {"sft": {"nll": 1.0}})
    options.tasks = tasks
    found = real_model.peers(options)
    sft, dpo = ([name for name in found if name.startswith(task)] for task in ("sft", "dpo"))
    assert sft == (["sft, unsloth", "sft, cudnn off", "sft, cudnn on"] if "sft" in tasks else [])
    assert dpo == (["dpo, cudnn off", "dpo, cudnn on"] if "dpo" in tasks else [])
    assert len(lines) == len(found) and sum("--loader unsloth" in line for line in lines) == ("sft" in tasks)
    assert all(("--adapter" in line) == ("--task dpo" in line) for line in lines)


def test_an_adapter_that_cannot_be_scored_is_kept_as_an_error(options, monkeypatch):
    def score(options, adapter, reference):
        if "unsloth" in str(adapter):
            raise ValueError("unknown key")
        return {"sft": {"nll": float("nan")}}

    monkeypatch.setattr(real_model, "run_peer", lambda *_: {"losses": [1.0]})
    monkeypatch.setattr(real_model, "score", score)
    found = real_model.peers(options)
    assert list(found) == ["sft, unsloth", "sft, cudnn off", "sft, cudnn on"], "DPO would start from NaN"
    assert found["sft, unsloth"]["held_out"] == {"error": "ValueError: unknown key"}
    assert json.loads(options.result.read_text())["peers"]["sft, cudnn on"]["held_out"]["sft"]["nll"] == "nan"


def test_one_task_alone_leaves_the_other_s_result(options):
    for tasks, part, name in (
        (["sft", "dpo"], "train", "train"), (["sft"], "train", "train_sft"), (["dpo"], "peers", "peers_dpo"),
        (["sft"], "damage", "damage"),
    ):  # fmt: skip
        options.tasks = tasks
        real_model.keep(options, part, {"of": tasks})
        assert json.loads(options.result.read_text())[name]["of"] == tasks
    assert list(json.loads(options.result.read_text())) == ["train", "train_sft", "peers_dpo", "damage"]


def test_speed_is_tokens_over_the_seconds_of_training():
    report = {"tokens": 900, "train_seconds": 3.0, "seconds": 9.0}
    assert real_model.speed(report) == {"useful_tokens": 900, "useful_tokens_per_s": 300.0}
    assert real_model.speed({}) == {}


def test_the_peer_imports_nothing_before_unsloth():
    """Unsloth patches what is imported after it."""
    names = ("json", "torch", "transformers", "trl", "peft", "bitsandbytes")
    code = f"import sys, benchmarks.trl_peer; print(*[name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "json"
