"""A push plan for reading: every file with its size, the total, the notes, and the card in full."""

from __future__ import annotations

from qwen2tool.console import format_bytes, print_table, say
from qwen2tool.hub.plan import PlannedFile, PushPlan


def print_plan(plan: PushPlan) -> None:
    """Prints what `push` would send and what it would leave, then the text of README.md."""
    rows = [(file.name, format_bytes(file.size), _source(plan, file)) for file in plan.files]
    rows.append((f"{len(plan.files)} files", format_bytes(plan.total_bytes), ""))
    print_table(f"{plan.kind} {plan.path} -> {plan.repo_id}", ("file", "size", "from"), rows)
    for note in plan.notes:
        say(f"- {note}")
    say("")
    say(plan.card)


def _source(plan: PushPlan, file: PlannedFile) -> str:
    if file.path is None:
        return "generated"
    return "the folder" if file.path.parent == plan.path else str(file.path)
