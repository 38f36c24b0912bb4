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
        real: (S / 2,) bool, DPO alone: no pair that only fills up.
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
    real: torch.Tensor


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


def fill_up(batch: Packed, sequences: int, most: int | None = None) -> Packed:
    """The same batch in one of few shapes, so that a captured graph serves many batches.

    Tokens are filled up with a sequence of their own that nothing scores: to a size of `bucket`, or, where no batch
    has more than `most`, to one of `parts`; scored rows to what `rows_for` gives for it with the label IGNORED, and
    offsets to `sequences` + 2 entries with empty sequences.
    """
    count, scored = len(batch["input_ids"]), len(batch["labels"])
    size = bucket(count) if most is None else min(part for part in parts(most) if part >= count)
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


def parts(most: int) -> list[int]:
    """`most`, its half and its quarter, and on to 1024, below which a pass is bound by launches; 128 at least."""
    sizes = [most]
    while sizes[-1] >= 256 and (len(sizes) < 3 or sizes[-1] >= 2048):
        sizes.append(sizes[-1] // 2)
    return sizes


def rows_for(scored: int, size: int) -> int:
    """`size`, or a quarter of it, or a sixteenth ..., at least 128: the least that holds `scored` rows.

    With sizes of their own they would make more shapes (5.8 instead of 3.6 in 57 batches of 16 instructions), each of
    which costs a warm-up and a capture; in quarters, because most data then stay with one share.
    """
    room = size
    while room // 4 >= max(scored, 128):
        room //= 4
    return room


def cut(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Positions of `sizes` in groups of at most `most` together: each, from the largest, into the first with room.

    Groups and what they hold keep the order of the positions.

    Raises:
        ValueError: one is larger than `most`.
    """
    if max(sizes) > most:
        raise ValueError(f"a record of {max(sizes)} tokens in passes of at most {most}")
    groups: list[list[int]] = []
    rooms: list[int] = []
    for position in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        group = next((number for number, room in enumerate(rooms) if room >= sizes[position]), len(groups))
        if group == len(groups):
            groups.append([])
            rooms.append(most)
        groups[group].append(position)
        rooms[group] -= sizes[position]
    return sorted(map(sorted, groups))


class SftCollator:
    """(B samples) -> the passes over them, packed.

    Args:
        fill: sequences there are at most, to fill passes up to few shapes; None leaves them as they are.
        most: tokens of a pass; None makes one pass of them all.
    """

    def __init__(self, fill: int | None = None, most: int | None = None) -> None:
        self.fill, self.most = fill, most

    def __call__(self, items: Sequence[Any]) -> list[Packed]:
        groups = [list(range(len(items)))]
        if self.most is not None:
            groups = cut([sum(len(sample.ids) for sample in self.samples(item)) for item in items], self.most)
        return [self.one_pass([items[position] for position in group]) for group in groups]

    def samples(self, item: Any) -> Sequence[Sample]:
        """The sequences of one item."""
        return (item,)

    def one_pass(self, items: Sequence[Any]) -> Packed:
        """All of them in one."""
        return self.packed(items)

    def packed(self, samples: Sequence[Sample]) -> Packed:
        """Samples behind one another, filled up where that is asked for."""
        batch = pack(samples)
        batch["tokens"], batch["scored"] = len(batch["input_ids"]), len(batch["labels"])
        return batch if self.fill is None else fill_up(batch, self.fill, self.most)


class DpoCollator(SftCollator):
    """(B pairs with their reference log-probs) -> passes of two sequences a pair, the chosen ones first."""

    def samples(self, item: Any) -> Sequence[Sample]:
        """Chosen and rejected, which stay together."""
        return (item[0], item[1])

    def one_pass(self, items: Sequence[tuple[Sample, Sample, float, float]]) -> Packed:
        """All of them in one, with what the reference says."""
        batch = self.packed([pair[0] for pair in items] + [pair[1] for pair in items])
        batch["records"] = batch["records"][: len(items)]
        extra = self.fill // 2 - len(items) if self.fill is not None else 0
        batch["owners"] = batch["owners"] + extra * (batch["owners"] >= len(items))  # rejected ones behind the filling
        batch["reference_chosen"] = torch.tensor([pair[2] for pair in items] + [0.0] * extra)
        batch["reference_rejected"] = torch.tensor([pair[3] for pair in items] + [0.0] * extra)
        batch["real"] = torch.arange(len(items) + extra) < len(items)
        return batch
