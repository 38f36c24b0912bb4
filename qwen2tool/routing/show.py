"""A plan on one screen: layers that are treated alike share their rows, and so do linears inside them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from math import ceil

from qwen2tool.console import format_ranges, print_table, say
from qwen2tool.routing.memory import MemoryPlan
from qwen2tool.routing.plan import Route, RoutePlan

LAYER = re.compile(r"layers\.(\d+)\.?(.*)")


def print_routes(plan: RoutePlan, *, stderr: bool = False) -> None:
    """The table of `fold`."""
    print_table("", ("module", "runs", "why"), _rows(fold(plan)), numeric_from=3, stderr=stderr)


def print_plan(plan: RoutePlan) -> None:
    """The table, then how many layers are fused."""
    print_routes(plan)
    say("")
    say(f"{summary(plan)}, in training with the base frozen")


def print_memory(memory: MemoryPlan, budget: float, *, assumed: bool) -> None:
    """What layers keep where, the peak that the plan reckons with, and whether that is within `budget` GB."""
    lora = ", LoRA of rank 64 on all seven linears" if assumed else ""
    say(f"memory: {memory}; about {needed(memory)} GB at the peak{lora}")
    if memory.estimate > budget * 1e9:
        say(f"{budget:g} GB are too little for the smallest plan; fewer --tokens, a smaller rank or 4 bits need less")


def needed(memory: MemoryPlan) -> str:
    """The peak that a plan reckons with in GB, rounded up: a budget of so much holds it."""
    return f"{ceil(memory.estimate / 1e7) / 100:g}"


def _rows(folded: list[Route]) -> Iterator[tuple[str, str, str]]:
    """Linears stand indented below their layers."""
    layers = " "
    for route in folded:
        inside = route.module.startswith(f"{layers}.")
        layers = layers if inside else route.module
        name = f"  {route.module.removeprefix(f'{layers}.')}" if inside else route.module
        yield name, route.implementation, route.reason


def summary(plan: RoutePlan) -> str:
    """How many of its layers are fused, in words."""
    layers = sum(plan.counts.values())
    return f"{plan.counts.get('fused layer', 0)} of {layers} layers fused"


def fold(plan: RoutePlan) -> list[Route]:
    """The routes: like layers as one range (`layers.0-23`), like linears as a list, names without what they share."""
    inner = plan.routes[0].module.removesuffix("embed_tokens")
    outer = inner[:-1].rpartition(".")[0] + "."
    routes = [Route(r.module.removeprefix(inner).removeprefix(outer), r.implementation, r.reason) for r in plan.routes]
    layers: dict[int, list[Route]] = {}
    for route in routes:
        if match := LAYER.fullmatch(route.module):
            layers.setdefault(int(match[1]), []).append(Route(match[2], route.implementation, route.reason))
    groups: dict[tuple[Route, ...], list[int]] = {}
    for index, members in layers.items():
        groups.setdefault(tuple(members), []).append(index)
    folded = [row for members, indices in groups.items() for row in _layer_rows(members, format_ranges(indices, ","))]
    others = [route for route in routes if not LAYER.fullmatch(route.module)]
    return [others[0], *folded, *others[1:]]


def _layer_rows(members: tuple[Route, ...], layers: str) -> Iterator[Route]:
    """One row where all is said by it; else the layer, then its linears, neighbours with one reason together."""
    whole, *linears = members
    yield Route(f"layers.{layers}", whole.implementation, whole.reason)
    if all((linear.implementation, linear.reason) == (whole.implementation, whole.reason) for linear in linears):
        return
    for key, alike in groupby(linears, lambda linear: (_room(linear), linear.implementation, linear.reason)):
        names = ", ".join(linear.module.rpartition(".")[2] for linear in alike)
        yield Route(f"layers.{layers}.{key[0]}.{names}", key[1], key[2])


def _room(route: Route) -> str:
    return route.module.rpartition(".")[0]
