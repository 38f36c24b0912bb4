"""Puts the fast path on one model instance and takes it off again; nothing else in the process changes."""

from __future__ import annotations

from typing import Any

import torch

from qwen2tool.errors import UserError
from qwen2tool.routing.memory import MemoryPlan
from qwen2tool.routing.plan import RoutePlan, find_stack, plan_routes
from qwen2tool.routing.stack import RoutedStack


def route(
    model: Any,
    plan: RoutePlan | None = None,
    *,
    memory: MemoryPlan | None = None,
    residual_dtype: torch.dtype | None = None,
    reference: bool = False,
) -> RoutePlan:
    """Replaces the inner model of `model` (a transformers Qwen2, under PEFT or not) and returns the plan.

    Args:
        plan: of `plan_routes`, with routes changed perhaps: layers that it leaves to transformers are left to them.
            What cannot be fused is not, whatever it says; the plan that is returned is what runs.
        memory, residual_dtype, reference: see `RoutedStack`.

    With a memory plan that has weights on the host these are there from now on; see `restore`.

    Raises:
        UserError: another architecture, or a model that is routed already.
    """
    left = frozenset() if plan is None else plan.left
    plan = plan_routes(model, reference=reference, left=left)
    stack, name = find_stack(model)
    if isinstance(stack, RoutedStack):
        raise UserError("the model is routed already", "Call unroute(model) first")
    routed = RoutedStack(stack, memory=memory, residual_dtype=residual_dtype, reference=reference, left=left)
    _set(model, name, routed)
    routed.settle()
    return plan


def unroute(model: Any) -> None:
    """Gives `model` its own inner model back, the very object that `route` took away.

    Raises:
        UserError: the model is not routed.
    """
    stack, name = find_stack(model)
    if not isinstance(stack, RoutedStack):
        raise UserError("the model is not routed", "Call route(model) first")
    stack.restore()
    stack.stop()
    _set(model, name, stack.original)


def restore(model: Any) -> None:
    """Puts 4-bit weights that wait on the host back on the device, until the next step of a trainer sends them away.

    For whoever takes the layers as they are: PEFT puts an adapter that is added or loaded where the weight lies, and
    merges into it there. Generation does it by itself. Nothing happens to a model that is not routed.
    """
    stack, _ = find_stack(model)
    if isinstance(stack, RoutedStack):
        stack.restore()


def send_away(model: Any) -> None:
    """Puts weights back on the host that something else, generation say, has had back since the last step."""
    stack, _ = find_stack(model)
    if isinstance(stack, RoutedStack):
        stack.settle()


def _set(model: Any, name: str, module: torch.nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
