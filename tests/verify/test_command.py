"""verify-equivalence on the command line: every flag, exit codes, JSON."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

import qwen2tool.verify.run
from qwen2tool.assets import TINY_QWEN2
from qwen2tool.verify.patterns.sentences import CODES
from tests.cli_runner import Outcome, run
from tests.verify.common import State, variant

FEW = ("--max-tokens", "300", "--device", "cpu")


def halve(state: State) -> None:
    state["model.layers.3.mlp.down_proj.weight"] *= 0.5


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return variant(TINY_QWEN2, tmp_path_factory.mktemp("halved") / "halved", halve)


def verify(*arguments: str | Path) -> Outcome:
    return run("verify-equivalence", TINY_QWEN2, *arguments, *FEW)


def test_json_holds_every_level(halved: Path) -> None:
    outcome = verify(halved, "--gradients", "--generate", "4", "--json")
    found = json.loads(outcome.out)
    assert outcome.code == found["exit_code"] == 1
    assert (found["schema_version"], found["verdict"], found["dtype"]) == (2, "different", "bfloat16")
    assert [max(layer["own"].values()) > 0.1 for layer in found["layers"]] == [n == 3 for n in range(5)]
    assert [max(layer["gradients"].values()) > 0.1 for layer in found["layers"]] == [n == 3 for n in range(5)]
    assert (found["first_beyond"]["layer"], found["first_beyond"]["part"]) == (3, "mlp")
    assert found["diagnoses"] and all(set(d) >= {"code", "sentence"} for d in found["diagnoses"])
    assert list(found["floors"]) == ["bfloat16 against float32", "bfloat16, other batches"]
    assert found["floor"] in found["floors"].values()
    assert {"same_top5", "nll_difference", "nll_difference_se", "ppl_ratio_se"} <= found["logits"].keys()
    assert found["generations"]["prompts"] > 0


def test_what_documents_the_json_names_its_keys(halved: Path) -> None:
    text = (Path(__file__).parent.parent.parent / "docs" / "verify-schema.md").read_text()
    found = json.loads(verify(halved, "--gradients", "--json").out)
    keys = {*found, *found["layers"][0], *found["logits"], *found["inventory"], *found["tensors"]}
    assert [key for key in sorted(keys) if f"`{key}`" not in text] == []


def test_a_tolerance_and_a_page(tmp_path: Path, halved: Path) -> None:
    page = tmp_path / "report.html"
    outcome = verify(halved, "--tolerance", "5", "--report", page)
    assert outcome.code == 0 and outcome.out.startswith("equivalent: the mean KLD is ")
    assert "equivalent" in page.read_text()
    assert verify(halved, "--tolerance", "1e-6").code == 1
    assert "cannot be written" in verify(halved, "--report", tmp_path / "none" / "x.html").error


def test_a_work_folder_is_gone_when_all_is_done(tmp_path: Path, halved: Path) -> None:
    assert verify(halved, "--work", tmp_path / "work").code == 1
    assert not (tmp_path / "work").exists()
    assert "other files" in verify(halved, "--work", halved).error


@pytest.mark.parametrize(
    "flags",
    [("--gradients",), ("--tolerance", "0"), ("--generate", "3"), ("--work", "x"), ("--report", "x.html")],
)
def test_what_needs_two_sides_is_refused_with_routes(flags: tuple[str, ...]) -> None:
    assert f"{flags[0]} is about a CANDIDATE" in verify("--routes", *flags).error


def test_what_the_last_levels_need_is_asked_for_before_hours_of_work(
    tmp_path: Path, halved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(qwen2tool.verify.run, "_measure", work)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "--tasks needs lm-eval" in verify(halved, "--tasks", "piqa").error
    cut = Path(shutil.copytree(TINY_QWEN2, tmp_path / "cut"))
    (cut / "generation_config.json").write_text('{"eos_token_id": 3')
    assert "generation_config.json" in run("verify-equivalence", cut, halved, "--generate", "4").error
    with pytest.raises(AssertionError, match="the work began"):
        verify(halved, "--generate", "4")


def test_routes_take_one_adapter(adapter_folder: Path) -> None:
    assert "one --adapter" in verify("--routes", "--adapter", adapter_folder, "--adapter", adapter_folder).error


def test_every_code_of_a_diagnosis_is_documented() -> None:
    text = (Path(__file__).parent.parent.parent / "docs" / "verify-schema.md").read_text()
    assert [code for code in CODES if f"`{code}`" not in text] == []
