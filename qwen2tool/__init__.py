"""qwen2tool: fine-tune Qwen2-architecture models without losing their q, k and v biases.

Importing the package loads nothing heavy; the public functions below import torch when they are first touched.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "UserError": "qwen2tool.errors",
    "inspect_checkpoint": "qwen2tool.checkpoint.report",
    "open_checkpoint": "qwen2tool.checkpoint.folder",
    "train": "qwen2tool.training.run",
    "TrainSettings": "qwen2tool.training.settings",
    "merge": "qwen2tool.merge.run",
    "verify": "qwen2tool.verify.run",
    "push": "qwen2tool.hub.push",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qwen2tool' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
