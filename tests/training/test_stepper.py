"""Steps without a Trainer: losses and AdamW's updates are those of transformers, PEFT and torch."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from triton.runtime.cache import triton_key

from qwen2tool.training.model import hash_compiler
from qwen2tool.training.stepper import LINEARS, StepOptions, Stepper
from tests.routing.models import batch, fill_adapters
from tests.tiny import TARGETS
from tests.tolerances import relative_error

OPTIONS = {"rank": 4, "alpha": 12, "quantize": "none", "device": "cpu", "dtype": "float32", "learning_rate": 1e-3}


def make(folder, **changes):
    """A stepper whose B are not zero, and an unrouted copy of its model."""
    stepper = Stepper.from_checkpoint(folder, StepOptions(**(OPTIONS | changes)))
    fill_adapters(stepper.model)
    return stepper, copy.deepcopy(stepper.model)


def batches(count=1, rows=3, columns=17, seed=5):
    return [batch(rows, columns, seed=seed + index) for index in range(count)]


class Plain:
    """The same training written out: transformers' loss of each batch, torch's clipping and AdamW."""

    def __init__(self, model, options):
        self.model, self.options = model, options
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=options.learning_rate, weight_decay=0.0)
        self.gradients = []

    def step(self, several):
        losses = [self.model(input_ids=ids, labels=ids, use_cache=False).loss for ids in several]
        loss = sum(losses) / len(several)  # batches of one shape: the mean of means is the mean over tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.options.max_grad_norm)
        self.gradients = [p.grad.clone() for p in self.parameters]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def updates(model, before):
    return torch.cat([(value - before[name]).flatten() for name, value in trainable(model).items()])


@pytest.mark.parametrize("accumulation", [1, 3])
def test_losses_and_updates_are_those_of_torch(accumulation, base_folder):
    """AdamW's first step is the gradient's sign, its second feels sizes too; fp32 noise turns a sign here and there."""
    stepper, model = make(base_folder, accumulation=accumulation)
    plain, before = Plain(model, stepper.options), trainable(model)
    assert len(before) == 2 * 7 * 3 and LINEARS == TARGETS
    for number in range(3):
        several = batches(accumulation, seed=10 * number)
        theirs, ours = plain.step(several), stepper.step(several)
        assert ours.shape == () and relative_error(ours, theirs) < 1e-5
        assert relative_error(updates(stepper.model, before), updates(model, before)) < 2e-3


def test_the_gradient_before_the_first_step(base_folder):
    """Through the norm of clipping: a bound on it that is passed changes Adam's second moment as torch's does."""
    stepper, model = make(base_folder, max_grad_norm=1e-3)
    plain = Plain(model, stepper.options)
    seen = {}
    step = stepper._optimizer.step

    def watched():
        seen["gradients"] = [p.grad.clone() for p in stepper._parameters]
        return step()

    stepper._optimizer.step = watched
    stepper.step(batches())
    plain.step(batches())
    for ours, theirs in zip(seen["gradients"], plain.gradients, strict=True):
        assert relative_error(ours, theirs) < 1e-4
    norm = torch.cat([g.flatten() for g in seen["gradients"]]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


CHANGES = {"alpha": {"alpha": 13}, "learning rate": {"learning_rate": 2e-3}, "dropout": {"dropout": 0.3}}


@pytest.mark.parametrize("name", CHANGES)
def test_another_setting_would_show(name, base_folder):
    found = []
    for changes in ({}, CHANGES[name]):
        stepper, model = make(base_folder, **changes)
        before = trainable(model)
        loss = stepper.step(batches())
        found.append((loss, updates(stepper.model, before)))
    assert relative_error(found[1][1], found[0][1]) > 1e-2
    assert (relative_error(found[1][0], found[0][0]) > 1e-4) == (name != "learning rate")


def test_same_seed_same_bits(base_folder):
    """Loading seeds LoRA's A; dropout draws from torch's generator. Another seed is another run."""
    runs = []
    for seed in (3, 3, 4):
        stepper = Stepper.from_checkpoint(base_folder, StepOptions(**(OPTIONS | {"seed": seed, "dropout": 0.2})))
        torch.manual_seed(seed)
        losses = [stepper.step(batches(seed=number)) for number in range(2)]
        runs.append([*losses, *trainable(stepper.model).values()])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


def test_base_weights_stay_and_routes_are_described(base_folder):
    stepper, model = make(base_folder)
    assert stepper.describe() == {"graphs": 0}, "nothing is planned before the first step"
    stepper.step(batches())
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    ours = dict(stepper.model.named_parameters())
    assert all(torch.equal(ours[name], value) for name, value in frozen.items())
    described = stepper.describe()
    assert described["routes"] == {"fused layer": 3} and described["graphs"] == 0
    assert sum(described["memory"]["keep"].values()) == 3


@pytest.mark.parametrize("recompute", ["all", "none", "auto"])
def test_recomputation_changes_nothing(recompute, base_folder):
    stepper, model = make(base_folder, recompute=recompute)
    loss = stepper.step(batches())
    assert relative_error(loss, Plain(model, stepper.options).step(batches())) < 1e-5
    keep = stepper.describe()["memory"]["keep"]
    assert keep["input" if recompute == "all" else "all"] == 3


@pytest.mark.parametrize("shape", [(1, 2), (4, 5), (2, 33)])
def test_shapes_may_change_between_steps(shape, base_folder):
    stepper, model = make(base_folder)
    plain = Plain(model, stepper.options)
    for rows, columns in ((3, 17), shape):
        several = batches(rows=rows, columns=columns)
        assert relative_error(stepper.step(several), plain.step(several)) < 1e-5


def test_steps_go_on_when_graphs_are_forgotten(base_folder):
    stepper, model = make(base_folder)
    plain = Plain(model, stepper.options)
    for seed in (1, 2, 3):
        several = batches(seed=seed)
        assert relative_error(stepper.step(several), plain.step(several)) < 1e-5
        stepper.forget_graphs()


def test_a_pass_with_the_adapter_off_goes_before(base_folder):
    """Its loss is the base model's, and the step is the one without it."""
    several, found = batches(2), []
    for reference_pass in (False, True):
        stepper, model = make(base_folder, accumulation=2, reference_pass=reference_pass)
        loss = stepper.step(several)
        found.append((loss, updates(stepper.model, trainable(model))))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1]) and found[0][1].any()
    with torch.no_grad(), model.disable_adapter():
        base = sum(model(input_ids=ids, labels=ids, use_cache=False).loss for ids in several) / 2
    assert relative_error(stepper.reference, base) < 1e-5 and relative_error(base, loss) > 1e-4


