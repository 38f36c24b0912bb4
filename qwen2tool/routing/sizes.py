"""What the memory plan has to know of a model: shapes and bytes, read off the model, loaded or on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qwen2tool.routing.memory import GROUPS, Sizes

OPTIMIZER_BYTES = 12
"""Beside an fp32 parameter: its gradient and AdamW's two moments, fp32 each."""


def measure(model: Any, tokens: int, length: int, dtype: torch.dtype) -> Sizes:
    """`model`, in training, for passes of `tokens` tokens, `length` the longest sequence.

    A meta model counts as one on a GPU: its plan is that of the model once it is loaded there.
    """
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    named = list(model.named_parameters())
    trainable = sum(p.numel() for _, p in named if p.requires_grad)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    on_device = head.is_cuda or head.is_meta
    movable = table.device == head.device and on_device and may_wait_on_host(model)
    return Sizes(
        tokens=tokens,
        length=length,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        query_columns=config.num_attention_heads * head_dim,
        kv_columns=config.num_key_value_heads * head_dim,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
        rank_columns=max((p.shape[0] for name, p in named if ".lora_A." in name), default=0),
        itemsize=dtype.itemsize,
        stream_itemsize=(stream_dtype(dtype) or dtype).itemsize,
        static=sum(_bytes(p) for _, p in named if p.device == head.device) + trainable * OPTIMIZER_BYTES,
        embedding=table.numel() * table.element_size() if movable else 0,
        embedding_on_host=on_device and table.device != head.device,
        bus=_bus_rate(head.device) if head.is_cuda else Sizes.bus,
        packed=any(getattr(p, "quant_type", None) for p in model.parameters()),
        adapted=frozenset(_group(name) for name, _ in named if ".lora_A." in name) & GROUPS,
        masked=any(isinstance(m, nn.Dropout) and m.p > 0 for n, m in model.named_modules() if "lora_dropout" in n),
    )


def _group(name: str) -> str:
    """The group of linears that a parameter of an adapter belongs to."""
    linear = name.split(".lora_")[0].rsplit(".", 1)[-1].removesuffix("_proj")
    return {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}.get(linear, linear)


def stream_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype between layers where it is not that of products: fp32 for float16, past whose range Qwen2's goes."""
    return torch.float32 if dtype == torch.float16 else None


def may_wait_on_host(model: Any) -> bool:
    """Whether the embedding table is frozen and no head hangs on it."""
    return not model.config.tie_word_embeddings and not model.get_input_embeddings().weight.requires_grad


def _bytes(parameter: torch.Tensor) -> int:
    """With the scales of a 4-bit weight, which are no parameters of their own; adapters count as fp32."""
    state = getattr(parameter, "quant_state", None)
    if parameter.is_meta and getattr(parameter, "quant_type", None):
        blocks = parameter.numel() // 64
        return parameter.numel() // 2 + blocks + blocks // 256 * 4
    size = parameter.numel() * (4 if parameter.requires_grad else parameter.element_size())
    if state is None:
        return size
    nested = state.state2.absmax.numel() * 4 if state.nested else 0
    return size + int(state.absmax.numel() * state.absmax.element_size() + nested)


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
