"""Traces that rounding and quantisation leave in numbers: which format a tensor has been through.

A value that went through bf16 has a bf16's digits, whatever it is stored as since. A block that went through a 4-bit
format holds at most sixteen values, all of them its largest one times a fixed grid. Both can be read off the numbers.

NF4's sixteen levels are quantiles of a normal distribution (Dettmers et al. 2023, arXiv 2305.14314, appendix E); the
block's largest magnitude is a level, so that dividing by it puts the block on the grid. A smaller block size than the
true one does not (its largest value is some other level), so the largest that fits is the true one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0052083, 0.1666667, 0.25, 0.3333333, 0.5, 0.6666667, 1.0)
GRIDS: dict[str, tuple[float, ...]] = {
    "NF4": NF4,
    "FP4": tuple(sorted({sign * level for level in _FP4 for sign in (1, -1)})),
    "4-bit integers": tuple(k / 8 for k in range(-8, 9)),
    "8-bit integers": tuple(k / 127 for k in range(-127, 128)),
}
BLOCKS = (4096, 2048, 1024, 512, 256, 128, 64, 32)
SAMPLE = 1 << 16
SLACK = {torch.bfloat16: 2.1 * 2.0**-8, torch.float16: 2.1 * 2.0**-11}
"""Of a value: its own rounding and that of the block's largest, both to half a unit in the last place."""
FINEST = 1e-5
"""What absmax itself may be off by where values are fp32: it was a product of fp32 numbers."""
MOSTLY = 0.999
FEW = 2048
"""Entries that are looked at first."""


def sample_blocks(tensor: torch.Tensor, count: int = SAMPLE) -> torch.Tensor:
    """The first entries of a contiguous tensor, flat: a multiple of the largest block that fits."""
    flat = tensor.reshape(-1)
    size = min(count, flat.numel())
    return flat[: size - size % BLOCKS[-1]]


def find_grid(values: torch.Tensor, width: int) -> str | None:
    """The quantisation that `values` (flat, their own dtype) have been through, or None.

    Args:
        width: of a row: formats with a scale a row, as LLM.int8 has, are blocks of this size.
    """
    slack = SLACK.get(values.dtype, FINEST)
    x = values.double()
    if not bool(x.isfinite().all()) or not x.any():
        return None
    for grid, levels in GRIDS.items():
        lattice = torch.tensor(levels, dtype=torch.float64)
        for block in sorted({*BLOCKS, width}, reverse=True):
            if len(x) < block:
                continue
            blocks = x[: len(x) - len(x) % block].view(-1, block)
            few = blocks[: max(1, FEW // block)]  # most grids are ruled out by them
            if _fits(few, lattice, slack) and _fits(blocks, lattice, slack):
                a_row = block == width and (block not in BLOCKS or grid.startswith("8-bit"))
                where = "with a scale a row" if a_row else f"in blocks of {block}"
                return f"{grid} {where}"
    return _few_levels(x)


def _fits(blocks: torch.Tensor, lattice: torch.Tensor, slack: float) -> bool:
    """Whether (N, block) lies on the lattice, block by block, scaled by the block's largest magnitude."""
    scaled = blocks / blocks.abs().amax(1, keepdim=True).clamp(min=1e-300)
    upper = torch.searchsorted(lattice, scaled).clamp(1, len(lattice) - 1)
    distance = torch.minimum((scaled - lattice[upper - 1]).abs(), (scaled - lattice[upper]).abs())
    return bool((distance <= slack * scaled.abs() + 1e-6).double().mean() >= MOSTLY)


def _few_levels(x: torch.Tensor) -> str | None:
    """Formats with an offset a block (GGUF's K-quants, GPTQ, AWQ): no lattice through 0, but few different values."""
    for block, most, words in ((32, 16, "4 bits or fewer"), (256, 64, "5 or 6 bits")):
        if len(x) < block * 16:
            continue
        ordered = x[: len(x) - len(x) % block].view(-1, block).sort(1).values
        distinct = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)
        if bool((distinct <= most).double().mean() >= MOSTLY) and bool((distinct > 1).any()):
            return f"{words} a value (at most {most} different values in each {block})"
    return None


def _truncated(x: torch.Tensor) -> torch.Tensor:
    """The upper 16 bits of a float32: bf16 without rounding."""
    return (x.view(torch.int32) & -65536).view(torch.float32)


ROUNDINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rounded to bfloat16": lambda x: x.bfloat16().float(),
    "rounded to float16": lambda x: x.half().float(),
    "rounded twice, to bfloat16 and then to float16": lambda x: x.bfloat16().half().float(),
    "rounded twice, to float16 and then to bfloat16": lambda x: x.half().bfloat16().float(),
    "cut to bfloat16 instead of rounded": _truncated,
    "rounded to float8 (e4m3)": lambda x: x.to(torch.float8_e4m3fn).float(),
    "rounded to float8 (e5m2)": lambda x: x.to(torch.float8_e5m2).float(),
}


def find_roundings(reference: torch.Tensor, candidate: torch.Tensor) -> list[str]:
    """The ways of rounding, simplest first, that make every entry of `candidate` of `reference` (both flat).

    Several may: what fits a float16's range is the same by way of bfloat16 or not. Of a whole checkpoint, the way that
    fits all tensors is the one that was taken.
    """
    mine, theirs = reference.float().contiguous(), candidate.float().contiguous()
    found = [words for words, rounded in ROUNDINGS.items() if torch.equal(rounded(mine), theirs)]
    if found:
        return found
    once = ROUNDINGS["rounded to bfloat16"]
    near = bool(((mine - theirs).abs() <= 2.0**-7 * mine.abs()).all())
    coarse = torch.equal(once(theirs), theirs) and not torch.equal(once(mine), mine)
    return ["rounded to bfloat16 more than once"] if near and coarse else []
