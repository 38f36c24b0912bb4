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


TOO_LONG = "Raise --max-length, or pass --skip-too-long to leave such records out"


@dataclass(frozen=True, kw_only=True)
class Records:
    """Samples (SFT) or pairs of them (DPO); `places[sample.record]` names a record of the file.

    `skipped` were left out because nothing of their answer fits, `cut` lost a part of it.
    """

    items: list[Any]
    places: list[str]
    skipped: int
    cut: int


def as_samples(item: Any) -> tuple[Sample, ...]:
    """The sequences of one item: a sample is one, a pair two."""
    return item if isinstance(item, tuple) else (item,)


def read_records(tokenizer: PreTrainedTokenizerBase, file: Path, settings: TrainSettings) -> Records:
    """Reads and tokenises `file` as the task of `settings` asks.

    Raises:
        UserError: malformed data, or a record without a token that carries loss (unless `skip_too_long`).
    """
    length = settings.max_length
    encoded, places = _encode(tokenizer, file, settings.task, length + 1)  # one more shows what is cut
    items = [tuple(sample.shortened(length) for sample in item) for item in encoded]
    if not settings.skip_too_long:
        require_targets((sample for item in items for sample in item), places, length)
    # A pair whose answers differ only behind the cut prefers nothing: its loss is ln 2 and its gradient zero for ever.
    fits = [all(any(s.scored[1:]) for s in item) and len({s.ids for s in item}) == len(item) for item in items]
    if not all(fits) and not settings.skip_too_long:
        where = places[items[fits.index(False)][0].record]
        raise UserError(f"{where}: chosen and rejected are the same up to max_length {length}", TOO_LONG)
    if not any(fits):
        raise UserError(f"{file}: no record's answer fits into max_length {length}", "Raise --max-length")
    cut = sum(fit and any(len(sample.ids) > length for sample in item) for fit, item in zip(fits, encoded, strict=True))
    kept = [item if settings.task == "dpo" else item[0] for fit, item in zip(fits, items, strict=True) if fit]
    return Records(items=kept, places=places, skipped=fits.count(False), cut=cut)


def _encode(
    tokenizer: PreTrainedTokenizerBase, file: Path, task: str, length: int
) -> tuple[list[tuple[Sample, ...]], list[str]]:
    """(one sample a record for SFT, chosen and rejected for DPO; where each record stands)."""
    if task == "sft":
        conversations = read_conversations(file)
        samples = [(encode_conversation(tokenizer, c, n, length),) for n, c in enumerate(conversations)]
        return list(samples), [conversation.where for conversation in conversations]
    preferences = read_preferences(file)
    pairs = [encode_preference(tokenizer, p, n, length) for n, p in enumerate(preferences)]
    return list(pairs), [preference.where for preference in preferences]
