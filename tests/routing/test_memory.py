"""The memory plan: within its budget wherever that is possible, better with every byte, and what it counts by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

import qwen2tool.routing.memory
from qwen2tool.routing.memory import SPARED, WORKSPACES, _candidates, _lift, _most, plan_memory
from qwen2tool.routing.sizes import Sizes

LARGE = Sizes(
    tokens=8192, length=2048, layers=32, hidden=4096, intermediate=11008, query_columns=4096, kv_columns=4096, heads=32,
    vocabulary=151936, rank_columns=64, itemsize=2, static=6_500_000_000, embedding=1_244_659_712,
)  # fmt: skip
SMALL = Sizes(
    tokens=1024, length=1024, layers=24, hidden=896, intermediate=4864, query_columns=896, kv_columns=128, heads=14,
    vocabulary=151936, rank_columns=8, itemsize=2, static=1_000_000_000, embedding=0,
)  # fmt: skip
MODELS = {
    "7B": LARGE,
    "7B in 4 bits": replace(LARGE, packed=True, masked=True, layer_packed=101_187_584),
    "0.5B": SMALL,
    "one layer": replace(LARGE, layers=1),
    "fp32": replace(SMALL, itemsize=4),
}
ENOUGH = 1 << 62
LEVELS = ("input", "mlp", "attention", "all")


def smallest(sizes, **options):
    return plan_memory(sizes, 0, **options).estimate


def budgets(sizes, count=60, **options):
    """From less than anything needs to more than everything takes."""
    low, high = smallest(sizes, **options), plan_memory(sizes, ENOUGH, **options).estimate
    return [low * 9 // 10 + (high * 11 // 10 - low * 9 // 10) * step // count for step in range(count + 1)]


def kept_bytes(sizes, keep):
    """What levels hold on the device beside inputs, written out: q, k, v, output, h, log-sum-exp | gate, up, ranks."""
    attention = sizes.tokens * (
        sizes.itemsize * (2 * sizes.query_columns + 2 * sizes.kv_columns + sizes.hidden) + 4 * sizes.heads
    )
    mlp = sizes.tokens * sizes.itemsize * 2 * (sizes.intermediate + sizes.rank_columns)
    return {"input": 0, "attention": attention, "mlp": mlp, "all": attention + mlp}[keep]


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_within_the_budget_wherever_anything_fits(name, host):
    sizes = MODELS[name]
    low = smallest(sizes, host=host)
    for budget in [*budgets(sizes, host=host), low - 1, low, low + 1]:
        plan = plan_memory(sizes, budget, host=host)
        assert plan.estimate <= budget if budget >= low else plan.estimate == low
        assert len(plan.keep) == sizes.layers and set(plan.keep) <= set(LEVELS)


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_more_memory_never_saves_less(name, host):
    sizes = MODELS[name]
    fitting = [b for b in budgets(sizes, host=host) if b >= smallest(sizes, host=host)]
    plans = [plan_memory(sizes, budget, host=host) for budget in fitting]
    assert all(a.saved <= b.saved for a, b in itertools.pairwise(plans))
    assert plans[0].saved < plans[-1].saved and set(plans[-1].keep) == {"all"}


@pytest.mark.parametrize("name", MODELS)
def test_enough_memory_keeps_all_and_moves_nothing(name):
    sizes = MODELS[name]
    plan = plan_memory(sizes, ENOUGH)
    assert plan.keep == ("all",) * sizes.layers
    assert (plan.host_inputs, plan.host_gate_up, plan.host_embedding, plan.head_rows) == (0, frozenset(), False, 1024)
    assert plan_memory(sizes, plan.estimate) == plan
    assert plan_memory(sizes, plan.estimate - 1) != plan
    assert plan.layers_unpacked == (sizes.layers if sizes.packed else 0)
    weights = plan.layers_unpacked * sizes.unpacked
    assert plan.estimate == plan_memory(sizes, ENOUGH, "none").estimate + weights


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_recompute_all_and_none_are_kept_to(name, host):
    sizes = MODELS[name]
    for budget in (0, 10**10, ENOUGH):
        assert set(plan_memory(sizes, budget, "all", host=host).keep) == {"input"}
        none = plan_memory(sizes, budget, "none", host=host)
        assert set(none.keep) == {"all"} and none.host_inputs == 0 and not none.host_gate_up
    assert smallest(sizes, recompute="all", host=host) == smallest(sizes, host=host)
    more, least = smallest(sizes, recompute="none", host=host), smallest(sizes, host=host)
    assert more > least if sizes.layers > 1 else more == least, "one layer's backward makes all of it again"


@pytest.mark.parametrize("name", MODELS)
def test_without_the_host_nothing_waits_there(name):
    sizes = MODELS[name]
    for budget in budgets(sizes, 20):
        plan = plan_memory(sizes, budget, host=False)
        assert (plan.host_inputs, plan.host_gate_up, plan.host_embedding) == (0, frozenset(), False)
    if name == "7B":
        assert smallest(sizes, host=True) < smallest(sizes, host=False) - sizes.embedding


def test_the_host_is_used_for_what_it_can_take():
    """An untied table, all inputs but the last layer's, and gate and up of the share that the bus carries."""
    for budget in budgets(LARGE):
        plan = plan_memory(LARGE, budget)
        assert plan.host_inputs in (0, LARGE.layers - 1)
        assert len(plan.host_gate_up) <= LARGE.gate_up_share * LARGE.layers
        assert all(plan.keep[index] in ("mlp", "all") for index in plan.host_gate_up)
        assert all(index < plan.host_inputs for index in plan.host_gate_up)
        assert not plan_memory(replace(LARGE, embedding=0), budget).host_embedding
    assert plan_memory(LARGE, 8 * 10**9).host_embedding
    assert plan_memory(LARGE, 8 * 10**9).host_gate_up


