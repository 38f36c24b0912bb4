"""Findings as sentences: what is wrong with which tensors, then what to do.

`CODES` is in the order of certainty: what files cannot lie about first, what was inferred from numbers later, what is
not known last. `{which}` are the tensors in words, `{are}` the verb that goes with them, `{detail}` what was found out.
"""

from __future__ import annotations

from collections.abc import Sequence

from qwen2tool.verify.patterns.finding import which

AGAIN = "convert again from the original"
KEEP = "store what the reference has, or take the reference's copy"
CONFIG = "copy config.json from the reference"
BIASES = "bring {them} back with qwen2tool convert --biases-from ORIGINAL"

CODES: dict[str, str] = {
    "other_model": "the candidate is another model, no copy of the reference ({detail}): compare it with the one that "
    "it was made from",
    "config_unusable": f"config.json cannot be used ({{detail}}): {CONFIG}",
    "config_unfit": f"config.json does not fit the tensors ({{detail}}): no reader can load them; {CONFIG}",
    "packing_unsaid": "{which} {are} packed by a quantisation, but what says how to unpack {them} is lost "
    "(config.json's quantization_config, or parts beside the weights): copy all files again from where they came from",
    "tensor_renamed": "{which} {are} there under other names ({detail}): rename {them}, or save the model again "
    "without what wraps it",
    "not_finite": "{which} {hold} NaN or Inf{detail}",
    "reference_not_finite": "the reference's own {which} {hold} NaN or Inf, so nothing can be held against {them}: "
    "copy or download the reference again",
    "adapter_not_finite": "{detail} holds NaN or Inf for {which}, so nothing can be held against it: train or copy it "
    "again",
    "bias_missing": f"{{which}} {{are}} missing, and readers fill in zeros: {BIASES}",
    "bias_ignored": "{which} {are} in the files, but config.json calls the model a Llama without attention_bias, so "
    "readers pass over {them}: set model_type to qwen2, or attention_bias to true",
    "layer_missing": "{which} {are} missing: the model was cut; use all layers of the original",
    "tie_lost": "config.json no longer ties the head to the embedding table, and there is no lm_head.weight, so "
    "readers make up a random head: set tie_word_embeddings to true",
    "tensor_missing": "{which} {are} missing: copy or download the checkpoint again",
    "bias_extra": "{which} {are} not in the reference: they are added to every token; remove them if they are not zero "
    "by mistake",
    "tensor_extra": "{which} {are} not in the reference: use the config.json that belongs to these weights",
    "rope_theta": f"config.json has {{detail}}: positions turn at another speed; {CONFIG}, both spellings",
    "norm_eps": f"config.json has {{detail}}: every norm divides by another number; {CONFIG}",
    "rope_scaling_lost": f"config.json has lost the scaling of RoPE ({{detail}}): long texts break; {CONFIG}",
    "rope_scaling_added": f"config.json scales RoPE ({{detail}}), which changes short texts as well; {CONFIG}",
    "rope_scaling": f"config.json scales RoPE otherwise ({{detail}}): {CONFIG}",
    "sliding_window": f"config.json lets other layers attend through a window ({{detail}}): {CONFIG}",
    "heads_regrouped": f"config.json cuts the same weights into other heads ({{detail}}): {CONFIG}",
    "activation": f"config.json has {{detail}}: the MLP bends elsewhere; {CONFIG}",
    "config": f"config.json has {{detail}}: {CONFIG}",
    "embedding_cut": "{which} {are} cut: {detail}; tokens beyond have no row; take the rows from the reference",
    "embedding_resized": "{which} {are} resized: {detail}; cut the added rows off, or add them to the reference too",
    "kv_heads_repeated": f"{{which}} {{hold}} every head {{detail}} times, as a model without grouped heads: {AGAIN}",
    "weight_transposed": "{which} {are} transposed: store (out, in), as torch's linear layers do",
    "shape": f"{{which}} {{have}} another shape, {{detail}}: {AGAIN}",
    "bias_zero": f"{{which}} {{are}} zero, which is what a load leaves that did not find {{them}}: {BIASES}",
    "norm_zero": f"{{which}} {{are}} zero: {AGAIN}",
    "weight_zero": f"{{which}} {{are}} zero, a hole in the file or a pruned matrix: {AGAIN}",
    "layer_swapped": "layers {detail} have changed places: rename their tensors back",
    "layer_duplicated": "{detail}: a layer was overwritten or copied; take it from the reference",
    "layer_moved": "layers have moved ({detail}): rename their tensors back",
    "bias_swapped": "{which} have changed places{detail}: rename them back",
    "norm_swapped": "{which} have changed places{detail}: rename them back",
    "weight_swapped": "{which} have changed places{detail}: rename them back",
    "bias_misplaced": "{which} {hold} {detail}: a wrong name in the map; rename it back",
    "norm_misplaced": "{which} {hold} {detail}: a wrong name in the map; rename it back",
    "weight_misplaced": "{which} {hold} {detail}: a wrong name in the map; rename it back",
    "head_untied": "the head (lm_head.weight) is no longer the embedding table, as config.json of the reference ties "
    "it: remove it from the files and set tie_word_embeddings to true, unless it was trained apart on purpose",
    "head_tied": "the head is the embedding table, and the reference has a head of its own: bring lm_head.weight back "
    "and set tie_word_embeddings to false",
    "adapter_not_applied": "{detail} is not in the candidate at all: merge it (qwen2tool merge)",
    "adapter_twice": "{which} {hold} {detail} twice: merge once, onto the base and not onto a merged model",
    "adapter_missing": "{which} {lack} {detail}, which other modules have: merge again, with every target module",
    "adapter_scaling": "{which} {hold} {detail}: merge with the scaling of adapter_config.json",
    "entry_changed": "one entry is changed: {detail}; a damaged download or an edit; copy the file again",
    "entry_rounded": "one entry is one unit in the last place off: {detail}; rounded elsewhere, or a damaged "
    "download; copy the file again to be sure",
    "bias_scaled": "{which} {are} {detail} times the reference's: undo the factor",
    "norm_scaled": "{which} {are} {detail} times the reference's: undo the factor",
    "weight_scaled": "{which} {are} {detail} times the reference's: undo the factor",
    "norm_off_by_one": "{which} {are} off by one ({detail}): some architectures store w where others store 1 + w; "
    "Qwen2 multiplies by w itself",
    "bias_shifted": "{which} {are} the reference's {detail} everywhere: undo the shift",
    "norm_shifted": "{which} {are} the reference's {detail} everywhere: undo the shift",
    "weight_shifted": "{which} {are} the reference's {detail} everywhere: undo the shift",
    "bias_permuted": "{which} {hold} the reference's numbers {detail}: give biases the order of transformers' weights",
    "norm_permuted": "{which} {hold} the reference's numbers {detail}: put them back in order",
    "weight_permuted": "{which} {hold} the reference's numbers in another order ({detail}): undo the permutation",
    "rows_changed": f"{{which}} {{differ}} in {{detail}} only: tokens added or rows overwritten; {KEEP}",
    "rounded_weights": "{which} {are} {detail}, and nothing else: store once, in the reference's dtype, from the "
    "original",
    "bias_reinitialised": "{which} {are} new random numbers ({detail}), made by a load that did not find "
    f"{{them}}: {BIASES}",
    "norm_reinitialised": f"{{which}} {{are}} new ({{detail}}): {AGAIN}",
    "weight_reinitialised": f"{{which}} {{are}} new random numbers ({{detail}}): the load did not find them; {AGAIN}",
    "quantised_weights": "{which} {detail}",
    "low_rank_update": "{which} {differ} by an update of low rank, as a merged adapter makes it{detail}: compare with "
    "--adapter, or with the base it was merged onto",
    "arithmetic": "every tensor and config.json agree, yet the logits do not: this machine does not compute the same "
    "twice; run on one thread, or on another device",
    "unknown": "{which} {differ} in a way that is none of the known ones (most: {detail}, relative): {known}",
}
"""Code -> sentence. `docs/zoo.md` shows which planted fault leads to which."""
KNOWN = "trained further, edited, or of another model; find out which tool wrote the candidate"


