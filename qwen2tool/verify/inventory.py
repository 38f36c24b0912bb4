"""First stage: do both sides hold the same tensors, and does config.json make the same function of them?

A tied head may be stored, or not: `used_tensors` names the head that transformers would use either way, and its values
are the next stage's matter. transformers takes a stored `lm_head.weight` even where config.json ties it.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen2tool.checkpoint.geometry import Geometry, expected_tensors
from qwen2tool.checkpoint.view import AnyTensor, View

SAME_FUNCTION = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "rms_norm_eps", "rope_theta", "rope_scaling", "sliding_layers",
)  # fmt: skip
"""Fields of the geometry that change what a model computes from the same tensors."""
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BUFFER = "rotary_emb.inv_freq"
"""Written by old savers, computed from config.json by every reader."""


@dataclass(frozen=True, kw_only=True)
class InventoryComparison:
    """Names on one side only, shapes that differ, and config fields that differ (name -> (reference, candidate)).

    `reference_biases` and `candidate_biases` count the bias tensors of the two views.
    """

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshapen: tuple[str, ...]
    config: dict[str, tuple[object, object]]
    reference_biases: int
    candidate_biases: int

    @property
    def agrees(self) -> bool:
        return not (self.missing or self.extra or self.misshapen or self.config)


def used_tensors(view: View) -> dict[str, AnyTensor]:
    """Name -> the tensor that a model loaded from `view` uses under it; a tied head is its table."""
    used = {name: tensor for name, tensor in view.tensors.items() if not name.endswith(BUFFER)}
    if HEAD not in used and TABLE in used and view.geometry.tie_word_embeddings:
        used[HEAD] = used[TABLE]
    return used


def compare_inventories(reference: View, candidate: View) -> InventoryComparison:
    """Compares names, shapes and the config fields that change the function."""
    mine, theirs = used_tensors(reference), used_tensors(candidate)
    return InventoryComparison(
        missing=tuple(name for name in mine if name not in theirs),
        extra=tuple(name for name in theirs if name not in mine),
        misshapen=tuple(name for name in mine if name in theirs and theirs[name].shape != mine[name].shape),
        config=_config_differences(reference, candidate),
        reference_biases=_count_biases(reference),
        candidate_biases=_count_biases(candidate),
    )


def cannot_run(view: View) -> str | None:
    """Why no model can be made of `view`; missing biases are no reason, transformers has zeros for them."""
    used = used_tensors(view)
    for name, shape in expected_tensors(view.geometry).items():
        if name not in used and not name.endswith(".bias"):
            return f"the candidate has no {name}"
        if name in used and used[name].shape != shape:
            return f"the candidate's {name} does not have the shape that its config.json asks for"
    return None


def _count_biases(view: View) -> int:
    return sum(name.endswith(".bias") for name in view.tensors)


def _config_differences(reference: View, candidate: View) -> dict[str, tuple[object, object]]:
    mine, theirs = _function(reference), _function(candidate)
    return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


def _function(view: View) -> dict[str, object]:
    """What config.json contributes to the function; a field that takes no part in it is None."""
    shape: Geometry = view.geometry
    fields = {name: getattr(shape, name) for name in SAME_FUNCTION}
    fields["sliding_window"] = shape.sliding_window if shape.sliding_layers else None
    # YaRN and its kin derive their factors from it where rope_scaling names no length of its own.
    fields["max_position_embeddings"] = shape.max_position_embeddings if shape.rope_scaling else None
    fields["hidden_act"] = view.config.get("hidden_act", "silu")
    return fields