def test_the_last_layers_are_spared_where_memory_is_short(monkeypatch):
    """What comes back for them would be there where the backward begins, and the room is worth layers kept."""
    spared = plan_memory(LARGE, 7_500_000_000)
    assert spared.host_gate_up and max(spared.host_gate_up) < LARGE.layers - 1 - SPARED[-1]
    monkeypatch.setattr(qwen2tool.routing.memory, "SPARED", (0,))
    without = plan_memory(LARGE, 7_500_000_000)
    assert max(without.host_gate_up) >= LARGE.layers - 1 - SPARED[-1] and without.saved < 0.8 * spared.saved


def test_a_table_that_is_on_the_host_already_stays_there():
    """It is not in `static` any more, and counts neither as room to be won nor as a reason to move."""
    there = replace(LARGE, static=LARGE.static - LARGE.embedding, embedding=0, embedding_on_host=True)
    for budget in (8 * 10**9, ENOUGH):
        assert plan_memory(there, budget).host_embedding
    moved = plan_memory(LARGE, 8 * 10**9)
    assert moved.host_embedding and plan_memory(there, 8 * 10**9) == moved


def test_a_faster_bus_carries_more():
    shares = [replace(LARGE, bus=rate).gate_up_share for rate in (0.0, 1e9, 20e9, 40e9, 1e13)]
    assert shares == sorted(shares) and shares[0] == 0 and 0 < shares[2] < shares[3] < shares[4] == 1
    slow = plan_memory(replace(LARGE, bus=1e9), 8 * 10**9)
    assert not slow.host_gate_up and plan_memory(LARGE, 8 * 10**9).host_gate_up


def test_layers_are_lifted_from_the_last_one():
    """Attention of all layers first, then gate and up; the layers of a level always stand together."""
    seen = set()
    for budget in budgets(LARGE, host=False):
        keep = plan_memory(LARGE, budget, host=False).keep
        order = [LEVELS.index(level) for level in keep]
        assert order == sorted(order), keep
        alone = keep.count("all") == 1  # the last layer's cost nothing: its backward comes first and makes them anyway
        assert alone or not ({"input", "all"} <= set(keep)), "all layers reach attention before one keeps everything"
        seen |= set(keep)
    assert seen == {"input", "attention", "all"}


@pytest.mark.parametrize("name", MODELS)
def test_no_room_for_a_layer_is_left(name):
    sizes = MODELS[name]
    for budget in budgets(sizes, 20, host=False):
        plan = plan_memory(sizes, budget, host=False)
        step = kept_bytes(sizes, "attention" if "input" in plan.keep else "mlp")
        full = plan.keep == ("all",) * sizes.layers
        assert full or budget < plan.estimate or budget - plan.estimate < step


