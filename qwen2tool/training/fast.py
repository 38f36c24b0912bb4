"""Puts a model under training on the fast path: measures it, plans memory, moves what waits on the host, routes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch

from qwen2tool.kernels.attention import repeats_kv
from qwen2tool.routing.host import Homes
from qwen2tool.routing.memory import WORKSPACES, MemoryPlan, Recompute, plan_memory
from qwen2tool.routing.plan import RoutePlan, find_stack, plan_routes
from qwen2tool.routing.sizes import PRODUCTS, Sizes, may_wait_on_host, measure, stream_dtype
from qwen2tool.routing.swap import route
from qwen2tool.training.batches import bucket

ROOM = 0.92
"""The share of free memory that a plan without a budget fills: the allocator needs some between blocks."""
PACKED = 0.95
"""The share of a pool that passes of several shapes fill: blocks of one shape leave gaps for those of another."""
GROWTH = 2.0
"""A pool at worst, in passes of the largest shape, where each larger one found no block that it could use again: the
sum of all `batches.parts` of a pass."""
MOST_TOKENS = 8192
"""Of a pass that a step is cut into. From some 4096 on a Hopper GPU is busy with products, and a larger pass gains
nothing more; what it fills up and what it keeps grow on."""
PIECES = 500_000_000
"""Bytes left in pieces that are worth the seconds of `compact`."""
PASS_SECONDS = 0.01
"""What a replayed pass costs beside its products: inputs, launch, the guard's wait, a Trainer's loop around them."""


def embedding_to_host(model: Any) -> None:
    """Moves a frozen, untied embedding table into pinned memory, where the fast path reads it row by row.

    Called right after loading where memory is short, so that adapters and optimizer never meet it on the device; and
    for a copied model, whose table is on the host and not pinned. A forked process reads zeros there (`host.pinned`).
    """
    table, on_gpu = model.get_input_embeddings().weight, model.get_output_embeddings().weight.is_cuda
    if on_gpu and not table.is_pinned() and may_wait_on_host(model):
        _move([table])
        torch.cuda.empty_cache()


def settle(model: Any) -> None:
    """Puts on the host what the plan of a routed model has there, once that is where it stays: trainers move models.

    Called before any pass: graphs know weights and places by their addresses.
    """
    (stack, _), head = find_stack(model), model.get_output_embeddings().weight
    if stack.memory is not None and stack.memory.host_embedding:
        embedding_to_host(model)
    stack.settle()
    if stack.memory is not None and stack.memory.host_weights and head.is_cuda:
        stack.host_weights.free_places()  # or they would hold what is to be given back
        if _in_pieces() > PIECES:
            compact(model, head.device)
        stack.host_weights.make_places()


def _in_pieces() -> int:
    """Bytes that torch holds of the device and nothing lives in, though all that can be has been given back."""
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def compact(model: Any, device: torch.device) -> None:
    """Moves what a model has on `device` out and in again, so that the memory between its tensors is given back.

    transformers has the weights loaded into one block of the allocator's. What has left it leaves holes there that no
    pass can use, since passes have a pool of their own. Parameters stay the objects that they are.
    """
    states = [state for p in model.parameters() if (state := getattr(p, "quant_state", None)) is not None]
    nested = [state.state2 for state in states if state.state2 is not None]
    scales = [getattr(state, name, None) for state in (*states, *nested) for name in ("absmax", "code", "offset")]
    found = {id(t): t for t in (*model.parameters(), *model.buffers(), *scales) if torch.is_tensor(t)}
    tensors = [tensor for tensor in found.values() if tensor.device == device]
    _move(tensors)
    torch.cuda.empty_cache()
    for tensor in tensors:
        tensor.data = tensor.data.to(device, copy=True)


def _move(tensors: Sequence[torch.Tensor]) -> None:
    """Moves `tensors` into pinned memory; they stay the objects that they are."""
    for tensor, place in zip(tensors, Homes.of(tensors).places, strict=True):
        tensor.data = place.copy_(tensor.data)


class Shared(NamedTuple):
    """See `share_memory`; `reserve` is in bytes."""

    memory: MemoryPlan
    graphs: bool
    reserve: int


class Plans(NamedTuple):
    """What runs, what is kept, whether passes are replayed from CUDA graphs, what those reserve (bytes), and the tokens
    of a pass where a step is cut into passes by tokens, None where a micro-batch is one."""

    routes: RoutePlan
    memory: MemoryPlan
    graphs: bool
    reserve: int
    cut: int | None

    def __str__(self) -> str:
        layers = ", ".join(f"{count} x {what}" for what, count in self.routes.counts.items())
        kept = str(self.memory) if "fused layer" in self.routes.counts else ""
        graphs = "CUDA graphs" if self.graphs else ""
        cut = f"passes of up to {self.cut} tokens" if self.cut else ""
        return "; ".join(filter(None, [f"layers {layers}", kept, graphs, cut]))

    def to_json(self) -> dict[str, Any]:
        """Plain values; modules by name."""
        return {
            "modules": self.routes.to_json(),
            "memory": self.memory.describe(),
            "graphs": self.graphs,
            "tokens_a_pass": self.cut,
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
    cuts: Sequence[int] = (),
) -> Plans:
    """Routes `model` in place for passes of at most `tokens` tokens, in sequences of at most `length`.

    Args:
        dtype: of products.
        budget: bytes of GPU memory for everything, None: what is free now.
        recompute: see `plan_memory`.
        reference: run transformers' own layers, for comparison.
        graphs: capture passes where that is possible: on CUDA, with every layer fused.
        shapes: "many" if passes come in several shapes, each of which is captured.
        cuts: tokens that passes may have at most instead, the least of them those of the longest record: a step is
            then cut into passes of the best of these, where there is a choice.
    """
    all_fused, on_gpu = plan_routes(model, reference=reference).all_fused, model.get_output_embeddings().weight.is_cuda
    sizes = measure(model, tokens, length, dtype, all_fused=all_fused)
    if not on_gpu:
        sizes = replace(sizes, packed=False)  # where nothing limits the memory, 4 bits are there to save it
    elif shapes == "many" and repeats_kv():
        sizes = replace(sizes, repeated_kv=sizes.kv_columns < sizes.query_columns)
    space = _all_there_is(model) if budget is None else budget
    # Two rope types read the longest position on the host in every pass, which a capture cannot.
    fixed_rope = (model.config.rope_parameters or {}).get("rope_type", "default") not in ("dynamic", "longrope")
    graphs = graphs and on_gpu and fixed_rope and all_fused
    # A CPU gains nothing by larger passes, and a mask of tokens by tokens (layers not fused) grows with their square.
    choice = cuts if cuts and on_gpu and all_fused else (tokens,)
    sized = {count: replace(sizes, tokens=count) for count in choice}
    options: dict[str, Any] = {"host": on_gpu and not reference, "graphs": graphs, "many_shapes": shapes == "many"}
    shared = {count: share_memory(each, space, recompute, **options) for count, each in sized.items()}
    best = best_cut(shared, sized, space, as_kept=budget is None)
    memory, graphs, reserve = shared[best]
    plan = route(model, memory=memory, residual_dtype=stream_dtype(dtype), reference=reference)
    settle(model)
    if not all_fused and recompute != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Plans(plan, memory, graphs, reserve, best if choice is cuts else None)


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
        guess = min(sizes.static, budget)
        for _ in range(3):  # less may last than was guessed, and the pool be larger
            plan = plan_memory(sizes, _packed(guess, budget), recompute, host=host)
            lasting = _lasting(sizes, plan)
            if plan.estimate <= _packed(lasting, budget):
                one = min(int((plan.estimate - lasting) / PACKED), budget - lasting)
                return Shared(plan, True, one if lasting + GROWTH * one > budget else 0)
            guess = min(guess, lasting)
        graphs = False
    return Shared(plan_memory(sizes, budget, recompute, host=host), graphs, 0)


def _packed(lasting: int, budget: int) -> int:
    """What a plan may come to beside what lasts: a pool is filled to PACKED."""
    return lasting + int((budget - lasting) * PACKED)


def _lasting(sizes: Sizes, plan: MemoryPlan) -> int:
    """Bytes that stay from one pass to the next."""
    away = (sizes.embedding if plan.host_embedding else 0) + sizes.gone(plan.host_weights)
    return WORKSPACES + sizes.static - away + plan.layers_unpacked * sizes.unpacked


def cuts(longest: int, step: int) -> list[int]:
    """The sizes of passes to choose from: the longest record, filled up to a multiple of 128, and those of `bucket`
    from there to that of the largest step, MOST_TOKENS or less where a record allows it."""
    found = [-(-longest // 128) * 128]
    while found[-1] < min(step, MOST_TOKENS):
        found.append(bucket(found[-1] + 1))
    return found


def best_cut(shared: Mapping[int, Shared], sizes: Mapping[int, Sizes], budget: int, *, as_kept: bool) -> int:
    """How many tokens a pass has at most: the fastest that fits, the fewest where none does.

    A step's loss is a mean over all that its passes hold, so that it is the same step however it is cut. A larger pass
    saves the time around passes and unpacks weights less often, and it may leave less room to keep what the backward
    needs, which is then computed again: the sum of these times is least. Graphs are never given up for it.

    Args:
        shared, sizes: of passes of so many tokens.
        as_kept: take only what computes no more again than the smallest passes do: nobody asked for less memory.
    """
    least = min(shared)

    def again(count: int) -> float:
        """Operations a token that are no training: what is computed again, and unpacking counted as such."""
        of, memory = sizes[count], shared[count].memory
        layer = of.mlp_products + of.attention_products + (of.unpacking_always if of.packed else 0.0)
        return (of.layers * layer - memory.saved) / of.tokens

    def seconds(count: int) -> float:
        """A token."""
        return PASS_SECONDS / count + again(count) / PRODUCTS

    def fits(count: int) -> bool:
        memory, graphs, _ = shared[count]
        more = again(count) > again(least) + 1  # of some 10^9: not by rounding alone
        return memory.estimate <= budget and graphs >= shared[least].graphs and not (as_kept and more)

    return min([least, *filter(fits, shared)], key=seconds)


def _all_there_is(model: Any) -> int:
    """Free memory and what the model holds of it already; without a GPU, no limit worth planning for."""
    device = model.get_output_embeddings().weight.device
    if device.type != "cuda":
        return 1 << 62
    free, _ = torch.cuda.mem_get_info(device)
    return int((free + torch.cuda.memory_allocated(device)) * ROOM)
