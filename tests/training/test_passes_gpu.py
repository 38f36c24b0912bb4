"""On a GPU: passes replayed from CUDA graphs give the bits of the eager path, step by step, under dropout."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from qwen2tool.routing.memory import MemoryPlan
from qwen2tool.routing.swap import route
from qwen2tool.training.batches import fill_up, pack
from qwen2tool.training.forward import log_probs
from qwen2tool.training.passes import Passes
from tests.routing.models import lora_model
from tests.training.test_batches import samples

pytestmark = pytest.mark.gpu
LARGER = {"hidden_size": 512, "intermediate_size": 1000, "num_attention_heads": 8, "num_key_value_heads": 2}
SHORT, MIDDLE, LONG = (40, 9, 60), (150, 30), (200, 100, 31)  # buckets of 128, 256 and 512
KEEPS = [("input",) * 3, ("input", "attention", "all")]


@pytest.fixture(scope="module")
def model():
    """Frozen weights in bf16, fp32 adapters, dropout on."""
    made = lora_model(config=LARGER, dropout=0.1)
    for name, parameter in made.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "lora_" in name else torch.bfloat16)
    return made.cuda()


def batch_of(lengths, seed):
    batch = fill_up(pack(samples(*lengths, seed=seed)), 4)
    del batch["records"]  # not for passes
    on_gpu = {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}
    return on_gpu | {"scored": torch.tensor(float((batch["labels"] >= 0).sum()), device="cuda")}


class Run:
    """A routed copy of a model with its optimizer; `step` is some passes and one update."""

    def __init__(self, model, *, graphs, memory=None, scale=lambda loss: loss, reserve=0, ready=lambda: True):
        self.model, self.graphs = copy.deepcopy(model), graphs
        route(self.model, memory=memory)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, fused=True)
        context = partial(torch.autocast, "cuda", torch.bfloat16)
        self.passes = Passes(
            self.loss, self.parameters, context, graphs=graphs, scale=scale, reserve=reserve, ready=ready
        )
        torch.manual_seed(11)

    def loss(self, batch):
        values = log_probs(self.model, batch, batch["labels"])
        return {"loss": -values.sum() / batch["scored"], "least": values.min()}

    def step(self, batches, *, to_none=True):
        outcomes = [self.passes(batch) for batch in batches]
        gradients = [p.grad.clone() for p in self.parameters]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=to_none)
        return [value for outcome in outcomes for value in outcome.values()] + gradients


def different(ours, theirs):
    return [index for index, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not torch.equal(a, b)]


SEQUENCE = [SHORT, MIDDLE, SHORT, SHORT, MIDDLE, LONG, SHORT, MIDDLE]


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("keep", KEEPS, ids=["input", "mixed"])
def test_graphs_and_eager_give_the_same_bits(keep, to_none, model):
    """Outcomes, gradients and updated parameters, over shapes seen for the first, second and further times.

    Also with memory taken in advance, where a forward more comes before the first pass, under the same seed.
    """
    memory = MemoryPlan(keep)
    runs = []
    for graphs, reserve in ((True, 0), (False, 0), (True, 1 << 28)):
        run = Run(model, graphs=graphs, memory=memory, reserve=reserve)
        steps = [run.step([batch_of(lengths, seed)], to_none=to_none) for seed, lengths in enumerate(SEQUENCE)]
        runs.append([*steps, [p.detach() for p in run.parameters]])
        assert run.passes.captured == (2 if graphs else 0), "a shape is captured when it comes a second time"
    for other in runs[1:]:
        assert [different(a, b) for a, b in zip(runs[0], other, strict=True)] == [[]] * (len(SEQUENCE) + 1)


def test_gradients_add_up_over_passes(model):
    """Accumulation over graphs of two shapes and an eager first pass, in every mixture."""
    runs = []
    for graphs in (True, False):
        run = Run(model, graphs=graphs)
        steps = [
            run.step([batch_of(lengths, 10 * step + n) for n, lengths in enumerate((SHORT, MIDDLE, SHORT))])
            for step in range(3)
        ]
        runs.append(steps)
        assert run.passes.captured == (2 if graphs else 0)
    assert [different(a, b) for a, b in zip(*runs, strict=True)] == [[]] * 3
    alone = Run(model, graphs=False).step([batch_of(SHORT, 0)])
    assert different(alone[2:], runs[1][0][6:]) != [], "one pass alone has other gradients than three"


def test_every_replay_draws_new_masks(model):
    """The same batch again and again: without an update its loss changes by dropout alone, as it does eagerly."""
    losses = []
    for graphs in (True, False):
        run = Run(model, graphs=graphs)
        losses.append([float(run.passes(batch_of(SHORT, 0))["loss"]) for _ in range(6)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 6
    repeated = Run(model, graphs=True)
    again = [float(repeated.passes(batch_of(SHORT, 0))["loss"]) for _ in range(6)]
    assert again == losses[0], "the seed decides"


def test_outcomes_are_the_caller_s(model):
    """A later replay does not change what an earlier one returned."""
    run = Run(model, graphs=True)
    outcomes = [run.passes(batch_of(SHORT, seed)) for seed in range(5)]
    before = [float(outcome["loss"]) for outcome in outcomes]
    run.passes(batch_of(SHORT, 9))
    assert [float(outcome["loss"]) for outcome in outcomes] == before and len(set(before)) == 5
    assert not any(value.requires_grad for outcome in outcomes for value in outcome.values())


def lies_in(run, tensor):
    """Whether it lies in the memory that captures and warm-ups share."""
    segments = run.passes._workshop.pool.snapshot()
    return any(0 <= tensor.data_ptr() - segment["address"] < segment["total_size"] for segment in segments)


def test_what_a_warm_up_returned_is_not_what_later_replays_write(model):
    run = Run(model, graphs=True)
    outcomes = [run.passes(batch_of(lengths, seed)) for seed, lengths in enumerate((SHORT, MIDDLE, LONG))]
    assert run.passes.captured == 0, "three warm-ups"
    before = [value.clone() for outcome in outcomes for value in outcome.values()]
    for seed, lengths in enumerate((SHORT, LONG, MIDDLE, LONG, SHORT, MIDDLE)):
        run.passes(batch_of(lengths, 10 + seed))
    assert run.passes.captured == 3
    assert different([value for outcome in outcomes for value in outcome.values()], before) == []
    assert not any(lies_in(run, value) for outcome in outcomes for value in outcome.values())
    within = [value for captured in run.passes._captured.values() for value in captured.outcome.values()]
    assert within and all(lies_in(run, value) for value in within), "the control: what a graph writes does"


def test_what_lives_on_from_a_warm_up_is_not_written_to(model):
    """A tensor made once a shape, in a first pass after another shape's graph: the graph goes and comes again."""
    runs = []
    for graphs in (True, False):
        run, kept = Run(model, graphs=graphs), {}

        def loss(batch, run=run, kept=kept):
            outcome, size = run.loss(batch), len(batch["input_ids"])
            if size not in kept:
                kept[size] = torch.full((1 << 20,), float(size), device="cuda")
            return {**outcome, "kept": kept[size].sum()}

        run.passes._loss = loss
        steps, captured = [], []
        for seed, lengths in enumerate((SHORT, SHORT, MIDDLE, SHORT, MIDDLE, LONG, MIDDLE, SHORT, LONG, LONG)):
            steps.append(run.step([batch_of(lengths, seed)]))
            captured.append(run.passes.captured)
        assert all(bool((value == size).all()) for size, value in kept.items()) and len(kept) == 3
        assert captured == ([0, 1, 0, 1, 2, 0, 1, 2, 3, 3] if graphs else [0] * 10)
        runs.append(steps)
    assert [different(a, b) for a, b in zip(*runs, strict=True)] == [[]] * 10