def at_every_moment(sizes, plan):
    """The bytes of each moment of a step, by the lifetimes of tensors: forward of each layer, head, backward of each.

    The other way round from `peak`: nothing is summed up on the way, every moment lists what lives in it.
    """
    n, s, h, i, layers = sizes.tokens, sizes.itemsize, sizes.hidden, sizes.intermediate, range(sizes.layers)
    x, width = n * h * s, 2 * sizes.rank_columns
    tails, gate_up = 7 * n * sizes.rank_columns * s, 2 * n * (i + sizes.rank_columns) * s
    attention = kept_bytes(sizes, "attention")
    away = [layer in plan.host_gate_up for layer in layers]

    def kept(layer):
        level = plan.keep[layer]
        return (tails if plan.tails else 0) + (attention if level in ("attention", "all") else 0) + (
            gate_up if level in ("mlp", "all") and not away[layer] else 0
        )  # fmt: skip

    r, q, kv = sizes.rank_columns, sizes.query_columns, sizes.kv_columns
    down, o, qkv = (h + r) * (i + r), (h + r) * (q + r), (q + 2 * kv + 3 * r) * (h + 3 * r)
    wide = (2 * i + width) * (h + width)
    weights = (max(wide, qkv) if plan.frugal else wide + down + qkv) * s
    always = (qkv + o + wide + down) * s * plan.layers_unpacked
    moments = []

    def masks(*columns):
        return n * sum(columns) // 8 if sizes.masked else 0

    for at in layers:  # forward: q, k, v, attention, h, gate, up, silu(gate) up, y
        inputs = [layer for layer in layers if layer <= at and not (plan.host_inputs and layer < at - 3)]
        leaving = [layer for layer in (at - 1, at - 2, at - 3) if layer >= 0 and away[layer]]
        work = attention + gate_up + n * (i + sizes.rank_columns) * s + x + down * s + masks(i)
        moments.append(sum(map(kept, range(at))) + len(inputs) * x + len(leaving) * gate_up + work)
    inputs = min(sizes.layers, 4) if plan.host_inputs else sizes.layers
    logits = (plan.head_rows or 1024) * sizes.vocabulary * (4 + s) if s == 2 else plan.head_rows * sizes.vocabulary * 6
    moments.append(sum(map(kept, layers)) + (inputs + 3) * x + sum(away[-3:]) * gate_up + logits)
    for at in layers:  # backward: dy or dh, what is not kept, silu(gate) up in its gradient's place, two rows of H
        inputs = [layer for layer in layers if layer <= at and not (plan.host_inputs and layer < at - 1)]
        arriving = gate_up * sum(away[layer] for layer in (at - 1, at - 2) if layer >= 0)
        there = sum(map(kept, range(at))) + len(inputs) * x + tails + attention + arriving + x
        moments.append(there + weights + gate_up + n * (i + 2 * h) * s + masks(3 * h, 2 * h, i))
        # then attention's: d_output, dq dk dv, [dq | dk | dv], fp32 dq
        moments.append(there + (qkv + o) * s + n * (h + q + 2 * (q + 2 * kv)) * s + 4 * n * q + masks(3 * h, q))
    static = sizes.static + always - (sizes.embedding if plan.host_embedding else 0)
    if plan.host_weights:  # the layer's at work and the next one's; what is away for good are the others'
        static -= (plan.host_weights - 2) * sizes.layer_packed
    return [WORKSPACES + static + moment for moment in moments]


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("name", ["7B", "7B in 4 bits", "0.5B", "one layer"])
def test_the_estimate_is_the_highest_moment(name, host):
    sizes, highest = MODELS[name], set()
    for budget in [0, *budgets(sizes, 12, host=host), ENOUGH]:
        plan = plan_memory(sizes, budget, host=host)
        moments = at_every_moment(sizes, plan)
        assert plan.estimate == max(moments)
        highest.add(moments.index(max(moments)))
    assert name != "7B" or len(highest) > 1, "where the peak lies depends on the plan"


def test_the_last_layer_keeps_for_nothing():
    """What it keeps stands in for what its backward would make again, right after the forward."""
    least = plan_memory(LARGE, smallest(LARGE, host=False), host=False)
    assert least.keep == ("input",) * 31 + ("all",)
    assert least.estimate == plan_memory(LARGE, 0, "all", host=False).estimate


NARROW = replace(
    SMALL, hidden=256, intermediate=512, query_columns=256, kv_columns=64, heads=4, vocabulary=1000, packed=True,
    rank_columns=64, layer_packed=300_000, static=100_000_000,
)  # fmt: skip


@pytest.mark.parametrize("name", [*MODELS, "narrow"])
def test_no_candidate_would_have_been_better(name):
    """The search leaves out what cannot be the best; looked through one by one they give the same."""
    sizes = NARROW if name == "narrow" else MODELS[name]
    for budget in budgets(sizes, 25):
        every = list(_candidates(sizes, "auto", True))
        fitting = [_lift(sizes, plan, budget) for plan in every if plan.estimate <= budget]
        found = plan_memory(sizes, budget)
        assert found.saved == max((plan.saved for plan in fitting), default=found.saved)
        assert all(lifted.saved <= _most(sizes, plan, budget) for plan, lifted in zip(
            [plan for plan in every if plan.estimate <= budget], fitting, strict=True
        ))  # fmt: skip


