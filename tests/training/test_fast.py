"""How graphs and memory get along: captured passes keep what they used, so many shapes need room for two."""

from __future__ import annotations

import pytest

from qwen2tool.routing.memory import plan_memory
from qwen2tool.training.fast import share_memory
from tests.routing.test_memory import LARGE

OPTIONS = {"recompute": "auto", "host": True}


@pytest.mark.parametrize("budget", [9, 12, 20, 40, 80])
def test_many_shapes_leave_room_for_two_passes(budget):
    budget *= 10**9
    plan, graphs = share_memory(LARGE, budget, **OPTIONS, graphs=True, many_shapes=True)
    if graphs:
        assert LARGE.static + 2 * (plan.estimate - LARGE.static) <= budget
    else:
        assert plan == plan_memory(LARGE, budget)
    one, captured = share_memory(LARGE, budget, **OPTIONS, graphs=True, many_shapes=False)
    assert captured and one == plan_memory(LARGE, budget)
    assert share_memory(LARGE, budget, **OPTIONS, graphs=False, many_shapes=True) == (one, False)


def test_a_tight_budget_gives_up_graphs_and_a_wide_one_does_not():
    tight = plan_memory(LARGE, 0).estimate
    found = [share_memory(LARGE, budget, **OPTIONS, graphs=True, many_shapes=True)[1] for budget in (tight, 80 * 10**9)]
    assert found == [False, True]
