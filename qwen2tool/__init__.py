"""qwen2tool: fine-tune Qwen2-architecture models without losing their q, k and v biases.

Importing the package loads nothing heavy; the public functions below import torch when they are first touched.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# No public name is that of a room: importing the room would set it to the module.
_PUBLIC = {
    "UserError": ("qwen2tool.errors", "UserError"),
    "inspect_checkpoint": ("qwen2tool.checkpoint.report", "inspect_checkpoint"),
    "open_checkpoint": ("qwen2tool.checkpoint.folder", "open_checkpoint"),
    "train": ("qwen2tool.training.run", "train"),
    "TrainSettings": ("qwen2tool.training.settings", "TrainSettings"),
    "merge_adapter": ("qwen2tool.merge.run", "merge"),
    "verify_equivalence": ("qwen2tool.verify.run", "verify"),
    "plan_push": ("qwen2tool.hub.plan", "plan_push"),
    "push": ("qwen2tool.hub.push", "push"),
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qwen2tool' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module), attribute)
