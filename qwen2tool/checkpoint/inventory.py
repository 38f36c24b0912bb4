"""What a checkpoint has against what its architecture needs, with the biases counted one by one.

transformers fills a missing bias with zeros and goes on; a model that lost them answers gibberish. Here a missing one
is named. Source of the names and shapes: `geometry.expected_tensors`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.geometry import expected_tensors
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.errors import EXIT_FINDING, UserError

BIAS_NAME = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj\.bias")
QKV = ("q", "k", "v")
QUANT_PARTS = re.compile(
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+|SCB|weight_format"
    r"|qweight|qzeros|scales|g_idx"
    r"|weight_(packed|scale|scale_inv|shape|zero_point|g_idx|global_scale)|(input|activation|output|k|v)_scale)$"
)
"""Tensors that bitsandbytes, then GPTQ and AWQ, then fp8 and compressed-tensors store beside or instead of a weight."""
PACKABLE = ("_proj.weight", "lm_head.weight")


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
    """Compares the tensors of `checkpoint` with its geometry's.

    A quantised checkpoint may store a linear's weight packed; then the parts that unpack it are looked for instead.
    Biases, norms and embeddings stay as they are under every method.
    """
    shape, tensors = checkpoint.geometry, checkpoint.tensors
    expected = expected_tensors(shape)
    quantized = shape.quantization is not None
    packable = {name for name in expected if quantized and name.endswith(PACKABLE)}
    missing = [name for name in expected if name not in packable and name not in tensors]
    missing += [part for name in expected if name in packable for part in _lost_when_packing(name, tensors)]
    extra = [n for n in tensors if n not in expected and not (quantized and QUANT_PARTS.search(n))]
    if shape.tie_word_embeddings and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")  # a redundant copy of the tied table; `report` says whether it is equal
    extra = [name for name in extra if not name.endswith("rotary_emb.inv_freq")]  # a buffer old savers wrote
    misshapen = {
        name: (tensors[name].shape, wanted)
        for name, wanted in expected.items()
        if name in tensors
        and tensors[name].shape != wanted
        and not (name in packable and _holds(tensors[name], wanted))
    }
    biases = _bias_table(shape.num_hidden_layers, set(tensors))
    return Inventory(missing=tuple(missing), extra=tuple(extra), misshapen=misshapen, biases=biases)


def _holds(info: TensorInfo, wanted: tuple[int, ...]) -> bool:
    """Whether a packed weight can be one of shape `wanted`: bitsandbytes stores two 4-bit numbers a byte."""
    if info.dtype == "U8":
        return info.numel == (prod(wanted) + 1) // 2
    return info.dtype == "I32"


def _lost_when_packing(name: str, tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """What is missing of a weight that may be there plain or packed: the weight itself, or a part that unpacks it.

    bitsandbytes keeps the name: 4-bit as U8 with absmax and a quant_state beside it, 8-bit as I8 with SCB.
    """
    module = name.removesuffix("weight")
    info = tensors.get(name)
    if info is None:
        if f"{module}qweight" in tensors:
            needed: tuple[str, ...] = (f"{module}scales",)
        else:
            needed = (f"{module}weight_scale",) if f"{module}weight_packed" in tensors else (name,)
        yield from (part for part in needed if part not in tensors)
    elif info.dtype == "U8":
        if f"{name}.absmax" not in tensors:
            yield f"{name}.absmax"
        if f"{name}.quant_map" not in tensors:
            yield f"{name}.quant_map"
        if not any(f"{name}.quant_state.bitsandbytes__{kind}" in tensors for kind in ("nf4", "fp4")):
            yield f"{name}.quant_state.bitsandbytes__nf4"
    elif info.dtype == "I8" and not {f"{module}SCB", f"{name}_scale"} & tensors.keys():
        yield f"{module}SCB"
    elif info.dtype.startswith("F8") and not {f"{name}_scale", f"{name}_scale_inv"} & tensors.keys():
        yield f"{name}_scale"


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
    if kind == "qwen":
        raise UserError(
            f"{checkpoint.path}: a Qwen (1), which is a Qwen2 under other names",
            f"Make a Qwen2 of it with `qwen2tool convert {checkpoint.path} OUT`, and use that",
        )
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
