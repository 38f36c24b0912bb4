"""Small data files and settings for training runs on the tiny checkpoint, in fp32 on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen2tool.training.settings import TrainSettings, load_settings


def write_instructions(file: Path, count: int = 12) -> Path:
    """Answers of very different lengths, so that averaging by batch and by token differ."""
    records = [
        {"instruction": f"the question {n}", "output": f"the answer {n}" + " reads and" * (3 * (n % 4))}
        for n in range(count)
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def write_preferences(file: Path, count: int = 8) -> Path:
    records = [
        {"prompt": f"the question {n}", "chosen": f"the answer {n} reads", "rejected": "no " * (1 + n % 3)}
        for n in range(count)
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def settings_for(base: Path, folder: Path, **changes: Any) -> TrainSettings:
    fields: dict[str, Any] = {
        "model": str(base), "data": str(folder / "data.jsonl"), "output": str(folder / "run"), "rank": 4, "alpha": 12,
        "dropout": 0.0, "learning_rate": 1e-2, "batch_size": 2, "gradient_accumulation": 2, "device": "cpu",
        "recompute": "none", "seed": 3,
    }  # fmt: skip
    if changes.get("adapter"):
        fields |= {"rank": None, "alpha": None, "dropout": None}
    return load_settings(None, fields | changes)
