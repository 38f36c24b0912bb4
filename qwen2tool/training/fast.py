"""Puts a model under training on the fast path: measures it, plans memory, moves what waits on the host, routes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch

from qwen2tool.routing.memory import PRODUCTS, WORKSPACES, MemoryPlan, Recompute, Sizes, plan_memory
from qwen2tool.routing.plan import RoutePlan, plan_routes
from qwen2tool.routing.sizes import may_wait_on_host, measure, stream_dtype
from qwen2tool.routing.swap import route

ROOM = 0.92
"""The share of free memory that a plan without a budget fills: the allocator needs some between blocks."""
PACKED = 0.95
"""The share of a pool that passes of several shapes fill: blocks of one shape leave gaps for those of another."""
GROWTH = 3.5
"""A pool at worst, in passes of the largest shape, where each larger one found no block that it could use again: the
sum of all sizes of `batches.bucket` up to the largest."""
MOST_TOKENS = 8192
"""Of a pass over several micro-batches. From some 4096 on a Hopper GPU is busy with products, and a larger pass gains
nothing more; what it fills up and what it keeps grow on."""
PASS_SECONDS = 0.01
"""What a replayed pass costs beside its products: inputs, launch, the guard's wait, a Trainer's loop around them."""


def embedding_to_host(model: Any) -> None:
    """Moves a frozen, untied embedding table into pinned memory, where the fast path reads it row by row.

    Called right after loading where memory is short, so that adapters and optimizer never meet it on the device.
    """
    table = model.get_input_embeddings().weight
    if table.is_cuda and may_wait_on_host(model):
        table.data = table.data.cpu().pin_memory()
        torch.cuda.empty_cache()


def settle(model: Any) -> None:
    """Puts the embedding of a routed model back on the host where the plan has it: trainers move whole models."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    memory = base.model.memory
    if memory is not None and memory.host_embedding:
        embedding_to_host(model)


class Shared(NamedTuple):
    """See `share_memory`; `reserve` is in bytes."""

    memory: MemoryPlan
    graphs: bool
    reserve: int


class Plans(NamedTuple):
    """What runs, what is kept, whether passes are replayed from CUDA graphs, what those reserve (bytes), and how many
    micro-batches go into one pass."""

    routes: RoutePlan
    memory: MemoryPlan
    graphs: bool
    reserve: int
    joined: int

    def __str__(self) -> str:
        layers = ", ".join(f"{count} x {what}" for what, count in self.routes.counts.items())
        kept = str(self.memory) if "fused layer" in self.routes.counts else ""
        graphs = "CUDA graphs" if self.graphs else ""
        joined = f"{self.joined} micro-batches a pass" if self.joined > 1 else ""
        return "; ".join(filter(None, [f"layers {layers}", kept, graphs, joined]))

    def to_json(self) -> dict[str, Any]:
        """Plain values; modules by name."""
        return {
            "modules": self.routes.to_json(),
            "memory": self.memory.describe(),
            "graphs": self.graphs,
            "micro_batches_a_pass": self.joined,
        }


