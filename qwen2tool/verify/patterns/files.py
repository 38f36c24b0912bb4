"""What config.json and the list of tensors alone give away: sizes, positions, norms, missing and extra tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch

from qwen2tool.checkpoint.names import difference
from qwen2tool.checkpoint.view import AnyTensor, Derived, View, read
from qwen2tool.verify.inventory import HEAD, TABLE, InventoryComparison, in_words, used_tensors
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
PARTS = re.compile(
    r"\.(weight\.(absmax|quant_map|nested_\w+|quant_state\.\w+)|SCB|weight_format|qweight|qzeros|scales|g_idx|weight_packed)$"
)
"""What quantised formats store beside a weight, or instead of it."""
COARSEST = 0.2
"""Relative error beyond which quantisation to 4 bits or more is no explanation (4 bits leave 0.07 to 0.12)."""
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
"""Fields whose change shows in the tensors, which then say more."""


def find_other_model(found: InventoryComparison) -> Iterator[Finding]:
    """Two models of different sizes: whatever else differs says nothing about either."""
    if found.other_width:
        sizes = [name for name in (*SIZES, "num_attention_heads") if name in found.config]
        yield Finding(code="other_model", name="config.json", detail="; ".join(_beside(found, name) for name in sizes))


def _beside(found: InventoryComparison, name: str) -> str:
    """A field of config.json on both sides."""
    mine, theirs = found.config[name]
    return f"{name} {in_words(theirs)}, the reference {in_words(mine)}"


def find_in_config(found: InventoryComparison, fits: bool = True) -> Iterator[Finding]:
    """One finding for each way in which config.json makes another function.

    Args:
        fits: whether the candidate's tensors have the shapes that its config.json asks for.
    """
    if found.unusable:
        yield Finding(code="config_unusable", name="config.json", detail="; ".join(found.unusable))
        return
    shapes_changed = bool(found.misshapen or found.missing or found.extra)
    details: dict[str, list[str]] = {}
    for name, (mine, theirs) in found.config.items():
        code = BY_FIELD.get(name, "config")
        if shapes_changed and (name in SIZES or code == "heads_regrouped"):
            continue
        if not fits and (name in SIZES or code == "heads_regrouped"):
            code = "config_unfit"
        if name == "rope_scaling":
            code = "rope_scaling_lost" if theirs is None else "rope_scaling_added" if mine is None else code
        if name == "max_position_embeddings" and "rope_scaling" in found.config:
            continue
        details.setdefault(code, []).append(_beside(found, name))
    for code, parts in details.items():
        yield Finding(code=code, name="config.json", detail="; ".join(parts))


def find_in_inventory(reference: View, candidate: View, found: InventoryComparison) -> Iterator[Finding]:
    """Missing and extra tensors: whole layers, biases that config.json hides, single ones."""
    stored, config = candidate.origin.tensors, candidate.origin.config
    hidden = config.get("model_type") == "llama" and not config.get("attention_bias")
    used = used_tensors(reference)
    tied = HEAD in used and used[HEAD] is used.get(TABLE)
    total: dict[int, int] = {}
    for placed in filter(None, map(layer_of, used)):
        total[placed[0]] = total.get(placed[0], 0) + 1
    lost: dict[int, int] = {}
    for name, other in found.renamed.items():
        yield Finding(code="tensor_renamed", name=name, detail=difference(name, other))
    packed = unsaid_packing(candidate, found)
    for name in packed:
        yield Finding(code="packing_unsaid", name=name)
    missing = [name for name in found.missing if name not in found.renamed and name not in packed]
    for placed in filter(None, map(layer_of, missing)):
        lost[placed[0]] = lost.get(placed[0], 0) + 1
    gone = {layer for layer, count in lost.items() if count == total[layer]}
    for name in missing:
        layer = layer_of(name)
        if layer and layer[0] in gone:
            yield Finding(code="layer_missing", name=name)
        elif name == HEAD and tied:
            yield Finding(code="tie_lost", name=name)
        elif hidden and name in stored:
            yield Finding(code="bias_ignored", name=name)
        else:
            yield Finding(code="bias_missing" if noun(name) == "bias" else "tensor_missing", name=name)
    parts = tuple(name.removesuffix("weight") for name in packed)
    for name in [n for n in found.extra if n not in found.renamed.values() and not n.startswith(parts)]:
        yield Finding(code="bias_extra" if noun(name) == "bias" else "tensor_extra", name=name)


def unsaid_packing(candidate: View, found: InventoryComparison) -> list[str]:
    """Weights that are packed, by what lies beside them, and that the view has as they are stored."""
    modules = {name.rpartition(".weight.")[0] or name.rpartition(".")[0] for name in filter(PARTS.search, found.extra)}
    whole = [name for name, tensor in candidate.tensors.items() if tensor.dtype == "I8"]
    suspects = (*found.missing, *found.misshapen, *whole)
    return [name for name in suspects if name.endswith(".weight") and name[: -len(".weight")] in modules]


def find_in_shapes(reference: View, candidate: View, found: InventoryComparison) -> Iterator[Finding]:
    """Why a tensor has another shape: a table cut or grown, a matrix transposed, k and v heads repeated."""
    mine, theirs = used_tensors(reference), used_tensors(candidate)
    packed = unsaid_packing(candidate, found)
    for name in [name for name in found.misshapen if name not in packed]:
        code, detail = _shape(name, mine[name], theirs[name])
        yield Finding(code=code, name=name, detail=detail)


def _shape(name: str, mine: AnyTensor, theirs: AnyTensor) -> tuple[str, str]:
    rows, found = mine.shape[0], theirs.shape[0] if theirs.shape else 0
    if name in (TABLE, HEAD) and mine.shape[1:] == theirs.shape[1:]:
        code = "embedding_cut" if found < rows else "embedding_resized"
        return code, f"{found} rows, the reference {rows}; {_common_rows(mine, theirs)}"
    if len(mine.shape) == 2 and theirs.shape == mine.shape[::-1]:
        same = near(read(mine).T.float(), read(theirs).float())
        return (
            ("weight_transposed", "") if same else ("shape", f"{list(theirs.shape)}, the reference {list(mine.shape)}")
        )
    repeatable = mine.shape[1:] == theirs.shape[1:] and found > rows and found % rows == 0
    if repeatable and _repeated(read(mine), read(theirs)):
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
