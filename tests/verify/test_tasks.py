"""Both sides through lm-eval: with a stub of its interface, and with the real thing where it is installed.

The stub has the names that `tasks` uses (`simple_evaluate`, `HFLM`, `TaskManager`) with lm-eval 0.4's arguments and the
shape of its results, and scores a model by its mean log-probability of fixed tokens. It proves our side of the call,
not lm-eval's.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from qwen2tool.convert.read import open_qwen2
from qwen2tool.errors import UserError
from qwen2tool.verify.sides import Side
from qwen2tool.verify.tasks import compare_tasks, differences, named_tasks
from tests.verify.common import variant, without

QUESTIONS = ("the answer", "the user reads", "a question")


def side(folder: Path) -> Side:
    return Side(view=open_qwen2(folder, whole=False))


def stub() -> dict[str, ModuleType]:
    """A module of lm-eval's interface."""

    class TaskManager:
        def __init__(self, include_path: list[str] | None = None) -> None:
            self.all_tasks = ["likelihood", *([] if include_path is None else ["local"])]

    def wrap(pretrained: Any, tokenizer: Any, batch_size: int) -> Any:
        assert batch_size == 1
        return SimpleNamespace(model=pretrained, tokenizer=tokenizer)

    @torch.no_grad()
    def simple_evaluate(*, model: Any, tasks: list[str], limit: int | None, **options: Any) -> dict[str, Any]:
        scores = []
        for text in QUESTIONS[:limit]:
            ids = torch.tensor([model.tokenizer(text)["input_ids"]])
            scores.append(model.model(ids, labels=ids).loss.neg().item())
        values = torch.tensor(scores)
        error = (values.std() / len(values) ** 0.5).item()
        found = {"alias": "x", "ll,none": values.mean().item(), "ll_stderr,none": error, "n,none": "N/A"}
        return {"results": dict.fromkeys(tasks, found)}

    rooms = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")}
    rooms["lm_eval.tasks"] = ModuleType("lm_eval.tasks")
    rooms["lm_eval"].simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    rooms["lm_eval.models.huggingface"].HFLM = wrap  # type: ignore[attr-defined]
    rooms["lm_eval.tasks"].TaskManager = TaskManager  # type: ignore[attr-defined]
    return rooms


@pytest.fixture
def with_stub(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in stub().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("with_stub")
def test_a_copy_scores_the_same_and_a_damaged_one_less(tmp_path: Path, base_folder: Path) -> None:
    (same,) = compare_tasks(side(base_folder), side(base_folder), ["likelihood"])
    assert (same.task, same.metric, same.difference, same.errors) == ("likelihood", "ll", 0.0, 0.0)
    lost = variant(base_folder, tmp_path / "lost", without("v_proj.bias"))
    (worse,) = compare_tasks(side(base_folder), side(lost), ["likelihood"])
    assert worse.reference == same.reference and worse.candidate != same.reference
    assert worse.difference == worse.candidate - worse.reference


@pytest.mark.usefixtures("with_stub")
def test_names_that_the_harness_does_not_know(base_folder: Path) -> None:
    with pytest.raises(UserError, match="mmlux: no such task"):
        compare_tasks(side(base_folder), side(base_folder), ["likelihood,mmlux"])


def test_without_the_harness_the_extra_is_named(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError) as caught:
        compare_tasks(side(base_folder), side(base_folder), ["likelihood"])
    assert "qwen2tool[eval]" in caught.value.fix


def test_local_tasks_by_their_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("# ours\ntask: 'local'\ndataset_path: json\n")
    assert named_tasks(["arc_easy, piqa", str(tmp_path / "mine.yaml")]) == (
        ["arc_easy", "piqa", "local"], [str(tmp_path)],
    )  # fmt: skip
    (tmp_path / "empty.yaml").write_text("dataset_path: json\n")
    with pytest.raises(UserError, match="names no task"):
        named_tasks([str(tmp_path / "empty.yaml")])
    with pytest.raises(UserError, match="names no task"):
        named_tasks([""])


def test_differences_by_hand() -> None:
    mine = {"t": {"acc,none": 0.5, "acc_stderr,none": 0.03, "alias": "t", "f1,strict": 0.25, "f1_stderr,strict": "N/A"}}
    theirs = {
        "t": {"acc,none": 0.4, "acc_stderr,none": 0.04, "alias": "t", "f1,strict": 0.5, "f1_stderr,strict": "N/A"}
    }
    acc, f1 = differences(mine, theirs)
    assert (acc.metric, acc.difference, acc.errors) == ("acc", pytest.approx(-0.1), pytest.approx(-2.0))
    assert (f1.metric, f1.difference, f1.errors) == ("f1 (strict)", 0.25, None)
    assert [*differences(mine, {})] == []


LOCAL = """task: spelling
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@pytest.mark.long
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (extra eval)")
def test_with_lm_eval_itself_on_a_task_of_our_own(tmp_path: Path, base_folder: Path) -> None:
    choices = [" the model answers", " zzz qqq"]
    rows = [{"question": f"{word}:", "choices": choices, "answer": n % 2} for n, word in enumerate("abcdef")]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "spelling.yaml").write_text(LOCAL.format(file=tmp_path / "data.json"))
    lost = variant(base_folder, tmp_path / "lost", without("v_proj.bias"))
    for candidate in (base_folder, lost):
        found = {
            s.metric: s for s in compare_tasks(side(base_folder), side(candidate), [str(tmp_path / "spelling.yaml")])
        }
        assert 0 <= found["acc"].reference <= 1
        assert candidate is lost or found["acc"].difference == 0
