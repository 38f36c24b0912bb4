"""Whether two matrices differ by an update of low rank, as an adapter makes it.

The difference E of a LoRA merge has rank r << min(m, n), plus rounding. A random sketch of E (Halko, Martinsson and
Tropp 2011, arXiv 0909.4061) finds its range in two products with a thin matrix, whatever the size of E.
"""

from __future__ import annotations

import torch

MOST_RANK = 64
OVERSAMPLING = 8
MOST_ENTRIES = 1 << 26
"""Of a larger matrix the first rows are looked at: any rows of a matrix of low rank have low rank."""
SHARE = 0.9
"""Of the squared difference, which the update has to be; the rest is the rounding of the sum."""
OF_FULL = 0.5
"""Of the full rank, below which a rank is low."""


def find_rank(reference: torch.Tensor, candidate: torch.Tensor) -> int | None:
    """The rank that holds `SHARE` of the squared difference, None if it is not low (or larger than `MOST_RANK`)."""
    most_rows = max(1, MOST_ENTRIES // reference.shape[1])
    error = candidate[:most_rows].float() - reference[:most_rows].float()
    most = min(MOST_RANK, int(OF_FULL * min(error.shape)))
    total = float(error.double().square().sum())
    if not 0 < total < float("inf") or most < 1:
        return None
    generator = torch.Generator().manual_seed(0)
    sketch = error @ torch.randn(error.shape[1], min(most + OVERSAMPLING, *error.shape), generator=generator)
    basis = torch.linalg.qr(error @ (error.T @ sketch))[0]  # one power iteration: rounding noise has a flat spectrum
    energy = torch.linalg.svdvals(basis.T @ error).double().square().cumsum(0) / total
    rank = int((energy < SHARE).sum()) + 1
    # A sketch of k columns catches k / n of noise without structure; low rank has to beat that by far.
    return rank if rank <= min(most // 2, len(energy)) and energy[-1] >= SHARE else None
