"""Puts a model under training on the fast path: measures it, plans memory, moves what waits on the host, routes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from qwen2tool.routing.memory import MemoryPlan, Recompute, Sizes, plan_memory
from qwen2tool.routing.plan import RoutePlan
from qwen2tool.routing.swap import route

OPTIMIZER_BYTES = 12
"""Beside an fp32 parameter: its gradient and AdamW's two moments, fp32 each."""
ROOM = 0.92
"""The share of free memory that a plan without a budget fills: the allocator needs some between blocks."""


def measure(model: Any, tokens: int, length: int, dtype: torch.dtype) -> Sizes:
    """What the memory plan has to know of `model` for passes of `tokens` tokens, `length` the longest sequence."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    ranks = [p.shape[0] for name, p in model.named_parameters() if ".lora_A." in name]
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    movable = table.is_cuda and _may_wait_on_host(model)
    quantised = sum(_hidden_bytes(p) for p in parameters)
    return Sizes(
        tokens=tokens,
        length=length,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        query_columns=config.num_attention_heads * head_dim,
        kv_columns=config.num_key_value_heads * head_dim,
        vocabulary=config.vocab_size,
        rank_columns=max(ranks, default=0),
        itemsize=dtype.itemsize,
        static=sum(p.numel() * p.element_size() for p in parameters if p.is_cuda or not head.is_cuda)
        + quantised
        + trainable * OPTIMIZER_BYTES,
        embedding=table.numel() * table.element_size() if movable else 0,
        embedding_on_host=head.is_cuda and not table.is_cuda,
        bus=_bus_rate(head.device) if head.is_cuda else Sizes.bus,
    )


def _may_wait_on_host(model: Any) -> bool:
    return not model.config.tie_word_embeddings and not model.get_input_embeddings().weight.requires_grad


def embedding_to_host(model: Any) -> None:
    """Moves a frozen, untied embedding table into pinned memory, where the fast path reads it row by row.

    Called right after loading where memory is short, so that adapters and optimizer never meet it on the device.
    """
    table = model.get_input_embeddings().weight
    if table.is_cuda and _may_wait_on_host(model):
        table.data = table.data.cpu().pin_memory()
        torch.cuda.empty_cache()


def _bus_rate(device: torch.device) -> float:
    """Bytes a second from the device to pinned memory, of 64 MB; 3 ms."""
    source = torch.empty(1 << 26, dtype=torch.uint8, device=device)
    target = torch.empty(source.shape, dtype=torch.uint8, pin_memory=True)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    target.copy_(source, non_blocking=True)
    begin.record()
    target.copy_(source, non_blocking=True)
    end.record()
    end.synchronize()
    return float(source.numel() / (begin.elapsed_time(end) / 1e3))


def _hidden_bytes(parameter: torch.Tensor) -> int:
    """Scales of a 4-bit weight, which are no parameters of their own."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return 0
    nested = state.state2.absmax.numel() * 4 if state.nested else 0
    return int(state.absmax.numel() * state.absmax.element_size() + nested)


class Plans(NamedTuple):
    """What runs, what is kept, and whether passes are replayed from CUDA graphs."""

    routes: RoutePlan
    memory: MemoryPlan
    graphs: bool

    def __str__(self) -> str:
        layers = ", ".join(f"{count} x {what}" for what, count in self.routes.counts.items())
        kept = ", ".join(f"{count} x {what}" for what, count in self.memory.describe()["keep"].items() if count)
        moved = [
            f"{self.memory.host_inputs} layer inputs on the host" if self.memory.host_inputs else "",
            f"gate and up of {len(self.memory.host_gate_up)} on the host" if self.memory.host_gate_up else "",
            "embedding on the host" if self.memory.host_embedding else "",
            "CUDA graphs" if self.graphs else "",
        ]
        return "; ".join([f"layers {layers}", f"kept {kept}", *filter(None, moved)])

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
) -> Plans:
    """Routes `model` in place for passes of at most `tokens` tokens, in sequences of at most `length`.

    Args:
        dtype: of products. float16 holds the stream between layers in fp32: Qwen2's reaches past fp16's range.
        budget: bytes of GPU memory for everything, None: what is free now.
        recompute: see `plan_memory`.
        reference: run transformers' own layers, for comparison.
        graphs: capture passes where that is possible: on CUDA, with every layer fused.
    """
    sizes = measure(model, tokens, length, dtype)
    if budget is None:
        budget = _all_there_is(model)
    memory = plan_memory(sizes, budget, recompute, host=model.get_output_embeddings().weight.is_cuda and not reference)
    if memory.host_embedding:
        embedding_to_host(model)
    residual = torch.float32 if dtype == torch.float16 else None
    plan = route(model, memory=memory, residual_dtype=residual, reference=reference)
    fused = plan.counts.get("fused layer", 0) == sizes.layers
    if not fused and recompute != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    on_gpu = model.get_output_embeddings().weight.is_cuda
    return Plans(plan, memory, graphs and fused and on_gpu)


def _all_there_is(model: Any) -> int:
    """Free memory and what the model holds of it already; without a GPU, no limit worth planning for."""
    device = model.get_output_embeddings().weight.device
    if device.type != "cuda":
        return 1 << 62
    free, _ = torch.cuda.mem_get_info(device)
    return int((free + torch.cuda.memory_allocated(device)) * ROOM)
