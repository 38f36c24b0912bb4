"""Batches without their padding: what is kept, and who may see whom, against transformers' own masks."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices

from qwen2tool.routing.sequences import flatten
from qwen2tool.routing.stack import block_mask
from tests.routing.models import padding
from tests.tiny import tiny_config

CPU = torch.device("cpu")
T = 17


def holes():
    """Padding left, right and between; a row of one token; a row without any."""
    mask = padding("left", 5, T)
    mask[0, [4, 9, 10, 16]] = 0
    mask[2] = 0
    mask[2, 8] = 1
    mask[3] = 0
    return mask


def ranges(*lengths):
    return torch.cat([torch.arange(n) for n in lengths])


MASKS = {
    "left": padding("left"),
    "right": padding("right"),
    "holes": holes(),
    "all kept": torch.ones(3, T, dtype=torch.int64),
    "bool": padding("left").bool(),
    "float": padding("right").float(),
    "nothing kept": torch.zeros(2, T, dtype=torch.int64),
}
POSITIONS = {
    "one sequence a row": torch.arange(T).expand(3, -1),
    "one row for all": torch.arange(T)[None],
    "from 5 on": torch.arange(T)[None] + 5,
    "packed": ranges(5, 1, 11)[None],
    "packed, each row its own way": torch.stack([ranges(5, 1, 11), ranges(T), ranges(1, 1, 15)]),
    "packed, one row for all": ranges(9, 8)[None],
    "a position twice": torch.tensor([[*range(8), *range(7, 16)]]),
    "a gap": torch.tensor([[*range(8), *range(9, 18)]]),
    "backwards": torch.arange(T).flip(0)[None],
}


def rows_of(tensor, rows=None):
    """The rows of the batch that `tensor` belongs to: one row of positions may serve three."""
    return rows or (3 if len(tensor) == 1 else len(tensor))


def transformers_mask(rows, mask, positions):
    """(B, T, T) bool of transformers for eager attention: query i may see key j of its row."""
    config = tiny_config()
    config._attn_implementation = "eager"
    allowed = create_causal_mask(config, torch.zeros(rows, T, 1), mask, None, positions)
    return allowed[:, 0] == 0


def seen(rows, mask, positions):
    """(B T, B T) bool of ours, False where a slot is left out, and which slots are kept."""
    flat = flatten(rows, T, CPU, mask, positions)
    slots = torch.arange(rows * T) if flat.slots is None else flat.slots
    whole = torch.zeros(rows * T, rows * T, dtype=torch.bool)
    whole[slots[:, None], slots[None]] = block_mask(flat)[0, 0]
    return flat, whole, slots


def in_rows(allowed):
    """(B, T, T) -> (B T, B T): no row sees another."""
    return torch.block_diag(*allowed.int()).bool()


def check(rows, mask=None, positions=None):
    """Slots, positions, offsets and the longest length by counting; who sees whom by transformers."""
    flat, ours, slots = seen(rows, mask, positions)
    kept = torch.ones(rows, T, dtype=torch.bool) if mask is None else mask != 0
    assert slots.tolist() == [r * T + c for r in range(rows) for c in range(T) if kept[r, c]]
    given = torch.arange(T).expand(rows, -1) if positions is None else positions.expand(rows, -1)
    assert flat.positions.dtype == torch.int64 and flat.positions.tolist() == given[kept].tolist()
    offsets = flat.sequences.offsets
    assert offsets.dtype == torch.int32 and offsets[0] == 0 and offsets[-1] == kept.sum()
    assert flat.sequences.max_length == int(offsets.diff().max())
    assert (flat.sequences.uniform is not None) == (offsets.tolist() == list(range(0, rows * T + 1, T)))
    assert flat.sequences.uniform in (None, (rows, T)) and (flat.slots is None or len(slots) < rows * T)
    theirs = in_rows(transformers_mask(rows, mask, positions))
    real = kept.flatten()  # what a slot of padding sees is nobody's business
    assert torch.equal(ours[real], theirs[real])
    return flat


def test_plain():
    assert check(3).sequences.uniform == (3, T)


@pytest.mark.parametrize("name", MASKS)
def test_padding(name):
    mask = MASKS[name]
    flat = check(len(mask), mask)
    assert flat.sequences.offsets.diff().tolist() == (mask != 0).sum(1).tolist()


@pytest.mark.parametrize("name", POSITIONS)
def test_packed_rows_are_found_as_transformers_finds_them(name):
    positions = POSITIONS[name]
    rows = rows_of(positions)
    flat = check(rows, None, positions)
    owners = find_packed_sequence_indices(positions.expand(rows, -1))
    counts = [T] * rows if owners is None else [n for row in owners for n in row.unique(return_counts=True)[1].tolist()]
    assert flat.sequences.offsets.diff().tolist() == counts
    assert (owners is None) == (name in ("one sequence a row", "one row for all", "from 5 on"))


@pytest.mark.parametrize("name", ["left", "holes", "all kept"])
def test_with_a_mask_positions_separate_nothing(name):
    """transformers looks for packed sequences only where no mask is given."""
    mask = MASKS[name]
    check(len(mask), mask, ranges(9, 8)[None])


def test_another_batch_would_show():
    """Controls: the mask of the other side, a sequence that ends a token later, or no separation at all."""
    theirs = in_rows(transformers_mask(3, MASKS["left"], None))
    kept = (MASKS["left"] != 0).flatten()
    assert not torch.equal(seen(3, MASKS["right"], None)[1][kept], theirs[kept])
    packed = in_rows(transformers_mask(1, None, ranges(5, 1, 11)[None]))
    for positions in (ranges(6, 11)[None], ranges(5, 2, 10)[None], None):
        assert not torch.equal(seen(1, None, positions)[1], packed)


def test_nothing_there():
    for rows, columns in ((0, 5), (3, 0)):
        flat = flatten(rows, columns, CPU)
        assert flat.positions.shape == (0,) and flat.sequences.offsets.tolist() == [0] * (rows + 1)
        assert flat.sequences.max_length == columns
    positions = torch.empty(3, 0, dtype=torch.int64)
    assert flatten(3, 0, CPU, None, positions).sequences.offsets.tolist() == [0] * 4


@pytest.mark.parametrize("shape", [(3, T + 2), (2, T), (T,)])
def test_a_mask_of_another_shape_is_refused(shape):
    """It would pick the wrong slots in silence; (1, T) for all rows is none of transformers' own either."""
    with pytest.raises(ValueError, match="attention_mask"):
        flatten(3, T, CPU, torch.zeros(shape, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.parametrize("name", MASKS)
def test_on_a_gpu_it_is_the_same(name):
    mask = MASKS[name]
    ours, same = (flatten(len(mask), T, torch.device(d), mask) for d in ("cuda", "cpu"))
    assert ours.positions.is_cuda and torch.equal(ours.positions.cpu(), same.positions)
    assert torch.equal(ours.sequences.offsets.cpu(), same.sequences.offsets)
    assert ours.sequences[1:] == same.sequences[1:]
    assert (ours.slots is None) == (same.slots is None)
    assert ours.slots is None or torch.equal(ours.slots.cpu(), same.slots)
