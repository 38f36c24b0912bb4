"""Packed batches by hand, and that filling one up to a common shape changes neither its loss nor its gradients."""

from __future__ import annotations

import copy

import pytest
import torch

from qwen2tool.data.samples import Sample
from qwen2tool.routing.swap import route
from qwen2tool.training.batches import IGNORED, DpoCollator, SampleDataset, SftCollator, bucket, fill_up, pack, rows_for
from qwen2tool.training.forward import log_probs, sum_by_owner
from tests.routing.models import lora_model
from tests.tolerances import relative_error


def sample(ids, scored, record=0):
    return Sample(ids=tuple(ids), scored=tuple(map(bool, scored)), record=record)


THREE = [
    sample([11, 12, 13, 14], [1, 0, 1, 1], record=7),  # its first token is scored, which nothing predicts
    sample([21], [1], record=9),
    sample([31, 32, 33], [0, 1, 0], record=8),
]


def samples(*lengths, seed=0):
    """Random samples; about half of their tokens are scored."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        (torch.randint(3, 384, (n,), generator=generator), torch.rand(n, generator=generator) < 0.5) for n in lengths
    ]
    return [sample(ids.tolist(), scored.tolist(), record) for record, (ids, scored) in enumerate(drawn)]


def test_pack_by_hand():
    batch = pack(THREE)
    assert batch["input_ids"].tolist() == [11, 12, 13, 14, 21, 31, 32, 33]
    assert batch["positions"].tolist() == [0, 1, 2, 3, 0, 0, 1, 2]
    assert batch["offsets"].tolist() == [0, 4, 5, 8] and batch["offsets"].dtype == torch.int32
    assert batch["longest"] == 4
    assert batch["labels"].tolist() == [13, 14, 32]
    assert batch["rows"].tolist() == [1, 2, 5], "the token before the scored one"
    assert batch["owners"].tolist() == [0, 0, 2]
    assert batch["records"] == [7, 9, 8]
    whole = {name: value.dtype for name, value in batch.items() if torch.is_tensor(value) and name != "offsets"}
    assert set(whole.values()) == {torch.int64}


def test_nothing_scored_leaves_no_rows():
    batch = pack([sample([1, 2], [1, 0])])
    assert all(batch[name].shape == (0,) and batch[name].dtype == torch.int64 for name in ("rows", "labels", "owners"))
    assert fill_up(batch, 1)["labels"].tolist() == [IGNORED] * 128


def test_bucket_sizes():
    sizes = sorted({bucket(count) for count in range(20_000)})
    assert sizes == [128, 256, 512, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576]
    assert all(bucket(size) == size and bucket(size + 1) > size for size in sizes)
    waste = [bucket(count) / count for count in range(2048, 20_000)]
    assert min(waste) == 1 and max(waste) < 1.5
    assert bucket(0) == bucket(1) == 128


def test_rows_are_all_a_quarter_or_a_sixteenth_of_the_tokens():
    found = {scored: rows_for(scored, 8192) for scored in (8191, 2049, 2048, 513, 512, 129, 128, 0)}
    assert found == {8191: 8192, 2049: 8192, 2048: 2048, 513: 2048, 512: 512, 129: 512, 128: 128, 0: 128}
    assert [rows_for(10, size) for size in (128, 256, 512, 1024, 2048, 3072)] == [128, 256, 128, 256, 128, 192]
    sizes = sorted({bucket(count) for count in range(20_000)})
    assert all(scored <= rows_for(scored, size) <= size for size in sizes for scored in range(0, size, 37))
    assert all(rows_for(scored, size) % 64 == 0 for size in sizes for scored in range(0, size, 37))


@pytest.mark.parametrize("lengths", [(5, 1, 9), (100, 28), (130,), (200, 400, 10)])
def test_shapes_are_those_of_the_bucket(lengths):
    """Few shapes for many batches: tokens by `bucket`, scored rows by those, offsets by the sequences there may be."""
    batch = pack(samples(*lengths))
    filled = fill_up(batch, 4)
    size = bucket(sum(lengths))
    room = rows_for(len(batch["labels"]), size)
    assert filled["input_ids"].shape == filled["positions"].shape == (size,)
    assert filled["rows"].shape == filled["labels"].shape == filled["owners"].shape == (room,)
    assert filled["offsets"].shape == (6,) and filled["longest"] == size
    assert {name: value.dtype for name, value in filled.items() if torch.is_tensor(value)} == {
        name: value.dtype for name, value in batch.items() if torch.is_tensor(value)
    }


@pytest.mark.parametrize("lengths", [(5, 1, 9), (100, 28), (64, 64)])
def test_what_is_filled_up_counts_nothing(lengths):
    batch = pack(samples(*lengths))
    filled, count, scored = fill_up(batch, 4), sum(lengths), len(batch["labels"])
    for name, kept in (("input_ids", count), ("positions", count), ("rows", scored), ("labels", scored)):
        assert torch.equal(filled[name][:kept], batch[name])
    assert torch.equal(filled["offsets"][: len(lengths) + 1], batch["offsets"])
    assert set(filled["offsets"][len(lengths) + 1 :].tolist()) == {len(filled["input_ids"])}
    assert set(filled["labels"][scored:].tolist()) <= {IGNORED} and filled["owners"].max() < len(lengths)
    assert filled["records"] == batch["records"]


def loss_and_gradients(model, batch):
    """The sum of log-probs weighted by sequence, so that a row with another owner shows, and its gradients."""
    model.zero_grad()
    values = log_probs(model, batch, batch["labels"])
    loss = (sum_by_owner(values, batch["owners"], 3) * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)).sum()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


EXACT = 1e-9
"""In float64 only the order of sums differs (and the centre of the keys is fp32, a constant)."""


@pytest.fixture(scope="module")
def routed():
    model = lora_model(dtype=torch.float64)
    route(model)
    return model


def test_filled_up_is_the_same_loss_with_the_same_gradients(routed):
    batch = pack(samples(40, 3, 21))
    plain = loss_and_gradients(routed, batch)
    filled = loss_and_gradients(routed, fill_up(batch, 5))
    assert plain.keys() == filled.keys() and len(plain) == 1 + 3 * 7 * 2
    assert max(relative_error(filled[name], plain[name]) for name in plain) < EXACT


@pytest.mark.parametrize("name", ["labels", "owners", "rows", "offsets", "positions"])
def test_a_batch_filled_up_wrongly_would_show(name, routed):
    """Controls: each of the tensors with one mistake in it."""
    batch = pack(samples(40, 3, 21))
    plain = loss_and_gradients(routed, batch)
    filled = copy.deepcopy(fill_up(batch, 5))
    scored = len(batch["labels"])
    if name == "labels":
        filled[name][scored] = 5  # a row of the filling that counts
    elif name == "owners":
        filled[name][scored - 1] = 0
    elif name == "rows":
        filled[name][: scored - 1] = batch["rows"][1:]  # every prediction one row late
    elif name == "offsets":
        filled[name][1] -= 1
    else:
        filled[name][10] += 3
    assert relative_error(loss_and_gradients(routed, filled)["loss"], plain["loss"]) > 1e-4


def test_what_a_batch_holds_is_told_without_what_fills_it_up():
    for fill in (None, 3):
        (batch,) = SftCollator(fill)(THREE)
        assert (batch["tokens"], batch["scored"]) == (8, 3) == (8, int((batch["labels"] != IGNORED).sum()))


def test_sft_collator():
    assert SftCollator()(THREE)[0]["input_ids"].shape == (8,)
    assert SftCollator(fill=3)(THREE)[0]["input_ids"].shape == (128,)
    dataset = SampleDataset(THREE)
    assert len(dataset) == 3 and dataset[1] is THREE[1]


@pytest.mark.parametrize("fill", [None, 6])
def test_dpo_collator(fill):
    """Chosen first, then rejected; records and reference log-probs once a pair."""
    chosen, rejected = THREE, samples(2, 6, 4, seed=3)
    pairs = [(c, r, -1.5 - i, -2.5 - i) for i, (c, r) in enumerate(zip(chosen, rejected, strict=True))]
    (batch,) = DpoCollator(fill)(pairs)
    expected = [i for part in (*chosen, *rejected) for i in part.ids]
    assert batch["input_ids"][: len(expected)].tolist() == expected
    assert batch["offsets"][:7].tolist() == [0, 4, 5, 8, 10, 16, 20]
    assert batch["records"] == [7, 9, 8]
    assert batch["reference_chosen"].tolist() == [-1.5, -2.5, -3.5]
    assert batch["reference_rejected"].tolist() == [-2.5, -3.5, -4.5]
    assert batch["reference_chosen"].dtype == torch.float32
    scored = sum(sum(s.scored[1:]) for s in (*chosen, *rejected))
    assert int((batch["labels"] != IGNORED).sum()) == scored