@pytest.mark.parametrize("graphs", [True, False])
def test_the_backward_runs_in_the_calling_thread(graphs, model):
    """Memory pools serve one thread."""
    run, threads = Run(model, graphs=graphs), set()
    for parameter in run.parameters:
        parameter.register_hook(lambda gradient: threads.add(threading.get_ident()))
    for seed in range(3):
        run.passes(batch_of(SHORT, seed))
    assert threads == {threading.get_ident()}
    threads.clear()
    sum(parameter.sum() for parameter in run.parameters).backward()
    assert threads and threading.get_ident() not in threads, "the control: torch's own choice is another thread"


MB = 1_000_000
NARROW, WIDE = (2900,) * 4, (4000,) * 4  # buckets of 12,288 and 16,384
SLACK = 60 * MB
"""The allocator takes memory in pieces of 2 and 20 MB, beside 34 MB for cuBLAS."""


def reserved(run, sequence):
    """(bytes that passes over batches of these lengths take of the device, bytes of what lives at once)

    Eager ones in a pool of their own, as captured ones have it: they would find room in what other tests left behind.
    """
    run.passes(batch_of(SHORT, 0))  # gradients and libraries are there
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    batches = [batch_of(lengths, seed) for seed, lengths in enumerate(sequence)]
    apart = nullcontext() if run.graphs else torch.cuda.use_mem_pool(torch.cuda.MemPool())
    with apart:
        for batch in batches:
            run.passes(batch)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved() - before[0], torch.cuda.max_memory_allocated() - before[1]


