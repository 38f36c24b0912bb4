"""Memory that a checkpoint asks of a GPU, to train an adapter and to serve it: arithmetic from the geometry.

Training, 4 x 2,048 tokens a pass, every layer recomputed, adapters of rank 64 on all seven linears:

    weights      2 bytes a number; QLoRA: linears of the layers in NF4 with double quantisation (block 64, second block
                 256): 1/2 + 1/64 + 4/(64 * 256) = 0.516 bytes, the rest in 16 bit
    adapter      rank (in + out) numbers a linear, 16 bytes each: fp32 weight and gradient, AdamW's two fp32 moments
    activations  the input of each layer (2 bytes), and at the peak either one layer at work (inputs, outputs and their
                 gradients of attention and MLP) or the head with its loss in chunks of 1,024 logit rows (fp32 and a
                 16-bit gradient), with QLoRA one layer's weights unpacked besides

What a framework adds (allocator, CUDA context: 1 to 2 GB) is not in it, what moves to the host not subtracted. Serving:
weights in 16 bit and as stored, and a KV cache of 16 bit.

Measured beside it, Qwen1.5-7B with QLoRA and these settings on an H200 (benchmarks/results/train_step.json), where this
says 12.5 GB: Liger on transformers, which holds all of it on the device, peaked at 11.4, 8 % less; Unsloth at 10.4 with
the layer inputs (2.1) on the host, 1 % more than this less those. `qwen2tool train` has no one figure: its plan fits
the budget it is given, down to 5.3 GB for a sequence of 1,024 tokens at rank 8 (`qwen2tool routes` prints the plan).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwen2tool.checkpoint.geometry import Geometry

RANK = 64
SEQUENCES, LENGTH = 4, 2048
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
ADAPTER_BYTES = 16
HEAD_ROWS, HEAD_BYTES = 1024, 6
CACHED_TOKENS = 1000


def linears(shape: Geometry) -> Iterator[tuple[int, int]]:
    """(in, out) of the seven linears of a layer."""
    hidden, inter = shape.hidden_size, shape.intermediate_size
    q, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    yield from ((hidden, q), (hidden, kv), (hidden, kv), (q, hidden), (hidden, inter), (hidden, inter), (inter, hidden))


def memory_section(shape: Geometry, parameters: int, stored_bytes: int) -> dict[str, Any]:
    """The `memory` section of a report, in bytes; `parameters` counts a tied head once."""
    packed = shape.num_hidden_layers * sum(a * b for a, b in linears(shape))
    rank_numbers = shape.num_hidden_layers * RANK * sum(a + b for a, b in linears(shape))
    layer, head = _activations(shape)
    unpacked = 2 * packed // shape.num_hidden_layers
    ways = {
        "lora": (2 * parameters, max(layer, head)),
        "qlora": (round(2 * (parameters - packed) + NF4_BYTES * packed), max(layer + unpacked, head)),
    }
    inputs = 2 * shape.num_hidden_layers * SEQUENCES * LENGTH * shape.hidden_size
    train = {}
    for name, (weights, peak) in ways.items():
        parts = {"weights": weights, "adapter": ADAPTER_BYTES * rank_numbers, "activations": inputs + peak}
        train[name] = {**parts, "total": sum(parts.values())}
    cache = 2 * 2 * CACHED_TOKENS * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    return {
        "rank": RANK,
        "sequences": SEQUENCES,
        "length": LENGTH,
        "train": train,
        "serve": {"weights_16_bit": 2 * parameters, "weights_stored": stored_bytes, "kv_cache_1000_tokens": cache},
    }


def _activations(shape: Geometry) -> tuple[int, int]:
    """Bytes at the peak beside the layers' inputs: of one layer at work, and of the head at work."""
    tokens, hidden = SEQUENCES * LENGTH, shape.hidden_size
    q, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    columns = 2 * (q + 2 * kv + q) + 4 * shape.intermediate_size + 4 * hidden
    return 2 * tokens * columns, HEAD_ROWS * shape.vocab_size * HEAD_BYTES + 2 * tokens * hidden