@pytest.mark.parametrize(("device", "hashed"), [("cpu", 0), ("cuda", 1), ("cuda:1", 1)])
def test_triton_hashes_its_files_while_weights_are_loaded(device, hashed):
    """For a GPU, and in time for the first kernel, which finds the result."""
    triton_key.cache_clear()
    before = set(threading.enumerate())
    hash_compiler(device)
    for thread in set(threading.enumerate()) - before:
        thread.join()
    assert triton_key.cache_info().currsize == hashed


@pytest.mark.gpu
def test_a_pass_with_the_adapter_off_in_graphs(base_folder):
    """PEFT's switch inside a capture: the same bits as eagerly, and the base model's loss in every replay."""
    runs = []
    for graphs in (True, False):
        changes = {"device": "cuda", "dtype": "bfloat16", "graphs": graphs, "reference_pass": True}
        options = StepOptions(**(OPTIONS | changes))
        stepper = Stepper.from_checkpoint(base_folder, options)
        fill_adapters(stepper.model)
        found = []
        for _ in range(4):
            found.append((float(stepper.step(batches())), float(stepper.reference)))
        assert stepper.describe()["graphs"] == int(graphs)
        runs.append((found, trainable(stepper.model)))
    (ours, adapters), (eager, others) = runs
    assert ours == eager and all(torch.equal(adapters[name], others[name]) for name in others)
    assert len({loss for loss, _ in ours}) == 4 and len({reference for _, reference in ours}) == 1