def test_weights_wait_on_the_host_where_the_bus_has_time():
    """8192 tokens take a 7B's forward 190 ms, in which 30 layers' 3 GB get over the bus easily; 1024 tokens do not."""
    packed = replace(MODELS["7B in 4 bits"], static=7_200_000_000, embedding=0, embedding_on_host=True, bus=48e9)
    plan = plan_memory(packed, 10_430_000_000)
    assert plan.host_weights == 30 and plan.layers_away == set(range(1, 31)) and plan.layers_unpacked == 0
    without = plan_memory(replace(packed, layer_packed=0), 10_430_000_000)
    assert plan.saved > without.saved and plan.keep.count("attention") > without.keep.count("attention") + 5
    assert plan_memory(packed, ENOUGH).host_weights == 0 == plan_memory(packed, 10**10, host=False).host_weights
    assert packed.gone(30) == 28 * 101_187_584 and packed.gone(2) == packed.gone(0) == 0
    assert plan_memory(replace(packed, layers=4), 0).host_weights == 0, "two would win nothing"
    assert plan_memory(replace(packed, layers=5), 0).host_weights == 3
    assert packed.waiting(30, 31, 14) == 0 == packed.waiting(0, 31, 31)
    few = replace(packed, tokens=1024)
    forward = 0.8 * 32 * few.forward_seconds
    away, back = 30 * 101_187_584 / 48e9, 31 * few.input / 48e9
    assert few.waiting(30, 31, 0) == pytest.approx(2 * away + back - 2.8 * forward) and forward < 0.03 < 0.06 < away
    assert plan_memory(few, 8_800_000_000).host_weights == 0
    assert plan_memory(few, 0).host_weights == 30, "where nothing else fits, it is waited for"


def test_weights_stay_unpacked_when_all_else_is_kept():
    """They save a fifth as much a byte as what layers keep, and nothing where there is nothing to unpack."""
    sizes = MODELS["7B in 4 bits"]
    seen = set()
    for budget in budgets(sizes, 40, host=False):
        plan = plan_memory(sizes, budget, host=False)
        full = set(plan.keep) == {"all"}
        step = min(kept_bytes(sizes, "attention"), kept_bytes(sizes, "mlp"), sizes.unpacked)
        assert plan.layers_unpacked == 0 or full or (plan.layers_unpacked + 1) * sizes.unpacked > step
        seen.add(plan.layers_unpacked)
        assert plan_memory(LARGE, budget, host=False).layers_unpacked == 0
        assert plan_memory(sizes, budget, "all", host=False).layers_unpacked == 0
    assert {0, sizes.layers} < seen and len(seen) > 5
    # 0.42 GB a layer: 4096 x (3 x 4096 + 4096 + 3 x 11008) weights and rank 64 behind each, 2 bytes
    assert 4096 * (4 * 4096 + 3 * 11008) * 2 < sizes.unpacked < 4096 * (4 * 4096 + 3 * 11008) * 2 * 1.07


def test_small_chunks_of_logits_are_paid_for():
    """Of 64 rows each the head is read 256 times in a pass of 8192 tokens, 0.5 ms each time: a fifth of a step."""
    seconds = [LARGE.chunking(rows) / 650e12 for rows in (1024, 512, 256, 128, 64, 32, 16)]
    assert seconds[0] == 0 and seconds == sorted(seconds)
    assert seconds[2] < 2e-3 and 0.03 < seconds[3] < 0.04 < 0.09 < seconds[4] < 0.1
    assert 0.23 < seconds[5] < 0.235 and 0.49 < seconds[6] < 0.5


