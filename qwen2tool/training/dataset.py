"""The records of a run, tokenised once, each with the place it came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2tool.data.encode import encode_conversation, encode_preference, require_targets
from qwen2tool.data.records import read_conversations, read_preferences
from qwen2tool.data.samples import Sample
from qwen2tool.errors import UserError
from qwen2tool.training.settings import TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Records:
    """Samples (SFT) or pairs of them (DPO); `places[sample.record]` names a record of the file.

    `skipped` were left out because nothing of their answer fits, `cut` lost a part of it.
    """

    items: list[Any]
    places: list[str]
    skipped: int
    cut: int


def read_records(tokenizer: PreTrainedTokenizerBase, file: Path, settings: TrainSettings) -> Records:
    """Reads and tokenises `file` as the task of `settings` asks.

    Raises:
        UserError: malformed data, or a record without a token that carries loss (unless `skip_too_long`).
    """
    items: list[tuple[Sample, ...]]
    if settings.task == "sft":
        conversations = read_conversations(file)
        places = [conversation.where for conversation in conversations]
        items = [
            (encode_conversation(tokenizer, conversation, n, settings.max_length),)
            for n, conversation in enumerate(conversations)
        ]
    else:
        preferences = read_preferences(file)
        places = [preference.where for preference in preferences]
        items = [encode_preference(tokenizer, p, n, settings.max_length) for n, p in enumerate(preferences)]
    kept = [item for item in items if all(any(sample.scored[1:]) for sample in item)]
    if not settings.skip_too_long:
        require_targets((sample for item in items for sample in item), places, settings.max_length)
    if not kept:
        raise UserError(f"{file}: no record's answer fits into max_length {settings.max_length}", "Raise --max-length")
    cut = sum(any(len(sample.ids) == settings.max_length for sample in item) for item in kept)
    flat = [item[0] for item in kept] if settings.task == "sft" else kept
    return Records(items=list(flat), places=places, skipped=len(items) - len(kept), cut=cut)