def sentence(code: str, names: Sequence[str], detail: str, layers: int) -> str:
    """The sentence of `code` for these tensors, with a full stop, and a capital letter unless it begins with a name."""
    many = len(names) > 1
    verbs = {"are": ("is", "are"), "hold": ("holds", "hold"), "have": ("has", "have"), "differ": ("differs", "differ")}
    verbs |= {"lack": ("lacks", "lack"), "them": ("it", "them")}
    words = {verb: forms[many] for verb, forms in verbs.items()}
    detail = DETAILS[code](detail) if code in DETAILS else detail
    text = CODES[code].format(which=which(names, layers), detail=_with_name(code, names, detail), known=KNOWN, **words)
    first = text.split()[0]
    word = first.isalpha() and len(first) > 1 and first not in names  # a tensor's name keeps its letters
    return (text[0].upper() + text[1:] if word else text) + "."


def without_config(text: str) -> str:
    """`text` on a GGUF file, whose metadata are what config.json is to others, and which is not edited but made."""
    for remedy in (f"{CONFIG}, both spellings", CONFIG):
        text = text.replace(remedy, "make the file again from the original")
    return text.replace("config.json", "the GGUF's metadata")


def _with_name(code: str, names: Sequence[str], detail: str) -> str:
    return f"{names[0]}{detail}" if code.startswith("entry_") else detail


def _scaling(detail: str) -> str:
    label, factor, known = detail.split("|")
    return f"{factor} times {label}" + (f" ({known})" if known else "")


def _quantised(detail: str) -> str:
    before, after = detail.split("|")
    if not before:
        return (
            f"went through quantisation ({after}) and back: use the 16-bit original, or compare with a reference "
            "that is quantised alike"
        )
    if not after:
        return f"are unquantised where the reference went through {before}: compare with the 16-bit reference"
    return f"went through {after}, those of the reference through {before}: quantise both alike"


def _swapped(detail: str) -> str:
    layers = detail.partition("|")[2]
    return f" between layers {layers}" if layers else ""


def _low_rank(detail: str) -> str:
    return " (another one than the one named)" if detail else ""


def _not_finite(detail: str) -> str:
    if detail:
        return " where the reference is too large for float16: store bfloat16 or float32"
    return ": copy the file again, or look for what divided by zero"


DETAILS = {
    "not_finite": _not_finite,
    "adapter_scaling": _scaling,
    "quantised_weights": _quantised,
    "low_rank_update": _low_rank,
}
DETAILS |= dict.fromkeys(("bias_swapped", "norm_swapped", "weight_swapped"), _swapped)