def test_the_sum_by_hand():
    """tokens 10, hidden 8, intermediate 16, q 8, kv 4 columns, rank 2, 2 bytes, vocabulary 50, two layers."""
    sizes = Sizes(
        tokens=10, length=5, layers=2, hidden=8, intermediate=16, query_columns=8, kv_columns=4, heads=2, vocabulary=50,
        rank_columns=2, itemsize=2, static=1000, embedding=0,
    )  # fmt: skip
    assert sizes.input == 10 * 8 * 2
    assert sizes.attention == 10 * (
        (8 + 8 + 4 + 4 + 8) * 2 + 2 * 4
    )  # q, output, k, v, h; 4 bytes of log-sum-exp a head
    assert sizes.mlp == 10 * (16 + 16 + 2 + 2) * 2
    assert sizes.attention_products == 10 * (2 * 8 * (8 + 4 + 4 + 8) + 2 * 5 * 8)
    assert sizes.mlp_products == 10 * 2 * (2 * 8 * 16)
    assert sizes.tails == 10 * 7 * 2 * 2, "rank 2 behind the input of seven linears"
    assert sizes.head(7) == 7 * 50 * 6 + 3 * 160
    # With 8 columns of adapters, ranks rounded up: gate and up (40 x 16), down (16 x 24), q k v (24 x 16), o (16 x 16)
    assert sizes.mlp_backward_weights(frugal=False) == 2 * (40 * 16 + 16 * 24 + 24 * 16)
    assert sizes.mlp_backward_weights(frugal=True) == 2 * 40 * 16
    assert sizes.unpacked == 2 * (40 * 16 + 16 * 24 + 24 * 16 + 16 * 16)
    assert replace(sizes, adapted=frozenset({"o", "down"})).unpacked == 2 * (16 * 24 + 16 * 16)
    assert sizes.mlp_backward == 2 * 10 * (16 + 2 * 8) + 160
    # q k v (24 x 16) and o (16 x 16); dq dk dv twice (32), attention's gradient (8) and a row (8); dq in fp32
    assert sizes.attention_backward == 2 * (24 * 16 + 16 * 16) + 10 * ((2 * 16 + 8 + 8) * 2 + 4 * 8) + 160
    repeated = replace(sizes, repeated_kv=True)  # k and v of 8 columns each besides, and their gradients
    assert repeated.attention == sizes.attention + 10 * 2 * 8 * 2
    assert repeated.attention_backward == sizes.attention_backward + 10 * 2 * 8 * 2
    assert sizes.forward == 2 * (16 * 24 + 10 * 18) + sizes.attention + sizes.mlp + 160
    plan = plan_memory(sizes, ENOUGH)
    kept = 2 * (280 + sizes.attention + sizes.mlp)
    assert plan.estimate == WORKSPACES + 1000 + kept + 2 * 160 + sizes.head(1024), "the head's scratch is the larger"
    assert plan.saved == 2 * (sizes.mlp_products + sizes.attention_products)
    tight = plan_memory(sizes, 0)
    assert (tight.head_rows, tight.frugal, tight.tails) == (16, True, False)
    assert tight.estimate == WORKSPACES + 1000 + 2 * 160 + sizes.head(16), "nothing but the two inputs is kept"
    # The inputs of qkv, o, gate_up and down read at 2.5e12 bytes a second, four launches of 5 us; masks twice that.
    assert sizes.tails_again == pytest.approx((10 * 2 * (8 + 8 + 8 + 16) / 2.5e12 + 20e-6) * 650e12)
    assert replace(sizes, masked=True).tails_again == pytest.approx((10 * 4 * 40 / 2.5e12 + 20e-6) * 650e12)


def test_more_of_anything_needs_more():
    """Every size counts: a plan that forgot one would promise what does not fit."""
    for field in (
        "tokens",
        "layers",
        "hidden",
        "intermediate",
        "query_columns",
        "kv_columns",
        "rank_columns",
        "static",
    ):
        larger = replace(LARGE, **{field: getattr(LARGE, field) * 2})
        assert plan_memory(larger, ENOUGH, "none").estimate > plan_memory(LARGE, ENOUGH, "none").estimate, field
        if field != "layers":  # with inputs on the host, layers cost the host alone
            assert smallest(larger) > smallest(LARGE), field
    small = replace(SMALL, tokens=128)
    assert smallest(replace(small, vocabulary=10**6)) > smallest(small)


@pytest.mark.parametrize("name", ["7B", "7B in 4 bits", "0.5B", "fp32"])
def test_low_rank_products_are_made_again_where_memory_is_short(name):
    """They are the least that can be saved: never dropped where everything fits, always in the smallest plan."""
    sizes = MODELS[name]
    seen = [plan_memory(sizes, budget).tails for budget in [0, *budgets(sizes), ENOUGH]]
    assert not seen[0] and seen[-1] and seen == sorted(seen)


def test_described_in_plain_values():
    plan = plan_memory(LARGE, 8 * 10**9)
    assert plan.describe() == {
        "keep": {level: plan.keep.count(level) for level in LEVELS},
        "layer_inputs_on_host": 31,
        "gate_up_on_host": len(plan.host_gate_up),
        "embedding_on_host": True,
        "head_rows": 512,
        "weights_on_host": 0,
        "frugal": plan.frugal,
        "tails": plan.tails,
        "layers_unpacked": 0,
        "estimated_bytes": plan.estimate,
    }
    assert sum(plan.describe()["keep"].values()) == 32
