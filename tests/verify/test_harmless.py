"""Nothing that leaves the function alone is flagged, by the verdict or by a diagnosis."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.verify.harmless import HARMLESS, Harmless
from tests.verify.zoo_run import Keeper, judge_harmless, keeper_of

REAL = os.environ.get("QWEN2TOOL_REAL_MODEL")


@pytest.fixture(scope="module", params=["tiny-qwen2", "gqa 28/4"])
def keeper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Keeper:
    return keeper_of(request.param, tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Keeper:
    return keeper_of(str(REAL), tmp_path_factory.mktemp("zoo"))


def check(keeper: Keeper, change: Harmless, target: Path, **text: int) -> None:
    report = judge_harmless(keeper, change, target, **text)
    assert (report.verdict, report.exit_code) == ("equivalent", 0), report.reason
    assert report.diagnoses == []


@pytest.mark.parametrize("change", HARMLESS, ids=lambda change: change.name)
def test_a_harmless_change_is_not_flagged(keeper: Keeper, change: Harmless, tmp_path: Path) -> None:
    check(keeper, change, tmp_path / "target")


@pytest.mark.long
@pytest.mark.skipif(not REAL, reason="QWEN2TOOL_REAL_MODEL names no checkpoint folder")
@pytest.mark.parametrize("change", [change for change in HARMLESS if change.real], ids=lambda change: change.name)
def test_a_harmless_change_of_a_published_model(real: Keeper, change: Harmless, tmp_path: Path) -> None:
    check(real, change, tmp_path / "target", count=4, length=48)


def test_there_are_enough_and_no_two_alike() -> None:
    names = [change.name for change in HARMLESS]
    assert len(names) == len(set(names)) >= 24
