"""What has to be known beside the figures: conditions of the run, and what no figure shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite

from qwen2tool.checkpoint.adapter import ADAPTER_CONFIG, fingerprint
from qwen2tool.checkpoint.config_faults import other_class
from qwen2tool.checkpoint.geometry import expected_tensors, rope_disagreement
from qwen2tool.checkpoint.side_files import side_sections
from qwen2tool.checkpoint.tokens import Vocabulary, read_vocabulary
from qwen2tool.checkpoint.tolerate import Damaged
from qwen2tool.checkpoint.view import View
from qwen2tool.errors import UserError
from qwen2tool.verify.inventory import InventoryComparison
from qwen2tool.verify.sides import Sides
from qwen2tool.verify.statistics import LogitFigures


def notes_on(
    sides: Sides,
    inventory: InventoryComparison,
    floors: Mapping[str, LogitFigures],
    hindrance: str | None,
    running: str,
    adapter_on: str,
) -> list[str]:
    """What a reader of the figures has to know beside them.

    Args:
        floors: the reference's own noise, by run.
        hindrance: why layers and logits were not compared.
        running: the dtype that the model is meant to run in.
    """
    mine, theirs = sides.stored, sides.candidate.view
    notes = [f"{view.path}: {view.lossy}" for view in (mine, theirs) if view.lossy]
    if hindrance is not None:
        notes.append(f"layers and logits not compared: {hindrance}")
    elif any(name.endswith(".bias") and name in expected_tensors(theirs.geometry) for name in inventory.missing):
        notes.append("the candidate ran with zeros for its missing biases, exactly as transformers loads it")
    if any(not floor.finite and isfinite(floor.nll_reference) for floor in floors.values()):
        notes.append(f"the reference in {running} predicts NaN or Inf on this text; in float32 it does not")
    stored = None
    for adapter in sides.reference.adapters:
        stored = stored or fingerprint(mine.origin)
        if adapter.base_fingerprint not in (None, stored):
            notes.append(f"the adapter {adapter.path} was trained on another base than {mine.path}")
    if theirs.origin.config.get("model_type") == "llama" and not theirs.origin.config.get("attention_bias"):
        notes.append("the candidate's config.json says llama without attention_bias: readers drop its biases, if any")
    if sides.reference.adapters and adapter_on == "nf4":
        notes.append("tensors are held against the 16-bit base + adapter, logits against the adapter on the NF4 base")
    if (disagreement := rope_disagreement(theirs.origin.config)) and not rope_disagreement(mine.origin.config):
        notes.append(f"config.json of the candidate: {disagreement}")
    notes += [f"config.json of the candidate: {wrong}"] if (wrong := other_class(theirs.origin.config)) else []
    notes += _on_side_files(mine, theirs)
    notes += [
        f"{view.path}: an {ADAPTER_CONFIG} lies beside the weights; transformers adds that adapter when it loads the "
        "folder, the comparison did not"
        for view in (mine, theirs)
        if view.origin.path.is_dir() and (view.origin.path / ADAPTER_CONFIG).is_file()
    ]
    if hindrance is None and mine.geometry.tie_word_embeddings != theirs.geometry.tie_word_embeddings:
        notes.append("tie_word_embeddings differs; the heads were compared by what they hold")
    return notes


def _on_side_files(mine: View, theirs: View) -> Iterator[str]:
    """Ids mean tokens: two equal functions answer differently behind two tokenizers, and behind none not at all."""
    for view in (mine, theirs):
        damaged: Damaged = {}
        side_sections(view.origin, damaged)
        for name, why in damaged.items():
            yield f"{view.path}: {name} is damaged ({why})"
    one, other = _vocabulary(mine), _vocabulary(theirs)
    if one is None or other is None or one.ids == other.ids:
        return
    moved = [token for token, index in one.ids.items() if other.ids.get(token) != index]
    moved += [token for token in other.ids if token not in one.ids]
    yield (
        f"the tokenizers differ: {len(moved)} token{'s' * (len(moved) > 1)} with another id or none, the first is "
        f"{ascii(moved[0])[:40]}; the text was read with the reference's"
    )


def _vocabulary(view: View) -> Vocabulary | None:
    """Of a folder; a damaged one is noted already."""
    if view.origin.format == "gguf":
        return None
    try:
        return read_vocabulary(view.origin.folder)
    except UserError:
        return None
