"""Every planted fault is detected and named: on the bundled model, on seven q heads to a k head, on a published one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.verify.faults import FAULTS
from tests.verify.zoo import Fault
from tests.verify.zoo_run import Keeper, judge_fault, keeper_of

REAL = os.environ.get("QWEN2TOOL_REAL_MODEL")


@pytest.fixture(scope="module", params=["tiny-qwen2", "gqa 28/4"])
def keeper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Keeper:
    return keeper_of(request.param, tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Keeper:
    return keeper_of(str(REAL), tmp_path_factory.mktemp("zoo"))


def check(keeper: Keeper, fault: Fault, target: Path, **text: int) -> None:
    report = judge_fault(keeper, fault, target, **text)
    assert report.verdict != "equivalent", report.reason
    assert {diagnosis.code for diagnosis in report.diagnoses} == set(fault.codes)
    for diagnosis in report.diagnoses:
        assert diagnosis.sentence.endswith(".") and diagnosis.tensors
        assert "{" not in diagnosis.sentence and "|" not in diagnosis.sentence


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_detected_and_named(keeper: Keeper, fault: Fault, tmp_path: Path) -> None:
    check(keeper, fault, tmp_path / "target", count=2)


@pytest.mark.long
@pytest.mark.skipif(not REAL, reason="QWEN2TOOL_REAL_MODEL names no checkpoint folder")
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.real], ids=lambda fault: fault.name)
def test_a_fault_of_a_published_model(real: Keeper, fault: Fault, tmp_path: Path) -> None:
    check(real, fault, tmp_path / "target", count=4, length=48)


def test_the_zoo_is_a_zoo() -> None:
    """Names are unique, and every kind of bias fault that is known in the wild is there."""
    names = [fault.name for fault in FAULTS]
    assert len(names) == len(set(names)) >= 24
    assert sum(fault.real for fault in FAULTS) >= 20
    codes = {code for fault in FAULTS for code in fault.codes}
    assert {f"bias_{state}" for state in ("missing", "zero", "permuted", "swapped", "scaled", "reinitialised")} <= codes
