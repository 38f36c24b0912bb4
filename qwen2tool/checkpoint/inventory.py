"""What a checkpoint has against what its architecture needs, with the biases counted one by one.

transformers fills a missing bias with zeros and goes on; a model that lost them answers gibberish. Here a missing one
is named. Source of the names and shapes: `geometry.expected_tensors`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.geometry import expected_tensors
from qwen2tool.errors import EXIT_FINDING, UserError

BIAS_NAME = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj\.bias")
QKV = ("q", "k", "v")
QUANT_PARTS = re.compile(
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+|SCB|qweight|qzeros|scales|g_idx)$"
)
"""Tensors that quantised formats (bitsandbytes, GPTQ, AWQ) store beside or instead of a `.weight`."""


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """Names that are missing or that nothing asks for, and shapes that disagree (name -> (found, expected))."""

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    biases: dict[int, dict[str, str]]
    """layer -> projection -> "present", "missing" or "extra"."""

    @property
    def missing_biases(self) -> tuple[str, ...]:
        return tuple(name for name in self.missing if name.endswith(".bias"))


def take_inventory(checkpoint: Checkpoint) -> Inventory:
    """Compares the tensors of `checkpoint` with its geometry's; quantised weights are exempt from shape checks."""
    shape, tensors = checkpoint.geometry, checkpoint.tensors
    expected = expected_tensors(shape)
    quantized = shape.quantization is not None
    # A quantised linear may store its weight under other names; biases, norms and embeddings stay as they are.
    missing = [n for n in expected if n not in tensors and not (quantized and n.endswith("_proj.weight"))]
    extra = [n for n in tensors if n not in expected and not (quantized and QUANT_PARTS.search(n))]
    if shape.tie_word_embeddings and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")  # a redundant copy of the tied table; `report` says whether it is equal
    extra = [name for name in extra if not name.endswith("rotary_emb.inv_freq")]  # a buffer old savers wrote
    misshapen = {
        name: (tensors[name].shape, wanted)
        for name, wanted in expected.items()
        if name in tensors and tensors[name].shape != wanted and not (quantized and name.endswith("_proj.weight"))
    }
    biases = _bias_table(shape.num_hidden_layers, set(tensors))
    return Inventory(missing=tuple(missing), extra=tuple(extra), misshapen=misshapen, biases=biases)


def _bias_table(layers: int, names: set[str]) -> dict[int, dict[str, str]]:
    """q, k and v of every layer count as missing where absent, whatever the config says of `attention_bias`."""
    table = {layer: dict.fromkeys(QKV, "missing") for layer in range(layers)}
    for match in filter(None, map(BIAS_NAME.fullmatch, names)):
        layer, projection = int(match[1]), match[2]
        table.setdefault(layer, {})[projection] = "present" if projection in QKV and layer < layers else "extra"
    return dict(sorted(table.items()))


def require_whole(checkpoint: Checkpoint) -> None:
    """Passes a checkpoint that is a complete Qwen2 and nothing else.

    Raises:
        UserError: another architecture, a missing or extra tensor, or a shape that disagrees with config.json.
    """
    kind = checkpoint.geometry.model_type
    if kind != "qwen2":
        raise UserError(
            f"{checkpoint.path}: model_type is {kind!r}, not 'qwen2'",
            "Use a Qwen1.5, Qwen2, Qwen2.5, QwQ or CodeQwen checkpoint",
        )
    found = take_inventory(checkpoint)
    if found.missing_biases:
        lost = found.missing_biases
        total = 3 * checkpoint.geometry.num_hidden_layers
        raise UserError(
            f"{checkpoint.path}: {len(lost)} of {total} q/k/v biases are missing, the first is {lost[0]}",
            "Go back to the original checkpoint: a Qwen2 without its biases answers gibberish",
            EXIT_FINDING,
        )
    if found.missing:
        raise UserError(
            f"{checkpoint.path}: {len(found.missing)} tensors are missing, the first is {found.missing[0]}",
            "Download the checkpoint again",
            EXIT_FINDING,
        )
    if found.misshapen:
        name, (shape, wanted) = next(iter(found.misshapen.items()))
        raise UserError(
            f"{checkpoint.path}: {name} has shape {list(shape)}, config.json asks for {list(wanted)}",
            "Use the config.json that belongs to these weights",
            EXIT_FINDING,
        )
    if found.extra:
        raise UserError(
            f"{checkpoint.path}: {len(found.extra)} tensors that no Qwen2 has, the first is {found.extra[0]}",
            "Use the config.json that belongs to these weights",
            EXIT_FINDING,
        )
