"""A comparison that was killed goes on where it was, and only if nothing changed meanwhile."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen2tool.errors import UserError
from qwen2tool.verify.layers import LayerComparison
from qwen2tool.verify.run import verify
from tests.verify.common import random_samples


class Killed(BaseException):
    """Stands for a signal: nothing in the way may catch it."""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that were taken, in order; -1 in it kills the run before the next."""
    taken: list[int] = []
    step = LayerComparison.step

    def watched(self: LayerComparison, index: int, advance: Any) -> Any:
        if -1 in taken and index == 2:
            raise Killed
        taken.append(index)
        return step(self, index, advance)

    monkeypatch.setattr(LayerComparison, "step", watched)
    return taken


def run(base: Path, candidate: Path, work: Path, **options: Any) -> Any:
    return verify(base, candidate, random_samples(), work=work, **options)


def killed(base: Path, candidate: Path, work: Path, steps: list[int], **options: Any) -> None:
    steps[:] = [-1]
    with pytest.raises(Killed):
        run(base, candidate, work, **options)
    assert steps == [-1, 0, 1]
    steps.clear()


def test_a_killed_run_goes_on_to_the_same_figures(
    tmp_path: Path, base_folder: Path, merged_folder: Path, steps: list[int]
) -> None:
    wanted = verify(base_folder, merged_folder, random_samples(), gradients=True)
    work = tmp_path / "work"
    steps[:] = [-1]
    with pytest.raises(Killed):
        run(base_folder, merged_folder, work, gradients=True)
    steps.clear()
    found = run(base_folder, merged_folder, work, gradients=True)
    assert steps == [2]
    assert (found.figures, found.floors, found.layers) == (wanted.figures, wanted.floors, wanted.layers)
    assert (found.tensors, found.verdict, found.reason) == (wanted.tensors, wanted.verdict, wanted.reason)
    assert not work.exists()


def test_a_changed_source_or_setting_starts_afresh(
    tmp_path: Path, base_copy: Path, merged_folder: Path, steps: list[int]
) -> None:
    work = tmp_path / "work"
    killed(base_copy, merged_folder, work, steps)
    run(base_copy, merged_folder, work, max_tokens=100)
    assert steps == [0, 1, 2]
    killed(base_copy, merged_folder, work, steps)
    file = next(base_copy.glob("*.safetensors"))
    os.utime(file, ns=(1, 1))
    run(base_copy, merged_folder, work)
    assert steps == [0, 1, 2]


def test_a_killed_run_leaves_only_its_own_files_and_takes_no_others(
    tmp_path: Path, base_folder: Path, merged_folder: Path, steps: list[int]
) -> None:
    work = tmp_path / "work"
    killed(base_folder, merged_folder, work, steps)
    assert {file.name for file in work.iterdir()} == {"state.json", "rows"}
    mine = tmp_path / "mine"
    shutil.copytree(base_folder, mine)
    with pytest.raises(UserError, match="other files"):
        run(base_folder, merged_folder, mine)
    assert (mine / "config.json").is_file()


def test_a_kill_while_the_state_is_written_does_not_close_the_folder(
    tmp_path: Path, base_folder: Path, merged_folder: Path, steps: list[int]
) -> None:
    work = tmp_path / "work"
    killed(base_folder, merged_folder, work, steps)
    (work / "state.json.new").write_text('{"key": ')
    run(base_folder, merged_folder, work)
    assert steps[0] > 0 and not work.exists()


def test_another_scaling_of_the_candidates_adapter_starts_afresh(
    tmp_path: Path, base_folder: Path, adapter_folder: Path, steps: list[int]
) -> None:
    adapter, work = tmp_path / "adapter", tmp_path / "work"
    shutil.copytree(adapter_folder, adapter)
    killed(base_folder, base_folder, work, steps, candidate_adapter=adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 2 * settings["lora_alpha"]}))
    resumed = run(base_folder, base_folder, work, candidate_adapter=adapter)
    afresh = verify(base_folder, base_folder, random_samples(), candidate_adapter=adapter)
    assert resumed.figures == afresh.figures