def put_on_fast_path(
    model: Any,
    *,
    tokens: int,
    length: int,
    dtype: torch.dtype,
    budget: int | None = None,
    recompute: Recompute = "auto",
    reference: bool = False,
    graphs: bool = True,
    shapes: Literal["one", "many"] = "one",
    joinable: Mapping[int, int] = MappingProxyType({}),
) -> Plans:
    """Routes `model` in place for passes of at most `tokens` tokens, in sequences of at most `length`.

    Args:
        dtype: of products.
        budget: bytes of GPU memory for everything, None: what is free now.
        recompute: see `plan_memory`.
        reference: run transformers' own layers, for comparison.
        graphs: capture passes where that is possible: on CUDA, with every layer fused.
        shapes: "many" if passes come in several shapes, each of which is captured.
        joinable: tokens of a pass over so many micro-batches at once, where those may take the place of single ones.
    """
    sizes = measure(model, tokens, length, dtype)
    space = _all_there_is(model) if budget is None else budget
    on_gpu = model.get_output_embeddings().weight.is_cuda
    # Two rope types read the longest position on the host in every pass, which a capture cannot.
    fixed_rope = (model.config.rope_parameters or {}).get("rope_type", "default") not in ("dynamic", "longrope")
    all_fused = plan_routes(model, reference=reference).counts.get("fused layer", 0) == sizes.layers
    graphs = graphs and on_gpu and fixed_rope and all_fused
    # A CPU gains nothing by larger passes, and a mask of tokens by tokens (layers not fused) grows with their square.
    larger = {count: n for count, n in joinable.items() if n <= MOST_TOKENS} if on_gpu and all_fused else {}
    sized = {1: sizes} | {count: replace(sizes, tokens=n) for count, n in larger.items()}
    options: dict[str, Any] = {"host": on_gpu and not reference, "graphs": graphs, "many_shapes": shapes == "many"}
    shared = {count: share_memory(each, space, recompute, **options) for count, each in sized.items()}
    joined = join(shared, sized, space, as_kept=budget is None)
    memory, graphs, reserve = shared[joined]
    if memory.host_embedding:
        embedding_to_host(model)
    plan = route(model, memory=memory, residual_dtype=stream_dtype(dtype), reference=reference)
    if not all_fused and recompute != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Plans(plan, memory, graphs, reserve, joined)


def share_memory(
    sizes: Sizes, budget: int, recompute: Recompute, *, host: bool, graphs: bool, many_shapes: bool
) -> Shared:
    """What is kept, whether graphs have a place beside it, and what their pool takes in advance (`passes.Passes`).

    Passes of all shapes, warm-ups and captures alike, share one pool, so one pass is what the budget has to hold. With
    many shapes the pool needs some room between blocks (PACKED), and left to itself it grows with every larger shape
    (GROWTH). Where the budget has no room for that, the pool takes what the largest pass needs in one piece at once.
    Where that does not fit, passes run eagerly and have all of the budget.
    """
    if graphs and many_shapes:
        packed = sizes.static + int((budget - sizes.static) * PACKED)
        plan = plan_memory(sizes, packed, recompute, host=host)
        if plan.estimate <= packed:
            lasting = sizes.static - (sizes.embedding if plan.host_embedding else 0) + WORKSPACES
            lasting += plan.layers_unpacked * sizes.unpacked
            one = min(int((plan.estimate - lasting) / PACKED), budget - lasting)
            return Shared(plan, True, one if lasting + GROWTH * one > budget else 0)
        graphs = False
    return Shared(plan_memory(sizes, budget, recompute, host=host), graphs, 0)


def join(shared: Mapping[int, Shared], sizes: Mapping[int, Sizes], budget: int, *, as_kept: bool) -> int:
    """How many micro-batches of a step go into one pass, 1 among them: the fastest that fits.

    A step's loss is a mean over all that its micro-batches hold, so one pass over several is the same step. It saves
    the time around a pass and unpacks weights once, and it may leave less room to keep what the backward needs, which
    is then computed again: the sum of these times is least. Graphs are never given up for it.

    Args:
        shared, sizes: of a pass over so many.
        as_kept: take only what computes no more again than single micro-batches do: nobody asked for less memory.
    """

    def again(count: int) -> float:
        """Operations a token that are no training: what is computed again, and unpacking counted as such."""
        of, memory = sizes[count], shared[count].memory
        layer = of.mlp_products + of.attention_products + (of.unpacking_always if of.packed else 0.0)
        return (of.layers * layer - memory.saved) / of.tokens

    def seconds(count: int) -> float:
        """A token."""
        return PASS_SECONDS / sizes[count].tokens + again(count) / PRODUCTS

    def fits(count: int) -> bool:
        memory, graphs, _ = shared[count]
        more = again(count) > again(1) + 1  # of some 10^9: not by rounding alone
        return memory.estimate <= budget and graphs >= shared[1].graphs and not (as_kept and more)

    return min([1, *filter(fits, shared)], key=seconds)


def _all_there_is(model: Any) -> int:
    """Free memory and what the model holds of it already; without a GPU, no limit worth planning for."""
    device = model.get_output_embeddings().weight.device
    if device.type != "cuda":
        return 1 << 62
    free, _ = torch.cuda.mem_get_info(device)
    return int((free + torch.cuda.memory_allocated(device)) * ROOM)
