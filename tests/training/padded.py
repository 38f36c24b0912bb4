"""Samples as a padded batch of transformers' own kind, for comparisons with its losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qwen2tool.data.samples import Sample


def padded_batch(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, labels, each (B, T); padding on the right, labels -100 where nothing is scored."""
    length = max(len(sample.ids) for sample in samples)
    rows = [
        (
            [*s.ids, *[0] * (length - len(s.ids))],
            [1] * len(s.ids) + [0] * (length - len(s.ids)),
            [i if c else -100 for i, c in zip(s.ids, s.scored, strict=True)] + [-100] * (length - len(s.ids)),
        )
        for s in samples
    ]
    names = ("input_ids", "attention_mask", "labels")
    return {name: torch.tensor(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
