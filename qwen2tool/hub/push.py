"""The upload of a plan: one commit, after which the repo holds the whole model or what it held before.

Weights, tokenizer and card go together, so that nobody ever downloads half of it. Weight files of an earlier push that
the new one does not replace are deleted in the same commit (history keeps them): an old model.safetensors beside new
shards would be loaded instead of them. Large files travel before the commit; those that the Hub has are not sent again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen2tool.checkpoint.adapter import ADAPTER_CONFIG
from qwen2tool.errors import UserError
from qwen2tool.hub.plan import PushPlan
from qwen2tool.hub.readback import read_back
from qwen2tool.hub.trouble import LOG_IN, in_one_sentence

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

MODEL_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


@dataclass(frozen=True, kw_only=True)
class PushResult:
    """Where it is now. `commit` is the full id to pin; `removed` are weight files of an earlier push."""

    url: str
    commit: str
    removed: tuple[str, ...]


def push(plan: PushPlan, *, private: bool = False, revision: str | None = None, token: str | None = None) -> PushResult:
    """Sends `plan` in one commit, creating repo and branch where they are not there, and reads the result back.

    Args:
        plan: from `plan_push`.
        private: create the repo as private; refused where it exists and is public.
        revision: branch to push to, made from the head of main if it is new. Default: main.
        token: a Hub token; None takes HF_TOKEN or the one that `hf auth login` stored.

    Raises:
        UserError: no or a bad token, no permission, no network, a folder that changed since the plan, a repo that
            holds the other kind, or a copy on the Hub that is not what was sent.
    """
    from huggingface_hub import HfApi

    secret = _require_token(token)
    _require_unchanged(plan)
    api = HfApi(token=secret, library_name="qwen2tool")
    with in_one_sentence(plan.repo_id, api.endpoint, secret):
        url = str(api.create_repo(plan.repo_id, private=private or None, exist_ok=True))
        if revision and not revision.startswith("refs/"):
            _require_visibility(api.model_info(plan.repo_id), private)
            api.create_branch(plan.repo_id, branch=revision, exist_ok=True)
        there = api.model_info(plan.repo_id, revision=revision)
        _require_visibility(there, private)
        removed = _stale(plan, there)
        commit = _commit(api, plan, removed, revision)
        read_back(api, plan, commit)
    return PushResult(url=f"{url}/tree/{revision}" if revision else url, commit=commit, removed=removed)


def _require_token(token: str | None) -> str:
    from huggingface_hub import get_token

    found = token or get_token()
    if not found:
        raise UserError("no Hub token: not logged in", LOG_IN)
    if not re.fullmatch(r"[!-~]+", found):
        raise UserError("the Hub token holds a blank or a character that no token has", LOG_IN)
    return found


def _require_unchanged(plan: PushPlan) -> None:
    """The folder may still be written to: what was checked is what must be sent."""
    for file in plan.files:
        if file.path is not None and (not file.path.is_file() or file.path.stat().st_size != file.size):
            raise UserError(
                f"{file.path}: changed since the push was planned", "Wait until it is complete and push again"
            )


def _require_visibility(there: ModelInfo, private: bool) -> None:
    if private and not there.private:
        raise UserError(
            f"{there.id}: exists and is public; --private only counts when a repo is made",
            "Make it private in its settings first, or push to another repo",
        )


def _stale(plan: PushPlan, there: ModelInfo) -> tuple[str, ...]:
    """Weight files in the repo that would be loaded beside or instead of the plan's."""
    remote = {sibling.rfilename for sibling in there.siblings or []}
    weights = {name for name in remote if MODEL_WEIGHTS.fullmatch(name)}
    if plan.kind == "model" and ADAPTER_CONFIG in remote:
        raise UserError(
            f"{plan.repo_id}: holds an adapter, which transformers would load on top of this model",
            "Push the model to a repo of its own",
        )
    if plan.kind == "adapter" and weights:
        raise UserError(
            f"{plan.repo_id}: holds a whole model, which transformers would load this adapter on top of",
            "Push the adapter to a repo of its own",
        )
    return tuple(sorted(weights - {file.name for file in plan.files}))


def _commit(api: HfApi, plan: PushPlan, removed: tuple[str, ...], revision: str | None) -> str:
    """The id of the new commit, or of the head where nothing differs from it."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    additions = [
        CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.path or plan.card.encode())
        for file in plan.files
    ]
    deletions = [CommitOperationDelete(path_in_repo=name) for name in removed]
    info = api.create_commit(
        plan.repo_id,
        operations=[*additions, *deletions],
        commit_message=f"Push {plan.kind} with qwen2tool",
        revision=revision,
    )
    return str(info.oid)
