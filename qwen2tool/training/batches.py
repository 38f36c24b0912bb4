"""Samples as packed batches: their tokens in one row without padding, and where each of them ends.

Legend: S sequences, N tokens in all, M scored tokens. Positions that count nothing carry the label -100.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch.utils.data import Dataset

from qwen2tool.data.samples import Sample

IGNORED = -100
"""The label that transformers and torch's cross entropy leave out."""


class Packed(TypedDict, total=False):
    """One pass over S sequences.

    Attributes:
        input_ids, positions: (N,) int64.
        offsets: (S + 1,) int32, where each sequence begins and the last one ends.
        longest: tokens of the longest sequence, on the host.
        rows: (M,) int64, the token whose output predicts the scored one.
        labels: (M,) int64, the scored token, IGNORED in rows that only fill up.
        owners: (M,) int64, the sequence it belongs to.
        tokens, scored: how many, without those that only fill up, on the host.
        records: B positions in the data file, on the host.
        reference_chosen, reference_rejected: (S / 2,) fp32, DPO alone.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    offsets: torch.Tensor
    longest: int
    rows: torch.Tensor
    labels: torch.Tensor
    owners: torch.Tensor
    tokens: int
    scored: int
    records: list[int]
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor


class SampleDataset(Dataset[Any]):
    """Samples (SFT) or pairs of them (DPO), by position."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def pack(samples: Sequence[Sample]) -> Packed:
    """The samples behind one another; nothing predicts the first token of a sequence."""
    ids: list[int] = []
    positions: list[int] = []
    offsets, rows, labels, owners = [0], [], [], []
    for owner, sample in enumerate(samples):
        begin = offsets[-1]
        scored = [i for i, counts in enumerate(sample.scored) if counts and i > 0]
        ids += sample.ids
        positions += range(len(sample.ids))
        rows += [begin + i - 1 for i in scored]
        labels += [sample.ids[i] for i in scored]
        owners += [owner] * len(scored)
        offsets.append(begin + len(sample.ids))
    return Packed(
        input_ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        offsets=torch.tensor(offsets, dtype=torch.int32),
        longest=max(len(sample.ids) for sample in samples),
        rows=torch.tensor(rows, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        owners=torch.tensor(owners, dtype=torch.int64),
        records=[sample.record for sample in samples],
    )


def fill_up(batch: Packed, sequences: int) -> Packed:
    """The same batch in one of few shapes, so that a captured graph serves many batches.

    Tokens are filled up to a size of `bucket` with a sequence of their own that nothing scores, scored rows to what
    `rows_for` gives for it with the label IGNORED, and offsets to `sequences` + 2 entries with empty sequences.
    """
    count, scored = len(batch["input_ids"]), len(batch["labels"])
    size = bucket(count)
    room = rows_for(scored, size)
    extra, offsets = size - count, batch["offsets"]
    tail = offsets.new_full((sequences + 2 - len(offsets),), size)
    return batch | Packed(
        input_ids=torch.nn.functional.pad(batch["input_ids"], (0, extra)),
        positions=torch.nn.functional.pad(batch["positions"], (0, extra)),
        offsets=torch.cat([offsets, tail]),
        longest=size,
        rows=torch.nn.functional.pad(batch["rows"], (0, room - scored)),
        labels=torch.nn.functional.pad(batch["labels"], (0, room - scored), value=IGNORED),
        owners=torch.nn.functional.pad(batch["owners"], (0, room - scored)),
    )


def bucket(count: int) -> int:
    """The next of 128, 256, 512, 1024, 2048, 3072, 4096, 6144, ...

    Below 2048 tokens a pass is bound by launches and captures, not by tokens; above, at most half is filled up.
    """
    size = 128
    while size < count:
        size += size // 2 if size >= 2048 and size & (size - 1) == 0 else size if size < 2048 else size // 3
    return size


def rows_for(scored: int, size: int) -> int:
    """`size`, or a quarter of it, or a sixteenth ..., at least 128: the least that holds `scored` rows.

    With sizes of their own they would make more shapes (5.8 instead of 3.6 in 57 batches of 16 instructions), each of
    which costs a warm-up and a capture; in quarters, because most data then stay with one share.
    """
    room = size
    while room // 4 >= max(scored, 128):
        room //= 4
    return room


class SftCollator:
    """(B samples) -> one packed batch.

    Args:
        fill: sequences a batch has at most, to fill batches up to few shapes; None leaves them as they are.
    """

    def __init__(self, fill: int | None = None) -> None:
        self.fill = fill

    def __call__(self, samples: Sequence[Sample]) -> Packed:
        batch = pack(samples)
        batch["tokens"], batch["scored"] = len(batch["input_ids"]), len(batch["labels"])
        return batch if self.fill is None else fill_up(batch, self.fill)


class DpoCollator(SftCollator):
    """(B pairs with their reference log-probs) -> 2 B sequences, the chosen ones first."""

    def __call__(self, pairs: Sequence[tuple[Sample, Sample, float, float]]) -> Packed:  # type: ignore[override]
        batch = super().__call__([pair[0] for pair in pairs] + [pair[1] for pair in pairs])
        batch["records"] = batch["records"][: len(pairs)]
        batch["reference_chosen"] = torch.tensor([pair[2] for pair in pairs])
        batch["reference_rejected"] = torch.tensor([pair[3] for pair in pairs])
        return batch
