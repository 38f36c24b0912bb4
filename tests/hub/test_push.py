"""Pushes by the real huggingface_hub client to the loopback hub of `server`."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2tool.errors import EXIT_FINDING
from qwen2tool.hub.plan import PushPlan, plan_push
from tests.hub.client import REPO, from_shell, push_from_shell
from tests.hub.server import Hub, running_hub
from tests.tiny import write_shards

BIAS = "model.layers.1.self_attn.k_proj.bias"
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def plan(base_folder: Path) -> PushPlan:
    return plan_push(base_folder, REPO)


def sent(plan: PushPlan) -> dict[str, bytes]:
    return {file.name: file.path.read_bytes() if file.path else plan.card.encode() for file in plan.files}


def on_hub(hub: Hub, revision: str = "main") -> dict[str, bytes]:
    repo = hub.repos[REPO]
    return {name: data for name, data in repo.files[repo.branches[revision]].items() if name != ".gitattributes"}


def commits(hub: Hub) -> int:
    return sum("/commit/" in request for request in hub.requests)


def test_the_hub_holds_exactly_the_planned_bytes(hub: Hub, plan: PushPlan, tmp_path: Path) -> None:
    result = push_from_shell(tmp_path, hub.url, plan)
    assert on_hub(hub) == sent(plan)
    assert result == {"url": f"{hub.url}/{REPO}", "commit": hub.repos[REPO].branches["main"], "removed": []}
    assert commits(hub) == 1
    assert hub.repos[REPO].private is False
    assert sum("/resolve/" in request for request in hub.requests) == 2  # one ranged read a shard


def test_the_command_line_sends_the_same_bytes(
    hub: Hub, plan: PushPlan, base_folder: Path, base_copy: Path, tmp_path: Path
) -> None:
    command = ("qwen2tool", "push", str(base_folder), REPO)
    dry = from_shell(tmp_path, hub.url, *command, "--dry-run")
    assert dry.returncode == 0 and hub.requests == []
    done = from_shell(tmp_path, hub.url, *command, "--private", "--revision", "trial")
    assert done.returncode == 0, done.stderr
    assert on_hub(hub, "trial") == sent(plan) and hub.repos[REPO].private
    assert f"pushed: {hub.url}/{REPO}/tree/trial at {hub.repos[REPO].branches['trial']}" in done.stdout
    (base_copy / "config.json").unlink()
    broken = from_shell(tmp_path, hub.url, "qwen2tool", "push", str(base_copy), REPO)
    assert broken.returncode == 2 and broken.stderr.startswith("error: ") and commits(hub) == 1


def test_pushing_the_same_again_makes_no_commit(hub: Hub, plan: PushPlan, tmp_path: Path) -> None:
    first = push_from_shell(tmp_path, hub.url, plan)
    uploads = sum(request.startswith("PUT") for request in hub.requests)
    assert push_from_shell(tmp_path, hub.url, plan) == first
    assert (commits(hub), uploads) == (1, 2)
    assert sum(request.startswith("PUT") for request in hub.requests) == uploads


def test_a_new_sharding_replaces_the_old_files(hub: Hub, plan: PushPlan, base_copy: Path, tmp_path: Path) -> None:
    push_from_shell(tmp_path, hub.url, plan)
    state = {
        name: tensor for shard in sorted(base_copy.glob("*.safetensors")) for name, tensor in load_file(shard).items()
    }
    for old in [*base_copy.glob("*.safetensors"), base_copy / "model.safetensors.index.json"]:
        old.unlink()
    write_shards(base_copy, state, shards=1)
    single = plan_push(base_copy, REPO)
    result = push_from_shell(tmp_path, hub.url, single)
    assert result["removed"] == [SHARD, "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert on_hub(hub) == sent(single)
    assert commits(hub) == 2


def test_private_arrives_and_is_refused_for_a_public_repo(hub: Hub, plan: PushPlan, tmp_path: Path) -> None:
    push_from_shell(tmp_path, hub.url, plan, private=True)
    assert hub.repos[REPO].private is True
    hub.repos[REPO].private = False
    before = hub.repos[REPO].branches["main"]
    result = push_from_shell(tmp_path, hub.url, plan, private=True, revision="secret")
    assert "exists and is public" in result["error"]
    assert hub.repos[REPO].branches == {"main": before}


def test_a_revision_becomes_a_branch_and_leaves_main_alone(hub: Hub, plan: PushPlan, tmp_path: Path) -> None:
    result = push_from_shell(tmp_path, hub.url, plan, revision="v2")
    assert on_hub(hub, "v2") == sent(plan)
    assert on_hub(hub) == {}
    assert result["url"] == f"{hub.url}/{REPO}/tree/v2"
    assert push_from_shell(tmp_path, hub.url, plan, revision="v2") == result  # the branch may exist


def test_a_lost_bias_is_refused_before_any_request(hub: Hub, base_copy: Path, tmp_path: Path) -> None:
    state = {name: tensor for shard in base_copy.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    write_shards(base_copy, {name: tensor for name, tensor in state.items() if name != BIAS})
    result = push_from_shell(tmp_path, hub.url, base_copy)
    assert f"1 of 9 q/k/v biases are missing, the first is {BIAS}" in result["error"]
    assert hub.requests == []
    write_shards(base_copy, state)
    assert "error" not in push_from_shell(tmp_path, hub.url, base_copy)
    assert hub.requests


def test_a_tensor_lost_on_the_hub_is_found(hub: Hub, plan: PushPlan, tmp_path: Path) -> None:
    hub.lose = BIAS
    result = push_from_shell(tmp_path, hub.url, plan)
    assert f"lacks {BIAS}" in result["error"]
    assert result["code"] == EXIT_FINDING


def test_a_file_lost_on_the_hub_is_found(hub: Hub, plan: PushPlan, tmp_path: Path) -> None:
    hub.lose_file = "tokenizer.json"
    result = push_from_shell(tmp_path, hub.url, plan)
    assert "tokenizer.json is missing on the Hub" in result["error"]
    assert result["code"] == EXIT_FINDING


def test_an_adapter_goes_to_its_own_repo_only(hub: Hub, plan: PushPlan, adapter_folder: Path, tmp_path: Path) -> None:
    adapter = plan_push(adapter_folder, REPO)
    push_from_shell(tmp_path, hub.url, adapter)
    assert on_hub(hub) == sent(adapter)
    assert "holds an adapter" in push_from_shell(tmp_path, hub.url, plan)["error"]
    hub.repos.clear()
    push_from_shell(tmp_path, hub.url, plan)
    assert "holds a whole model" in push_from_shell(tmp_path, hub.url, adapter)["error"]
    assert on_hub(hub) == sent(plan)


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        ("stranger", "does not accept the Hub token (401). Log in with `hf auth login`"),
        ("reader", "me/tiny: the Hub token may not write there (403). Use a token with write access"),
        ("", "no Hub token: not logged in. Log in with `hf auth login`"),
        ("two words", "holds a blank"),
    ],
)
def test_tokens_that_will_not_do(hub: Hub, plan: PushPlan, tmp_path: Path, token: str, sentence: str) -> None:
    result = push_from_shell(tmp_path, hub.url, plan, env={"HF_TOKEN": token})
    assert sentence in result["error"]
    assert not token or token not in result["error"]
    assert REPO not in hub.repos


def test_a_token_may_be_passed(hub: Hub, plan: PushPlan, tmp_path: Path) -> None:
    assert "error" not in push_from_shell(tmp_path, hub.url, plan, env={"HF_TOKEN": "stranger"}, token="writer")


def test_a_reader_cannot_add_to_a_repo_that_is_there(hub: Hub, plan: PushPlan, tmp_path: Path) -> None:
    push_from_shell(tmp_path, hub.url, plan)
    result = push_from_shell(tmp_path, hub.url, plan, env={"HF_TOKEN": "reader"})
    assert "may not write there (403)" in result["error"]


def test_no_network_is_one_sentence(plan: PushPlan, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert f"{url} cannot be reached (ConnectError)" in push_from_shell(tmp_path, url, plan)["error"]
        offline = push_from_shell(tmp_path, url, plan, env={"HF_HUB_OFFLINE": "1"})
    assert "HF_HUB_OFFLINE is set" in offline["error"]


def test_a_hub_without_xet_names_the_switch(hub: Hub, plan: PushPlan, tmp_path: Path) -> None:
    result = push_from_shell(tmp_path, hub.url, plan, env={"HF_HUB_DISABLE_XET": "0"})
    assert "has no Xet storage" in result["error"]
    assert "Set HF_HUB_DISABLE_XET=1" in result["error"]
    assert commits(hub) == 0


def test_a_card_that_the_hub_refuses_stops_the_push(hub: Hub, base_folder: Path, tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    card.write_text("---\nreject: me\n---\n# Tiny\n")
    result = push_from_shell(tmp_path, hub.url, plan_push(base_folder, REPO, card=card))
    assert "README.md: the Hub refuses its front matter" in result["error"]
    assert '"reject" is no key' in result["error"]
    assert commits(hub) == 0


def test_a_folder_that_changed_since_the_plan_is_not_sent(hub: Hub, base_copy: Path, tmp_path: Path) -> None:
    plan = plan_push(base_copy, REPO)
    state = load_file(base_copy / SHARD)
    save_file({name: tensor.to(torch.float32) for name, tensor in state.items()}, base_copy / SHARD)
    assert "changed since the push was planned" in push_from_shell(tmp_path, hub.url, plan)["error"]
    shutil.rmtree(base_copy)
    assert "changed since the push was planned" in push_from_shell(tmp_path, hub.url, plan)["error"]
    assert hub.requests == []