def test_warm_up_capture_and_replay_hold_what_one_eager_pass_does(model):
    """Of one shape, and of a smaller one after it."""
    eager, lives = reserved(Run(model, graphs=False), [WIDE])
    assert lives > 300 * MB
    for sequence, captured in (([WIDE] * 3, 1), ([WIDE] * 3 + [NARROW, NARROW, WIDE, NARROW], 2)):
        run = Run(model, graphs=True)
        taken, _ = reserved(run, sequence)
        assert run.passes.captured == captured
        assert taken <= 1.1 * eager + SLACK
    beside, _ = reserved(Run(model, graphs=False), [NARROW])
    assert eager + beside > 1.5 * eager + SLACK, "the control: with memory of its own a warm-up would show"


def test_nothing_is_captured_before_all_is_ready(model):
    """Shapes that come again are warmed up again until then."""
    ready = []
    run = Run(model, graphs=True, ready=lambda: bool(ready))
    outcomes = [run.passes(batch_of(SHORT, 0)) for _ in range(3)]
    assert run.passes.captured == 0
    ready.append(True)
    outcomes += [run.passes(batch_of(SHORT, 0)) for _ in range(2)]
    assert run.passes.captured == 1
    eager = Run(model, graphs=False)
    assert [float(o["loss"]) for o in outcomes] == [float(eager.passes(batch_of(SHORT, 0))["loss"]) for _ in range(5)]


def test_memory_taken_in_advance_serves_all_shapes_and_is_given_back(model):
    _, lives = reserved(Run(model, graphs=False), [WIDE])
    run = Run(model, graphs=True, reserve=int(1.1 * lives))
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    rising = [LONG, NARROW, NARROW, MIDDLE, WIDE, LONG, MIDDLE, WIDE, NARROW, WIDE]
    reserved(run, rising)
    assert run.passes.captured == 4
    assert torch.cuda.memory_reserved() - before <= 1.1 * lives + SLACK
    run.passes = None
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before <= SLACK


def test_the_loss_is_scaled_before_its_backward(model):
    """By a tensor that changes between replays, as a loss scaler's does."""
    factor = torch.tensor(1.0, device="cuda")
    run = Run(model, graphs=True, scale=lambda loss: loss * factor)
    plain = Run(model, graphs=False)
    for value in (1.0, 4.0, 8.0, 2.0):  # powers of two are exact
        factor.fill_(value)
        run.model.zero_grad()
        plain.model.zero_grad()
        state = torch.cuda.get_rng_state()
        outcome = run.passes(batch_of(SHORT, 1))
        torch.cuda.set_rng_state(state)
        expected = plain.passes(batch_of(SHORT, 1))
        assert torch.equal(outcome["loss"], expected["loss"])
        for ours, theirs in zip(run.parameters, plain.parameters, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad * value, rtol=1e-5, atol=0)


