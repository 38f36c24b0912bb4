"""The printed plan against the plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2tool.console import format_bytes
from qwen2tool.hub.plan import plan_push
from qwen2tool.hub.show import print_plan


def test_every_file_size_note_and_the_card_are_printed(base_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (base_copy / ".env").write_text("SECRET=1")
    plan = plan_push(base_copy, "me/tiny")
    print_plan(plan)
    printed = capsys.readouterr().out
    table = [" ".join(line.split()) for line in printed.splitlines()]
    for file in plan.files:
        assert f"{file.name} {format_bytes(file.size)} {'the folder' if file.path else 'generated'}" in table
    assert f"{len(plan.files)} files {format_bytes(plan.total_bytes)}" in table
    assert "- not sent: .env" in table
    assert plan.card in printed
    assert "SECRET" not in printed
