"""What the package brings along: tiny-qwen2 and the demo's instructions and preferences; see the README in here."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
TINY_QWEN2 = HERE / "tiny-qwen2"
INSTRUCTIONS = HERE / "instructions.jsonl"
PREFERENCES = HERE / "preferences.jsonl"
HELD_OUT_INSTRUCTIONS = 40
HELD_OUT_PREFERENCES = 25
"""The last so many lines of each file are for judging, never for training."""


def split(file: Path, held_out: int) -> tuple[str, str]:
    """(training lines, held-out lines) of a bundled JSONL file, as text."""
    lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return "\n".join(lines[:-held_out]) + "\n", "\n".join(lines[-held_out:]) + "\n"
