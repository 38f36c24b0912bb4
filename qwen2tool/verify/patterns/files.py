"""What config.json and the list of tensors alone give away: sizes, positions, norms, missing and extra tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from qwen2tool.checkpoint.view import AnyTensor, Derived, View, read
from qwen2tool.console import format_ranges
from qwen2tool.verify.inventory import HEAD, TABLE, InventoryComparison, used_tensors
from qwen2tool.verify.patterns.finding import Finding, layer_of, noun
from qwen2tool.verify.patterns.orders import near
from qwen2tool.verify.tensors import TensorComparison

BY_FIELD = {
    "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_eps",
    "rope_scaling": "rope_scaling",
    "max_position_embeddings": "rope_scaling",
    "sliding_window": "sliding_window",
    "sliding_layers": "sliding_window",
    "num_attention_heads": "heads_regrouped",
    "num_key_value_heads": "heads_regrouped",
    "head_dim": "heads_regrouped",
    "hidden_act": "activation",
}
PLAIN = ("F64", "F32", "F16", "BF16")
PACKED = {"U8": "bitsandbytes' 4 bits", "I8": "bitsandbytes' 8 bits"}
COARSEST = 0.2
"""Relative error beyond which quantisation to 4 bits or more is no explanation (4 bits leave 0.07 to 0.12)."""
SIZES = ("vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size")
"""Fields whose change shows in the tensors, which then say more."""


def find_in_config(found: InventoryComparison) -> Iterator[Finding]:
    """One finding for each way in which config.json makes another function."""
    shapes_changed = bool(found.misshapen or found.missing or found.extra)
    details: dict[str, list[str]] = {}
    for name, (mine, theirs) in found.config.items():
        code = BY_FIELD.get(name, "config")
        if shapes_changed and (name in SIZES or code == "heads_regrouped"):
            continue
        if name == "rope_scaling":
            code = "rope_scaling_lost" if theirs is None else "rope_scaling_added" if mine is None else code
        if name == "max_position_embeddings" and "rope_scaling" in found.config:
            continue
        details.setdefault(code, []).append(f"{name} {_short(theirs)}, the reference {_short(mine)}")
    for code, parts in details.items():
        yield Finding(code=code, name="config.json", detail="; ".join(parts))


def _short(value: object) -> str:
    """A value of config.json in words."""
    if value in (None, ()):
        return "none"
    if isinstance(value, dict):
        return " ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, tuple):
        return format_ranges(value)
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def find_in_inventory(reference: View, candidate: View, found: InventoryComparison) -> Iterator[Finding]:
    """Missing and extra tensors: whole layers, biases that config.json hides, single ones."""
    stored, config = candidate.origin.tensors, candidate.origin.config
    hidden = config.get("model_type") == "llama" and not config.get("attention_bias")
    total: dict[int, int] = {}
    for placed in filter(None, map(layer_of, used_tensors(reference))):
        total[placed[0]] = total.get(placed[0], 0) + 1
    lost: dict[int, int] = {}
    for placed in filter(None, map(layer_of, found.missing)):
        lost[placed[0]] = lost.get(placed[0], 0) + 1
    gone = {layer for layer, count in lost.items() if count == total[layer]}
    for name in found.missing:
        layer = layer_of(name)
        if layer and layer[0] in gone:
            yield Finding(code="layer_missing", name=name)
        elif hidden and name in stored:
            yield Finding(code="bias_ignored", name=name)
        else:
            yield Finding(code="bias_missing" if noun(name) == "bias" else "tensor_missing", name=name)
    for name in found.extra:
        yield Finding(code="bias_extra" if noun(name) == "bias" else "tensor_extra", name=name)


def find_in_shapes(reference: View, candidate: View, found: InventoryComparison) -> Iterator[Finding]:
    """Why a tensor has another shape: a table cut or grown, a matrix transposed, k and v heads repeated."""
    mine, theirs = used_tensors(reference), used_tensors(candidate)
    for name in found.misshapen:
        code, detail = _shape(name, mine[name], theirs[name])
        yield Finding(code=code, name=name, detail=detail)


def _shape(name: str, mine: AnyTensor, theirs: AnyTensor) -> tuple[str, str]:
    rows, found = mine.shape[0], theirs.shape[0]
    if name in (TABLE, HEAD) and mine.shape[1:] == theirs.shape[1:]:
        code = "embedding_cut" if found < rows else "embedding_resized"
        return code, f"{found} rows, the reference {rows}; {_common_rows(mine, theirs)}"
    if len(mine.shape) == 2 and theirs.shape == mine.shape[::-1]:
        same = near(read(mine).T.float(), read(theirs).float())
        return (
            ("weight_transposed", "") if same else ("shape", f"{list(theirs.shape)}, the reference {list(mine.shape)}")
        )
    if found > rows and found % rows == 0 and _repeated(read(mine), read(theirs)):
        return "kv_heads_repeated", f"{found // rows}"
    return "shape", f"{list(theirs.shape)}, the reference {list(mine.shape)}"


def _common_rows(mine: AnyTensor, theirs: AnyTensor) -> str:
    common = min(mine.shape[0], theirs.shape[0])
    one, other = read(mine)[:common], read(theirs)[:common]
    different = int((one != other).any(1).sum())
    return f"the first {common} are the same" if not different else f"of the first {common}, {different} differ"


def _repeated(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether whole heads of the reference are repeated; the size of a head is found by trying."""
    times = len(theirs) // len(mine)
    for size in range(2, len(mine) + 1, 2):
        if len(mine) % size == 0:
            heads = mine.view(len(mine) // size, size, -1).repeat_interleave(times, 0).view(theirs.shape)
            if near(heads.float(), theirs.float()):
                return True
    return False


def stored_as(tensor: AnyTensor) -> str:
    """The quantised format that a view's tensor is read from, in words; "" for plain numbers."""
    sources = tensor.sources if isinstance(tensor, Derived) else ()
    kinds = [source.dtype for source in sources if source.dtype not in PLAIN]
    if not kinds:
        return ""
    return PACKED.get(kinds[0], f"GGUF's {kinds[0]}")


def find_in_storage(
    pairs: Mapping[str, tuple[AnyTensor, AnyTensor]], differing: Mapping[str, TensorComparison]
) -> Iterator[Finding]:
    """Tensors that one side stores quantised and that differ by no more than that explains."""
    for name, (mine, theirs) in pairs.items():
        before, after = stored_as(mine), stored_as(theirs)
        if before != after and differing[name].relative_error < COARSEST:
            yield Finding(code="quantised_weights", name=name, detail=f"{before}|{after}")


def find_split_head(reference: View, candidate: View, differing: Mapping[str, TensorComparison]) -> Iterator[Finding]:
    """A head that was the table in the reference and is something else in the candidate.

    A GGUF file may store the one table twice, rounded in two ways: that is quantisation.
    """
    mine, theirs = used_tensors(reference), used_tensors(candidate)
    if HEAD in differing and HEAD in theirs and stored_as(theirs[HEAD]) and differing[HEAD].relative_error < COARSEST:
        return
    if HEAD not in differing or TABLE not in mine or TABLE not in theirs or HEAD not in theirs:
        return
    tied = mine.get(HEAD) is mine[TABLE] or (HEAD in reference.tensors and reference.geometry.tie_word_embeddings)
    if tied and theirs[HEAD] is not theirs[TABLE]:
        yield Finding(code="head_untied", name=HEAD)
    elif not tied and theirs[HEAD] is theirs[TABLE]:
        yield Finding(code="head_tied", name=HEAD)
