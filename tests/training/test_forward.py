"""Log-probs of a packed batch, and their gradients, against transformers' own logits of each sequence alone."""

from __future__ import annotations

import copy

import pytest
import torch

from qwen2tool.routing.memory import MemoryPlan
from qwen2tool.routing.swap import route
from qwen2tool.training.batches import IGNORED, fill_up, pack
from qwen2tool.training.forward import log_probs, sum_by_owner
from tests.routing.models import lora_model
from tests.routing.test_layer import wide_norms  # noqa: F401  (a fixture)
from tests.tolerances import relative_error
from tests.training.test_batches import samples

pytestmark = pytest.mark.usefixtures("wide_norms")
EXACT = 1e-9
TIED = {"tie_word_embeddings": True}
MODELS = {
    "frozen head": {},
    "tied head": {"config": TIED},
    "trained head": {"modules_to_save": ["lm_head"]},
    "adapted head": {"target_modules": ["q_proj", "down_proj", "lm_head"]},
    "trained embedding": {"modules_to_save": ["embed_tokens"]},
    "reference layers": {"use_dora": True},
}
LENGTHS = (13, 1, 21, 7)


def scored_log_probs(model, parts):
    """What transformers says of each scored token, sequence by sequence, in the order of the packed batch."""
    found = []
    for part in parts:
        ids = torch.tensor([part.ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        values = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found.append(values[torch.tensor(part.scored[1:], dtype=torch.bool)])
    return torch.cat(found)


def with_gradients(model, values):
    """`values` and the gradients of a random weighting of them, the same for the first ones of any number."""
    model.zero_grad()
    weights = torch.randn(128, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (values * weights[: len(values)]).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"values": values.detach()}


def routed_copy(model, **options):
    routed = copy.deepcopy(model)
    route(routed, **options)
    return routed


@pytest.mark.parametrize("name", MODELS)
def test_as_transformers_of_each_sequence_alone(name):
    model = lora_model(**MODELS[name], dtype=torch.float64)
    parts = samples(*LENGTHS)
    truth = with_gradients(model, scored_log_probs(model, parts))
    routed, batch = routed_copy(model), pack(parts)
    found = with_gradients(routed, log_probs(routed, batch, batch["labels"]))
    assert found.keys() == truth.keys()
    # A head that is not the plain frozen one goes through torch's loss, which is fp32.
    limit = 1e-6 if name in ("trained head", "adapted head") else EXACT
    worst = max(truth, key=lambda key: relative_error(found[key], truth[key]))
    assert relative_error(found[worst], truth[worst]) < limit, worst


def test_a_trained_head_gets_its_gradient():
    model = routed_copy(lora_model(modules_to_save=["lm_head"], dtype=torch.float64))
    batch = pack(samples(*LENGTHS))
    found = with_gradients(model, log_probs(model, batch, batch["labels"]))
    heads = [value for key, value in found.items() if "lm_head" in key]
    assert len(heads) == 1 and heads[0].abs().sum() > 0


@pytest.mark.parametrize("name", ["frozen head", "trained head"])
def test_ignored_rows_are_zero_and_pull_nothing(name):
    model = routed_copy(lora_model(**MODELS[name], dtype=torch.float64))
    batch = pack(samples(*LENGTHS))
    plain = with_gradients(model, log_probs(model, batch, batch["labels"]))
    filled, count = fill_up(batch, 6), len(batch["labels"])
    found = with_gradients(model, log_probs(model, filled, filled["labels"]))
    assert found["values"].shape == (128,)
    assert not found["values"][count:].any() and found["values"][:count].all()
    assert all(relative_error(found[n], plain[n]) < EXACT for n in plain if n != "values")
    kept = batch["labels"].clone()
    kept[::2] = IGNORED
    half = with_gradients(model, log_probs(model, batch, kept))
    assert not half["values"][::2].any() and torch.equal(half["values"][1::2], plain["values"][1::2])
    assert relative_error(half["values"], plain["values"]) > 0.1


def test_without_peft_and_in_chunks():
    """A bare model; the memory plan's rows of logits at a time change nothing."""
    model = lora_model(dtype=torch.float64).base_model.model
    batch = pack(samples(*LENGTHS))
    values = []
    for rows in (None, 1, 5, 1024):
        routed = routed_copy(model, memory=MemoryPlan(("input",) * 3, head_rows=rows))
        values.append(log_probs(routed, batch, batch["labels"]))
    assert all(relative_error(other, values[0]) < EXACT for other in values)


def test_equal_lengths_are_a_plain_batch():
    """Sequences of one length take attention's batched path, with the same result."""
    model = lora_model(dtype=torch.float64)
    parts = samples(9, 9, 9)
    routed, batch = routed_copy(model), pack(parts)
    found = log_probs(routed, batch, batch["labels"])
    ragged = log_probs(routed, batch | {"longest": 10}, batch["labels"])  # 3 x 10 tokens are not these 27
    truth = scored_log_probs(model, parts)
    assert relative_error(found, truth) < EXACT and relative_error(ragged, truth) < EXACT
    crossed = batch | {"offsets": torch.tensor([0, 27], dtype=torch.int32), "longest": 27}
    assert relative_error(log_probs(routed, crossed, batch["labels"]), truth) > 1e-3


def test_fp32_is_as_close_as_fp32_can_be():
    model = lora_model()
    parts = samples(*LENGTHS)
    batch = pack(parts)
    truth = scored_log_probs(copy.deepcopy(model).double(), parts)
    plain = scored_log_probs(model, parts)
    found = log_probs(routed_copy(model), batch, batch["labels"])
    assert found.dtype == torch.float32
    assert relative_error(found, truth) < 1.5 * relative_error(plain, truth) + 1e-6


def test_sum_by_owner_by_hand():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    owners = torch.tensor([0, 2, 2, 3])
    sums = sum_by_owner(values, owners, 5)
    assert sums.tolist() == [1.0, 0.0, 6.0, 8.0, 0.0]
    (sums * torch.tensor([1.0, 10.0, 100.0, 1000.0, 5.0])).sum().backward()
    assert values.grad.tolist() == [1.0, 100.0, 100.0, 1000.0]
    assert sum_by_owner(values[:0], owners[:0], 2).tolist() == [0.0, 0.0]


def test_a_sequence_that_is_not_finite_spoils_no_other():
    values = torch.tensor([1.0, float("nan"), float("-inf"), 2.0])
    sums = sum_by_owner(values, torch.tensor([0, 1, 2, 3]), 4)
    assert sums[0] == 1 and sums[1].isnan() and sums[2] == float("-inf") and sums[3] == 2


def test_sums_are_those_of_index_add():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, generator=generator, dtype=torch.float64)
    owners = torch.randint(0, 7, (500,), generator=generator)
    truth = torch.zeros(7, dtype=torch.float64).index_add(0, owners, values)
    assert relative_error(sum_by_owner(values, owners, 7), truth) < 1e-14
    assert relative_error(sum_by_owner(values, owners.roll(1), 7), truth) > 1e-2


def test_a_hook_on_the_head_runs_here_too():
    """The plan says that such a head is transformers' own; then it is."""
    model = lora_model().double()
    route(model)
    parts = samples(*LENGTHS)
    packed = pack(parts)
    plain = log_probs(model, packed, packed["labels"])
    model.get_base_model().lm_head.register_forward_hook(lambda module, inputs, output: output * 0.5)
    hooked = log_probs(model, packed, packed["labels"])
    assert relative_error(hooked, scored_log_probs(model, parts)) < 1e-6
    assert relative_error(plain, hooked) > 0.01
