"""Both sides on benchmark tasks, through EleutherAI's lm-evaluation-harness: scores, and by how much they differ.

Too coarse to prove anything (a lost v bias can leave every score where it was) and too slow to begin with; it is what
one shows to people who trust benchmarks. The harness is an optional dependency (extra `eval`), imported here alone.
Nothing is downloaded for tasks whose YAML and data lie on disk: name the YAML file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from math import hypot, isfinite
from pathlib import Path
from typing import Any

import torch

from qwen2tool.checkpoint.load import Dtype, load_tokenizer
from qwen2tool.errors import UserError
from qwen2tool.verify.behaviour import model_of
from qwen2tool.verify.sides import Side, tokenizer_folder

SEED = 1234


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One metric of one task on both sides; `errors` is the difference over its standard error, None without one."""

    task: str
    metric: str
    reference: float
    candidate: float
    difference: float
    errors: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def compare_tasks(
    reference: Side,
    candidate: Side,
    tasks: Sequence[str],
    *,
    device: str = "cpu",
    dtype: Dtype = "float32",
    limit: int | None = None,
    batch_size: int = 1,
) -> list[TaskScore]:
    """Scores of both sides, one model in memory at a time; both use the reference's tokenizer.

    Args:
        tasks: the harness's names, or YAML files of local tasks.
        limit: questions of each task; None: all.

    Raises:
        UserError: the harness is not installed, no task, or one that it does not know.
    """
    harness, names, manager = require_tasks(tasks)
    with tokenizer_folder(reference.view.path, candidate.view.path) as folder:
        tokenizer = load_tokenizer(folder)
    results = []
    for side in (reference, candidate):
        with model_of(side, getattr(torch, dtype), device) as model:
            wrapped = harness["HFLM"](pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            found = harness["simple_evaluate"](
                model=wrapped, tasks=names, task_manager=manager, limit=limit, random_seed=SEED, bootstrap_iters=100
            )
        results.append(found["results"])
    return list(differences(*results))


def require_tasks(tasks: Sequence[str]) -> tuple[dict[str, Any], list[str], Any]:
    """(the harness, names of tasks that it knows, its task manager), to be asked for before hours of other work.

    Raises:
        UserError: the harness is not installed, no task, or one that it does not know.
    """
    harness = _harness()
    names, folders = named_tasks(tasks)
    manager = harness["TaskManager"](include_path=folders or None)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UserError(f"--tasks: {', '.join(unknown)}: no such task", "Name tasks of lm-eval, or a task's YAML file")
    return harness, names, manager


def named_tasks(tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """(names, folders of local tasks): a YAML file stands for the task it describes.

    Raises:
        UserError: no task, or a file that names none.
    """
    names, folders = [], []
    for task in (part.strip() for entry in tasks for part in entry.split(",")):
        path = Path(task)
        if path.suffix not in (".yaml", ".yml"):
            names.append(task)
            continue
        names.append(_task_of(path))
        folders.append(str(path.resolve().parent))
    names = [name for name in names if name]
    if not names:
        raise UserError("--tasks: names no task", "Name one or more, with commas between")
    return names, list(dict.fromkeys(folders))


def _task_of(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    named = [line.partition(":")[2].strip().strip("\"'") for line in lines if line.startswith("task:")]
    if not named or not named[0]:
        raise UserError(f"{path}: names no task", "Give a YAML file of lm-eval with a line `task: NAME`")
    return named[0]


def differences(reference: Mapping[str, Any], candidate: Mapping[str, Any]) -> Iterator[TaskScore]:
    """Every numeric metric that both have, from the harness's `results` ("acc,none", "acc_stderr,none")."""
    for task, metrics in reference.items():
        for key, mine in metrics.items():
            name, _, filtered = key.partition(",")
            theirs = candidate.get(task, {}).get(key)
            if name.endswith("_stderr") or not _is_number(mine) or not _is_number(theirs):
                continue
            errors = [side.get(f"{name}_stderr,{filtered}") for side in (metrics, candidate[task])]
            spread = hypot(*errors) if all(map(_is_number, errors)) else 0.0
            difference = theirs - mine
            yield TaskScore(
                task=task,
                metric=name if filtered in ("", "none") else f"{name} ({filtered})",
                reference=mine,
                candidate=theirs,
                difference=difference,
                errors=difference / spread if spread else None,
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _harness() -> dict[str, Any]:
    """What is used of the harness.

    Raises:
        UserError: it is not installed.
    """
    try:
        rooms = {name: import_module(name) for name in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks")}
    except ImportError as error:
        raise UserError(
            f"--tasks needs lm-eval, which is not installed ({error})", "pip install 'qwen2tool[eval]'"
        ) from None
    return {
        "simple_evaluate": rooms["lm_eval"].simple_evaluate,
        "HFLM": rooms["lm_eval.models.huggingface"].HFLM,
        "TaskManager": rooms["lm_eval.tasks"].TaskManager,
    }
