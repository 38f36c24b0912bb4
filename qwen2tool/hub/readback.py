"""Proof that the Hub holds what was meant: names and sizes of all files, and the header of every weight file.

Storage is addressed by sha256, so a file that arrives is the file that was sent; what this finds is a push that is not
whole, or a server that rewrote a file. Costs one request for the list and one ranged read (100 kB) a weight file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen2tool.checkpoint.inventory import BIAS_NAME
from qwen2tool.errors import EXIT_FINDING, UserError
from qwen2tool.hub.plan import PushPlan, StoredTensor

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REMEDY = "Push again, and do not use this commit until a push ends well"


def read_back(api: HfApi, plan: PushPlan, commit: str) -> None:
    """Compares commit `commit` of the repo with the plan.

    Raises:
        UserError: a file that is missing or of another size, or a tensor that is missing or of another dtype or shape.
    """
    _require_files(api, plan, commit)
    for file, wanted in plan.tensors.items():
        header = api.parse_safetensors_file_metadata(plan.repo_id, file, revision=commit)
        found = {name: StoredTensor(str(t.dtype), tuple(t.shape)) for name, t in header.tensors.items()}
        if found != wanted:
            raise UserError(_difference(plan, commit, file, wanted, found), REMEDY, EXIT_FINDING)


def _require_files(api: HfApi, plan: PushPlan, commit: str) -> None:
    siblings = api.model_info(plan.repo_id, revision=commit, files_metadata=True).siblings or []
    sizes = {sibling.rfilename: sibling.size for sibling in siblings}
    for file in plan.files:
        if file.name not in sizes:
            raise UserError(
                f"{plan.repo_id}: {file.name} is missing on the Hub (commit {commit})", REMEDY, EXIT_FINDING
            )
        if sizes[file.name] not in (file.size, None):  # some hubs list no sizes
            there = sizes[file.name]
            raise UserError(
                f"{plan.repo_id}: {file.name} has {there} bytes on the Hub, {file.size} here (commit {commit})",
                REMEDY,
                EXIT_FINDING,
            )


def _difference(
    plan: PushPlan, commit: str, file: str, wanted: dict[str, StoredTensor], found: dict[str, StoredTensor]
) -> str:
    """Biases first: they are what gets lost, and the rest follows from the same cause."""
    wrong = sorted(
        (name for name in wanted if found.get(name) != wanted[name]), key=lambda n: not BIAS_NAME.fullmatch(n)
    )
    where = f"{plan.repo_id}: {file} on the Hub (commit {commit})"
    if not wrong:
        return f"{where} holds {min(set(found) - set(wanted))}, which was not sent"
    name = wrong[0]
    if name not in found:
        return f"{where} lacks {name} ({len(wrong)} of {len(wanted)} tensors differ)"
    return f"{where} has {name} as {_text(found[name])}, not {_text(wanted[name])}"


def _text(tensor: StoredTensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