def test_with_inputs_on_the_host(model):
    """Copies to pinned memory are part of the graph; shapes grow and shrink in between."""
    plan = MemoryPlan(("input", "mlp", "input"), 2, frozenset({1}))
    runs = []
    for graphs, memory in ((True, plan), (False, plan), (False, MemoryPlan(plan.keep))):
        run = Run(model, graphs=graphs, memory=memory)
        shapes = [SHORT, SHORT, LONG, SHORT, LONG, MIDDLE, LONG, SHORT]
        runs.append([run.step([batch_of(lengths, seed)]) for seed, lengths in enumerate(shapes)])
    for other in runs[1:]:
        assert [different(a, b) for a, b in zip(runs[0], other, strict=True)] == [[]] * 8


def test_a_forward_without_a_backward_does_not_break_a_capture(model):
    """It leaves copies to the host under way, for which a capture must not wait."""
    plan, runs = MemoryPlan(("input", "mlp", "input"), 2, frozenset({1})), []
    for early in (False, True):
        run = Run(model, graphs=True, memory=plan)
        run.passes(batch_of(SHORT, 0))
        if early:
            state = torch.cuda.get_rng_state()
            with torch.autocast("cuda", torch.bfloat16):
                loss = run.loss(batch_of(SHORT, 1))["loss"]
            assert loss.requires_grad
            del loss  # its graph would have the parameters' gradients belong to this stream
            torch.cuda.set_rng_state(state)
        outcomes = [run.passes(batch_of(SHORT, seed))["loss"] for seed in (2, 3)]
        assert run.passes.captured == 1
        runs.append([*outcomes, *(p.grad for p in run.parameters)])
    assert different(*runs) == []


def eager_collector():
    """Every allocation that can, collects: what is found is what was made since, and what came before is left out."""
    gc.collect()
    gc.freeze()
    gc.collect()
    gc.set_threshold(1, 1, 1)


def allocate():
    return [[number] for number in range(1000)]


@pytest.mark.parametrize("phase", [0, 1], ids=["warm-up", "capture"])
def test_an_earlier_run_is_not_collected_inside_a_pass(phase, model):
    """Left in a cycle, it owns a graph and a pool: to let go of them in there ends the process."""
    run, earlier, inside = Run(model, graphs=True), [], []
    for made in range(phase):
        run.passes(batch_of(SHORT, made))

    def loss(batch):
        last = weakref.ref(earlier.pop())
        allocate()
        inside.append((gc.isenabled(), last() is not None))
        earlier.append(last)
        return run.loss(batch)

    run.passes._loss, batch, thresholds = loss, batch_of(SHORT, 5), gc.get_threshold()
    try:
        eager_collector()
        gc.disable()
        earlier.append(Run(model, graphs=True))
        earlier[0].itself = earlier[0]
        earlier[0].step([batch_of(SHORT, 1)])
        earlier[0].step([batch_of(SHORT, 2)])
        assert earlier[0].passes.captured == 1
        gc.enable()
        run.passes(batch)
        assert gc.isenabled() and inside == [(False, True)]
        gc.collect()
        assert earlier[0]() is None, "the control: garbage it was"
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)
        gc.enable()
    assert run.passes.captured == phase


def test_another_seed_is_another_run(model):
    """Control: what `different` compares does differ where it should."""
    runs = []
    for seed in (11, 12):
        run = Run(model, graphs=False)
        torch.manual_seed(seed)
        runs.append(run.step([batch_of(SHORT, 0)]))
    assert len(different(*runs)) == len(runs[0])
