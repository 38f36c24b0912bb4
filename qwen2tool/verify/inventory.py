"""First stage: do both sides hold the same tensors, and does config.json make the same function of them?

A tied head may be stored, or not: `used_tensors` names the head that transformers would use either way, and its values
are the next stage's matter. transformers takes a stored `lm_head.weight` even where config.json ties it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen2tool.checkpoint.config_faults import config_faults
from qwen2tool.checkpoint.geometry import Geometry, expected_tensors
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.checkpoint.names import find_renamed
from qwen2tool.checkpoint.view import AnyTensor, View
from qwen2tool.console import format_ranges

SAME_FUNCTION = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "rms_norm_eps", "rope_theta", "rope_scaling", "sliding_layers",
)  # fmt: skip
"""Fields of the geometry that change what a model computes from the same tensors."""
TABLE, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
BUFFER = "rotary_emb.inv_freq"
"""Written by old savers, computed from config.json by every reader."""


@dataclass(frozen=True, kw_only=True)
class InventoryComparison:
    """Names on one side only, shapes that differ, and config fields that differ (name -> (reference, candidate)).

    Attributes:
        reference_biases, candidate_biases: how many bias tensors the two views have.
        renamed: missing name -> extra name that is the same but for the words of a wrapper.
        unusable: what makes readers refuse the candidate's config.json.
    """

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshapen: tuple[str, ...]
    config: dict[str, tuple[object, object]]
    reference_biases: int
    candidate_biases: int
    renamed: dict[str, str] = field(default_factory=dict)
    unusable: tuple[str, ...] = ()

    @property
    def other_width(self) -> bool:
        """Whether the hidden states are of another width, in the tensors too: then nothing can be held together."""
        return "hidden_size" in self.config and NORM in self.misshapen

    @property
    def agrees(self) -> bool:
        return not (self.missing or self.extra or self.misshapen or self.config or self.unusable)


def used_tensors(view: View) -> dict[str, AnyTensor]:
    """Name -> the tensor that a model loaded from `view` uses under it; a tied head is its table."""
    used = {name: tensor for name, tensor in view.tensors.items() if not name.endswith(BUFFER)}
    if HEAD not in used and TABLE in used and view.geometry.tie_word_embeddings:
        used[HEAD] = used[TABLE]
    return used


def compare_inventories(reference: View, candidate: View) -> InventoryComparison:
    """Compares names, shapes and the config fields that change the function."""
    mine, theirs = used_tensors(reference), used_tensors(candidate)
    missing = tuple(name for name in mine if name not in theirs)
    extra = tuple(name for name in theirs if name not in mine)
    return InventoryComparison(
        missing=missing,
        extra=extra,
        misshapen=tuple(name for name in mine if name in theirs and theirs[name].shape != mine[name].shape),
        config=_config_differences(reference, candidate),
        reference_biases=_count_biases(reference),
        candidate_biases=_count_biases(candidate),
        renamed=find_renamed(missing, extra),
        unusable=tuple(config_faults(candidate.config, candidate.geometry.num_hidden_layers)),
    )


def cannot_run(view: View) -> str | None:
    """Why no model can be made of `view`; missing biases are no reason, transformers has zeros for them."""
    used = used_tensors(view)
    for name, shape in expected_tensors(view.geometry).items():
        if name not in used and not name.endswith(".bias"):
            return f"the candidate has no {name}"
        if name in used and used[name].shape != shape:
            return f"the candidate's {name} does not have the shape that its config.json asks for"
    return _llama_misfit(view)


def _llama_misfit(view: View) -> str | None:
    """Of Llama's layout, whose view has a config of its own: the stored tensors against the stored config."""
    stored = view.origin
    if stored.config.get("model_type") == "llama" and stored.format != "gguf":
        for name, shape in expected_tensors(stored.geometry).items():
            if name in stored.tensors and stored.tensors[name].shape != shape:
                return f"the candidate's {name} does not have the shape that its config.json asks for"
    return None


def _count_biases(view: View) -> int:
    return sum(name.endswith(".bias") for name in view.tensors)


def _config_differences(reference: View, candidate: View) -> dict[str, tuple[object, object]]:
    mine, theirs = _function(reference), _function(candidate)
    if None in (mine["rope_scaling"], theirs["rope_scaling"]):
        mine.pop("max_position_embeddings"), theirs.pop("max_position_embeddings")  # the scaling says it already
    return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


def _function(view: View) -> dict[str, object]:
    """What config.json contributes to the function; a field that takes no part in it is None."""
    shape: Geometry = view.geometry
    fields = {name: getattr(shape, name) for name in SAME_FUNCTION}
    if view.origin.config.get("model_type") == "llama":  # the view takes what the tensors say
        fields["head_dim"] = view.origin.geometry.head_dim
    fields["sliding_window"] = shape.sliding_window if shape.sliding_layers else None
    # YaRN and its kin derive their factors from it where rope_scaling names no length of its own.
    fields["max_position_embeddings"] = shape.max_position_embeddings if shape.rope_scaling else None
    fields["hidden_act"] = view.config.get("hidden_act", "silu")
    fields["quantization_config"] = _quantises_on_load(view)
    return fields


def _quantises_on_load(view: View) -> object:
    """The method that config.json names though no tensor is packed: readers quantise what they load, or give up."""
    section = view.origin.config.get("quantization_config")
    plain = all(isinstance(tensor, TensorInfo) for tensor in view.tensors.values())
    return section.get("quant_method", "unnamed") if isinstance(section, dict) and plain else None


def in_words(value: object) -> str:
    """A value of config.json for a reader: "none", "rope_type yarn factor 4.0", layers as ranges."""
    if value in (None, ()):
        return "none"
    if isinstance(value, dict):
        return " ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, tuple):
        return format_ranges(value)
    return f"{value:.10g}" if isinstance(value, float) else str(value)
