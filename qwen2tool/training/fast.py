"""Puts a model under training on the fast path: measures it, plans memory, moves what waits on the host, routes."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from qwen2tool.routing.memory import MemoryPlan, Recompute, Sizes, plan_memory
from qwen2tool.routing.plan import RoutePlan, plan_routes
from qwen2tool.routing.sizes import may_wait_on_host, measure, stream_dtype
from qwen2tool.routing.swap import route

ROOM = 0.92
"""The share of free memory that a plan without a budget fills: the allocator needs some between blocks."""


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


class Plans(NamedTuple):
    """What runs, what is kept, and whether passes are replayed from CUDA graphs."""

    routes: RoutePlan
    memory: MemoryPlan
    graphs: bool

    def __str__(self) -> str:
        layers = ", ".join(f"{count} x {what}" for what, count in self.routes.counts.items())
        kept = str(self.memory) if "fused layer" in self.routes.counts else ""
        return "; ".join(filter(None, [f"layers {layers}", kept, "CUDA graphs" if self.graphs else ""]))

    def to_json(self) -> dict[str, Any]:
        """Plain values; modules by name."""
        return {"modules": self.routes.to_json(), "memory": self.memory.describe(), "graphs": self.graphs}


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
) -> Plans:
    """Routes `model` in place for passes of at most `tokens` tokens, in sequences of at most `length`.

    Args:
        dtype: of products.
        budget: bytes of GPU memory for everything, None: what is free now.
        recompute: see `plan_memory`.
        reference: run transformers' own layers, for comparison.
        graphs: capture passes where that is possible: on CUDA, with every layer fused.
        shapes: "many" if passes come in several shapes, each of which is captured.
    """
    sizes = measure(model, tokens, length, dtype)
    if budget is None:
        budget = _all_there_is(model)
    on_gpu = model.get_output_embeddings().weight.is_cuda
    # Two rope types read the longest position on the host in every pass, which a capture cannot.
    fixed_rope = (model.config.rope_parameters or {}).get("rope_type", "default") not in ("dynamic", "longrope")
    all_fused = plan_routes(model, reference=reference).counts.get("fused layer", 0) == sizes.layers
    graphs = graphs and on_gpu and fixed_rope and all_fused
    memory, graphs = share_memory(
        sizes, budget, recompute, host=on_gpu and not reference, graphs=graphs, many_shapes=shapes == "many"
    )
    if memory.host_embedding:
        embedding_to_host(model)
    plan = route(model, memory=memory, residual_dtype=stream_dtype(dtype), reference=reference)
    if not all_fused and recompute != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Plans(plan, memory, graphs)


def share_memory(
    sizes: Sizes, budget: int, recompute: Recompute, *, host: bool, graphs: bool, many_shapes: bool
) -> tuple[MemoryPlan, bool]:
    """(the plan, whether graphs have a place in it).

    A captured pass keeps its memory. The next shape runs once on its own before it is captured, so with many shapes the
    budget above what always stays has to hold two passes; where it does not, passes run eagerly and have it all.
    """
    if graphs and many_shapes:
        half = sizes.static + (budget - sizes.static) // 2
        plan = plan_memory(sizes, half, recompute, host=host)
        if plan.estimate <= half:
            return plan, True
        graphs = False
    return plan_memory(sizes, budget, recompute, host=host), graphs


def _all_there_is(model: Any) -> int:
    """Free memory and what the model holds of it already; without a GPU, no limit worth planning for."""
    device = model.get_output_embeddings().weight.device
    if device.type != "cuda":
        return 1 << 62
    free, _ = torch.cuda.mem_get_info(device)
    return int((free + torch.cuda.memory_allocated(device)) * ROOM)
