"""Dropout masks as bits, drawn by counter: an independent mask for each of P projections, replayable from its seed.

A mask need not be stored between forward and backward: (seed, stream, projection, position) decides every element, so
the backward, or a recomputed forward, draws it again. PEFT drops the input of each LoRA projection on its own; so do
these.

    bits: (P, N, ceil(K/8)) uint8; bit j of byte b of a row says whether column 8 b + j is kept.
    r = Philox4x32-7(counter = (low and high half of the byte's index in its mask, projection, stream), key = seed)
    kept where its 16 bits of r are below round((1 - p) 65536)

One Philox call gives 128 bits: 16 for each of the 8 elements of a byte, the low half of a word before its high half.
With 16 bits p is met within 7.6e-6. Seven rounds are the fewest that pass BigCrush (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"). Bits past column K are drawn like all others and read by nobody.

Cost: 1/8 byte written an element, where a float mask takes 2 to 4, and about 10 integer instructions: 100 million
elements (8192 tokens, 4096 columns, q, k and v) are 1 G instructions, some 40 us of an H100.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwen2tool.kernels.backend import require, runs_triton

ROUNDS = 7
LEVELS = 1 << 16
"""Values that an element's 16 random bits take."""
WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
"""Philox4x32's constants, from the paper."""


def philox_reference(
    counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...], rounds: int
) -> list[torch.Tensor]:
    """Philox4x32 in int64 arithmetic: four counter words and two key words (each 0 to 2**32 - 1) to four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The product of two 32-bit words wraps in int64, but its 64 bits are right: the mask takes the sign off.
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = (second >> 32) & WORD ^ c1 ^ k0, second & WORD
        c2, c3 = (first >> 32) & WORD ^ c3 ^ k1, first & WORD
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return [c0, c1, c2, c3]


def keep_bits_reference(seed: torch.Tensor, stream: int, threshold: int, out: torch.Tensor) -> None:
    """Fills `out` (P, N, ceil(K/8)) in plain PyTorch: the definition of the op."""
    masks = out.shape[0]
    index = torch.arange(out[0].numel(), device=out.device)[None, :].expand(masks, -1)
    projection = torch.arange(masks, device=out.device)[:, None].expand_as(index)
    counter = (index & WORD, index >> 32, projection, torch.full_like(index, stream))
    words = philox_reference(counter, (seed & WORD, (seed >> 32) & WORD), ROUNDS)
    byte = torch.zeros_like(index)
    for place, word in enumerate(words):
        byte |= ((word & (LEVELS - 1)) < threshold).long() << (2 * place)
        byte |= ((word >> 16) < threshold).long() << (2 * place + 1)
    out.copy_(byte.view_as(out))


def unpack_bits(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """(P, N, ceil(K/8)) uint8 -> (P, N, K) bool, True where kept."""
    places = torch.arange(8, device=bits.device)
    return ((bits[..., None] >> places) & 1).flatten(-2)[..., :columns].bool()


@triton.jit  # type: ignore[untyped-decorator]
def _pair(word: tl.tensor, threshold: tl.tensor, PLACE: tl.constexpr) -> tl.tensor:
    """The bits of the two elements that one random word decides, at PLACE and PLACE + 1."""
    low = ((word & 0xFFFF).to(tl.int32) < threshold).to(tl.int32)
    high = ((word >> 16).to(tl.int32) < threshold).to(tl.int32)
    return (low << PLACE) | (high << (PLACE + 1))


@triton.jit(do_not_specialize=["stream", "threshold"])  # type: ignore[untyped-decorator]
def _keep_bits_kernel(
    seed: tl.tensor,
    stream: tl.tensor,
    threshold: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    N_ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    projection = tl.program_id(1)
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), low, high, projection, stream, N_ROUNDS)
    byte = _pair(w0, threshold, 0) | _pair(w1, threshold, 2) | _pair(w2, threshold, 4) | _pair(w3, threshold, 6)
    tl.store(out + projection.to(tl.int64) * size + index, byte.to(tl.uint8), mask=index < size)


def keep_bits(
    seed: torch.Tensor,
    stream: int,
    p: float,
    rows: int,
    columns: int,
    masks: int,
    *,
    device: torch.device | str,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draws `masks` independent masks of (rows, columns), the same for the same (seed, stream).

    Args:
        seed: () int64 on `device`: a tensor, so that a captured graph draws new masks each time it is replayed.
        stream: 0 to 2**31 - 1; different streams are independent (one for each place of the network).
        p: probability of dropping an element, 0 <= p < 1.
        out: (masks, rows, ceil(columns / 8)) uint8, contiguous, to write to.

    Returns:
        (masks, rows, ceil(columns / 8)) uint8; bit j of byte b says whether column 8 b + j is kept.

    Raises:
        ValueError: if an argument is out of range, or `seed` or `out` does not fit.
    """
    shape = (masks, rows, -(-columns // 8))
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=device)
    _check(seed, stream, p, shape, out)
    threshold = round((1 - p) * LEVELS)
    if not out.numel():
        return out
    if not runs_triton(out):
        keep_bits_reference(seed, stream, threshold, out)
        return out
    size = out[0].numel()
    # 8 bytes to a thread: eight independent Philox chains hide the latency of the multiplications, one 8-byte store.
    block = 1024
    _keep_bits_kernel[(triton.cdiv(size, block), masks)](
        seed, stream, threshold, out, size, N_ROUNDS=ROUNDS, BLOCK=block, num_warps=4
    )
    return out


def _check(seed: torch.Tensor, stream: int, p: float, shape: tuple[int, int, int], out: torch.Tensor) -> None:
    require(0 <= p < 1, "keep_bits", f"p is {p}; it must be at least 0 and below 1")
    require(0 <= stream < 2**31, "keep_bits", f"stream is {stream}; it must be 0 to 2**31 - 1")
    one = seed.dtype == torch.int64 and seed.dim() == 0
    require(one, "keep_bits", f"seed is {seed.dtype} of shape {tuple(seed.shape)}; it must be one int64")
    require(seed.device == out.device, "keep_bits", f"seed is on {seed.device}, the bits on {out.device}")
    fits = out.shape == shape and out.dtype == torch.uint8 and out.is_contiguous()
    require(fits, "keep_bits", f"out is {out.dtype} {tuple(out.shape)}; it must be contiguous uint8 {shape}")
