"""What a plan takes, leaves and refuses; every refusal beside the sound folder that passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2tool.errors import EXIT_FINDING, UserError
from qwen2tool.hub.plan import PushPlan, plan_push

REPO = "me/tiny"
Change = Callable[[torch.Tensor], torch.Tensor]


def edit(folder: Path, part: str, change: Change) -> None:
    """Applies `change` to every tensor of `folder` whose name holds `part`."""
    touched = 0
    for shard in folder.glob("*.safetensors"):
        state = load_file(shard)
        for name in [name for name in state if part in name]:
            state[name] = change(state[name])
            touched += 1
        save_file(state, shard, metadata={"format": "pt"})
    assert touched


def with_first(value: float) -> Change:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


@pytest.fixture
def adapter_copy(tmp_path: Path, adapter_folder: Path) -> Path:
    return Path(shutil.copytree(adapter_folder, tmp_path / "adapter"))


def names(plan: PushPlan) -> set[str]:
    return {file.name for file in plan.files}


CHECKPOINT_FILES = {
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
}


def test_a_checkpoint_is_taken_whole(base_folder: Path) -> None:
    plan = plan_push(base_folder, REPO)
    assert plan.kind == "model"
    assert names(plan) == CHECKPOINT_FILES
    assert all(file.size == file.path.stat().st_size for file in plan.files if file.path)
    assert plan.total_bytes == sum(file.stat().st_size for file in base_folder.iterdir()) + len(plan.card.encode())
    stored = {name for tensors in plan.tensors.values() for name in tensors}
    index = json.loads((base_folder / "model.safetensors.index.json").read_text())
    assert stored == set(index["weight_map"])


def test_an_adapter_is_taken_whole(adapter_folder: Path) -> None:
    plan = plan_push(adapter_folder, REPO)
    assert plan.kind == "adapter"
    assert names(plan) == {"adapter_model.safetensors", "adapter_config.json", "README.md"}


def test_stray_files_stay_behind_and_are_named(base_copy: Path) -> None:
    for stray in (".env", "metrics.jsonl", "optimizer.pt", "training_args.bin", "notes.txt"):
        (base_copy / stray).write_text("HF_TOKEN=hf_do_not_send")
    (base_copy / "checkpoint-10").mkdir()
    (base_copy / "checkpoint-10" / "config.json").write_text("{}")
    for wanted in ("LICENSE", "chat_template.jinja", "qwen2tool.json", "qwen2tool_merge.json"):
        (base_copy / wanted).write_text("{}")
    plan = plan_push(base_copy, REPO)
    assert names(plan) == CHECKPOINT_FILES | {
        "LICENSE",
        "chat_template.jinja",
        "qwen2tool.json",
        "qwen2tool_merge.json",
    }
    left = "not sent: .env, checkpoint-10/, metrics.jsonl, notes.txt, optimizer.pt, training_args.bin"
    assert left in plan.notes


@pytest.mark.parametrize("part", ["_proj.bias", "k_proj.bias"])
def test_biases_that_are_zero_in_every_layer_are_refused(base_copy: Path, part: str) -> None:
    edit(base_copy, part, torch.zeros_like)
    count, which = (9, "q/k/v") if part == "_proj.bias" else (3, "k")
    with pytest.raises(UserError, match=f"all {count} {which} biases are zero: re-initialised") as caught:
        plan_push(base_copy, REPO)
    assert caught.value.exit_code == EXIT_FINDING


def test_zero_biases_in_some_layers_pass_with_a_note(base_copy: Path) -> None:
    edit(base_copy, "layers.0.self_attn.v_proj.bias", torch.zeros_like)
    edit(base_copy, "layers.2.self_attn.v_proj.bias", torch.zeros_like)
    assert "2 of 3 v biases are all zero" in plan_push(base_copy, REPO).notes


@pytest.mark.parametrize("part", ["layers.1.self_attn.q_proj.bias", "layers.2.input_layernorm", "model.norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(base_copy: Path, part: str, value: float) -> None:
    edit(base_copy, part, with_first(1e30))
    plan_push(base_copy, REPO)
    edit(base_copy, part, with_first(value))
    with pytest.raises(UserError, match=rf"{part}\S* has NaN or infinity in 1 of \d+ values"):
        plan_push(base_copy, REPO)


def test_an_untrained_adapter_is_refused(adapter_copy: Path) -> None:
    edit(adapter_copy, "q_proj.lora_B", torch.zeros_like)
    assert "3 of 21 B matrices are all zero: those modules learned nothing" in plan_push(adapter_copy, REPO).notes
    edit(adapter_copy, "lora_B", torch.zeros_like)
    with pytest.raises(UserError, match="all 21 B matrices are zero: this adapter was never trained"):
        plan_push(adapter_copy, REPO)


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_an_adapter_that_diverged_is_refused(adapter_copy: Path, side: str) -> None:
    edit(adapter_copy, f"layers.1.mlp.up_proj.{side}", with_first(float("nan")))
    with pytest.raises(UserError, match=f"layers.1.mlp.up_proj.{side}.weight has NaN"):
        plan_push(adapter_copy, REPO)


def test_an_incomplete_folder_is_refused(base_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        plan_push(tmp_path / "nowhere", REPO)
    (base_copy / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="no tokenizer"):
        plan_push(base_copy, REPO)
    (tmp_path / "tokenizer.json").rename(base_copy / "tokenizer.json")
    plan_push(base_copy, REPO)
    (base_copy / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        plan_push(base_copy, REPO)


def test_weights_that_nothing_points_to_are_refused(base_copy: Path) -> None:
    shutil.copy(base_copy / "model-00001-of-00002.safetensors", base_copy / "consolidated.safetensors")
    with pytest.raises(UserError, match=r"consolidated\.safetensors is no part of the checkpoint"):
        plan_push(base_copy, REPO)


def test_a_model_and_an_adapter_in_one_folder_are_refused(base_copy: Path, adapter_folder: Path) -> None:
    shutil.copy(adapter_folder / "adapter_config.json", base_copy)
    with pytest.raises(UserError, match="transformers would load the adapter on top of it"):
        plan_push(base_copy, REPO)


@pytest.mark.parametrize("repo_id", ["me/tiny", "Org-1/Qwen2.5-0.5B_sft", "a/b", "_me/x"])
def test_repo_ids_that_pass(base_folder: Path, repo_id: str) -> None:
    assert plan_push(base_folder, repo_id).repo_id == repo_id


@pytest.mark.parametrize(
    "repo_id",
    [
        "tiny",
        "a/b/c",
        "/tiny",
        "me/",
        "me/-x",
        "me/x.",
        "me/a--b",
        "me/a..b",
        "me/x.git",
        "me/ti ny",
        "mé/x",
        "a/" + "b" * 97,
    ],
)
def test_repo_ids_that_the_hub_would_refuse(base_folder: Path, repo_id: str) -> None:
    with pytest.raises(UserError, match="is no Hub repo id"):
        plan_push(base_folder, repo_id)


@pytest.mark.parametrize(
    "repo_id", ["a/b", "me/a--b", "me/a..b", "me/x.git", "me/-x", "me/x.", "me/ti ny", "a/" + "b" * 96, "a/" + "b" * 97]
)
def test_our_rule_for_repo_ids_is_the_clients(base_folder: Path, repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    def refuses(check: Callable[[], object], error: type[Exception]) -> bool:
        try:
            check()
        except error:
            return True
        return False

    ours = refuses(lambda: plan_push(base_folder, repo_id), UserError)
    assert ours == refuses(lambda: validate_repo_id(repo_id), HFValidationError)
