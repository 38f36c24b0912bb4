"""Which names of a base are Hub ids, and what is left of a path."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2tool.hub.origin import as_hub_id, local_paths, without_paths


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("/x/hub/models--Qwen--Qwen2.5-7B/snapshots/0f1e", "Qwen/Qwen2.5-7B"),
        ("/x/models/Qwen2.5-7B", None),
        ("./Qwen2.5-7B", None),
        ("runs/sft/final", None),
        ("base", None),
    ],
)
def test_hub_ids_are_told_from_paths(tmp_path: Path, base: str, expected: str | None) -> None:
    assert as_hub_id(base, tmp_path) == expected


def test_a_relative_path_that_exists_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert as_hub_id("runs/base", tmp_path / "runs" / "sft") == "runs/base"
    (tmp_path / "runs" / "base").mkdir(parents=True)
    assert as_hub_id("runs/base", tmp_path / "runs" / "sft") is None
    (tmp_path / "elsewhere").mkdir()
    assert as_hub_id("runs/base", Path("/nowhere")) == "runs/base"
    monkeypatch.chdir(tmp_path)
    assert as_hub_id("runs/base", Path("/nowhere")) is None


def test_paths_are_found_and_shortened_at_any_depth() -> None:
    record = {"a": "/home/user/x", "b": [{"c": "C:\\user\\y"}, 3, None], "d": "Qwen/Qwen2-0.5B", "e": "~/z/"}
    assert local_paths(record) == ["/home/user/x", "C:\\user\\y", "~/z/"]
    assert without_paths(record) == {"a": "x", "b": [{"c": "y"}, 3, None], "d": "Qwen/Qwen2-0.5B", "e": "z"}
