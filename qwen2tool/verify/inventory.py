"""First stage: do both sides hold the same tensors, and does config.json make the same function of them?"""

from __future__ import annotations

from dataclasses import dataclass

from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.geometry import Geometry

SAME_FUNCTION = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "rms_norm_eps", "rope_theta", "rope_scaling", "sliding_layers",
)  # fmt: skip
"""Fields of the geometry that change what a model computes from the same tensors."""


@dataclass(frozen=True, kw_only=True)
class InventoryComparison:
    """Names on one side only, shapes that differ, and config fields that differ (name -> (reference, candidate))."""

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshapen: tuple[str, ...]
    config: dict[str, tuple[object, object]]

    @property
    def agrees(self) -> bool:
        return not (self.missing or self.extra or self.misshapen or self.config)


def compare_inventories(reference: Checkpoint, candidate: Checkpoint) -> InventoryComparison:
    """Compares names, shapes and config; a tied head may be stored or not, its values are the next stage's matter."""
    mine, theirs = set(reference.tensors), set(candidate.tensors)
    if _tied(reference) and _tied(candidate):
        mine, theirs = mine - {"lm_head.weight"}, theirs - {"lm_head.weight"}
    return InventoryComparison(
        missing=tuple(name for name in reference.tensors if name in mine - theirs),
        extra=tuple(name for name in candidate.tensors if name in theirs - mine),
        misshapen=tuple(
            name
            for name, info in reference.tensors.items()
            if name in mine & theirs and candidate.tensors[name].shape != info.shape
        ),
        config=_config_differences(reference, candidate),
    )


def _tied(checkpoint: Checkpoint) -> bool:
    return checkpoint.geometry.tie_word_embeddings


def _config_differences(reference: Checkpoint, candidate: Checkpoint) -> dict[str, tuple[object, object]]:
    found = {
        name: (getattr(reference.geometry, name), getattr(candidate.geometry, name))
        for name in SAME_FUNCTION
        if getattr(reference.geometry, name) != getattr(candidate.geometry, name)
    }
    if _window(reference.geometry) != _window(candidate.geometry):
        found["sliding_window"] = (_window(reference.geometry), _window(candidate.geometry))
    acts = reference.config.get("hidden_act", "silu"), candidate.config.get("hidden_act", "silu")
    return found | ({"hidden_act": acts} if acts[0] != acts[1] else {})


def _window(shape: Geometry) -> int | None:
    """The window counts only where a layer slides."""
    return shape.sliding_window if shape.sliding_layers else None
