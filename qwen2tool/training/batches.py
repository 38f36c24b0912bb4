"""Samples as padded batches. Padding stands on the right; positions that count nothing carry label -100."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from qwen2tool.data.samples import Sample

IGNORED = -100
"""The label that transformers and torch's cross entropy leave out."""


class SampleDataset(Dataset[Any]):
    """Samples (SFT) or pairs of them (DPO), by position."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def collate_samples(samples: Sequence[Sample], pad_id: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, labels, each (B, T) int64 with T the longest sample, and records (B,)."""
    length = max(len(sample.ids) for sample in samples)
    input_ids = torch.full((len(samples), length), pad_id)
    labels = torch.full((len(samples), length), IGNORED)
    mask = torch.zeros((len(samples), length), dtype=torch.int64)
    for row, sample in enumerate(samples):
        ids, end = torch.tensor(sample.ids), len(sample.ids)
        input_ids[row, :end] = ids
        mask[row, :end] = 1
        labels[row, :end] = torch.where(torch.tensor(sample.scored), ids, IGNORED)
    labels[:, 0] = IGNORED  # nothing predicts the first token, so it must not enter the token count either
    records = torch.tensor([sample.record for sample in samples])
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "records": records}


class SftCollator:
    """(B samples) -> one padded batch."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        return collate_samples(samples, self.pad_id)


class DpoCollator:
    """(B pairs with their reference log-probs) -> chosen and rejected stacked as 2B rows, chosen first.

    `labels` is renamed `targets`: Trainer counts a batch's `labels` to normalise a token loss, which DPO's is not.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, pairs: Sequence[tuple[Sample, Sample, float, float]]) -> dict[str, torch.Tensor]:
        batch = collate_samples([pair[0] for pair in pairs] + [pair[1] for pair in pairs], self.pad_id)
        batch["targets"] = batch.pop("labels")
        batch["records"] = batch["records"][: len(pairs)]
        batch["reference_chosen"] = torch.tensor([pair[2] for pair in pairs])
        batch["reference_rejected"] = torch.tensor([pair[3] for pair in pairs])
        return batch
