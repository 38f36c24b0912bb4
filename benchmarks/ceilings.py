"""What this GPU can do, and the time that a training step cannot beat: copy bandwidth, bf16 products, floors.

    python benchmarks/ceilings.py [--device cuda]

Two ceilings are measured on random data (zeros run faster): a device-to-device copy, bytes read plus bytes written, and
bf16 matrix products at 8192 cubed and at the layer shapes of a 7B. Prints one line, RESULT and JSON.

The floor of a step is arithmetic. Per token, a frozen linear of P weights costs 2 P flops forward, 2 P for dX and 2 P
more where the forward is recomputed, and no dW; the head 2 H V forward and 2 H V for dX, never recomputed; causal
attention 2 T hq D a layer forward (half of the T x T scores, two products) and 2.5 times that backward; LoRA
2 r (K + O) a linear forward, twice that backward. Bytes that no product hides: each packed weight is read and written
in 16 bit once forward and once backward, and AdamW reads four fp32 numbers a trainable parameter and writes three.
Norms, RoPE and SwiGLU are left out: they can ride in their neighbours. It is a floor for *generic* full recompute: a
memory plan that keeps more than layer inputs may go below it, down to the floor without recompute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

COPY_BYTES = 1 << 31
PRODUCTS = (
    (8192, 8192, 8192), (8192, 4096, 4096), (8192, 4096, 11008), (8192, 11008, 4096),
    (1024, 4096, 4096), (1024, 4096, 11008), (1024, 11008, 4096),
)  # fmt: skip
"""Rows, inner size, columns."""
SMOKE: dict[str, Any] = {"copy_bytes": 1 << 24, "products": ((256, 256, 256),)}
"""Arguments of `measure` for a CPU, where nothing but the script itself is tried."""
HEAD_START_CYCLES = 1_000_000
"""GPU cycles, about half a millisecond, that a timed call waits: long enough for the host to queue its launches."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight, its share of an 8-bit scale per 64 weights, and of an fp32 scale per 256 of those."""
ADAMW_BYTES = 28
"""fp32 parameter, gradient and two moments read; parameter and moments written."""


def median_seconds(
    call: Callable[[int], object], *, sets: int = 1, cuda: bool = True, repeats: int = 30, warmup: int = 5
) -> float:
    """Median time of `call(i)` on the device, for i going round `sets` input sets.

    The last `sets` results are kept alive, so that outputs go round as inputs do and are not rewritten in cache. Each
    call waits behind a short busy kernel, so that launches are queued before the first event and none of them is timed.
    """
    kept: list[object] = [None] * sets
    for number in range(max(warmup, sets + 1)):  # all the outputs' memory is there before the first timed call
        kept[number % sets] = call(number % sets)
    if not cuda:
        return statistics.median(_host_seconds(call, number % sets) for number in range(repeats))
    import torch

    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for number, (start, end) in enumerate(pairs):
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        kept[number % sets] = call(number % sets)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


def _host_seconds(call: Callable[[int], object], index: int) -> float:
    start = time.perf_counter()
    call(index)
    return time.perf_counter() - start


def copy_rate(size: int = COPY_BYTES, device: str = "cuda") -> float:
    """Bytes read plus written a second by a copy of `size` bytes."""
    import torch

    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda _: target.copy_(source), cuda=device == "cuda")


def product_rate(rows: int, inner: int, columns: int, device: str = "cuda") -> float:
    """Flops a second of one bf16 product (rows, inner) x (columns, inner)^T."""
    import torch

    a = torch.randn(rows, inner, dtype=torch.bfloat16, device=device)
    b = torch.randn(columns, inner, dtype=torch.bfloat16, device=device)
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
    seconds = median_seconds(lambda _: torch.mm(a, b.T, out=out), cuda=device == "cuda")
    return 2 * rows * inner * columns / seconds


def measure(
    device: str = "cuda", copy_bytes: int = COPY_BYTES, products: tuple[tuple[int, int, int], ...] = PRODUCTS
) -> dict[str, Any]:
    """Both ceilings: bytes and flops a second, the latter the best of `products`, and each product's own rate."""
    copy = copy_rate(copy_bytes, device)
    rates = {f"{m}x{k}x{n}": product_rate(m, k, n, device) for m, k, n in products}
    return {"copy_bytes_per_s": copy, "flops_per_s": max(rates.values()), "products": rates}


def linears(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of a decoder layer's seven projections."""
    hidden, intermediate, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv = hidden // heads * config["num_key_value_heads"]
    return {
        "q": (hidden, hidden),
        "k": (hidden, kv),
        "v": (hidden, kv),
        "o": (hidden, hidden),
        "gate": (hidden, intermediate),
        "up": (hidden, intermediate),
        "down": (intermediate, hidden),
    }


def flops_per_token(
    config: dict[str, Any], length: int, rank: int, recompute: bool, reference_pass: bool = False
) -> dict[str, float]:
    """Floating-point operations a token of a training step, by what needs them.

    Args:
        config: config.json of a Qwen2 checkpoint.
        length: tokens a sequence (T).
        rank: of LoRA on all seven projections.
        recompute: whether the backward runs each layer's forward again.
        reference_pass: whether a forward with the adapter off comes before.
    """
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    shapes = linears(config).values()
    forward = {
        "frozen": 2.0 * layers * sum(k * o for k, o in shapes),
        "attention": 2.0 * layers * length * hidden,
        "lora": 2.0 * layers * sum(rank * (k + o) for k, o in shapes),
    }
    backward = {"frozen": 1.0, "attention": 2.5, "lora": 2.0}
    passes = 2 if recompute else 1
    total = {name: count * (passes + backward[name]) for name, count in forward.items()}
    total["head"] = 4.0 * hidden * config["vocab_size"]
    if reference_pass:
        total["reference"] = forward["frozen"] + forward["attention"] + total["head"] / 2
    return total


def floor(
    config: dict[str, Any],
    ceilings: dict[str, Any],
    *,
    batch: int,
    length: int,
    rank: int,
    accumulation: int = 1,
    quantised: bool = True,
    recompute: bool = True,
    reference_pass: bool = False,
) -> dict[str, float]:
    """Milliseconds that one optimizer step cannot beat, and their parts; see the module docstring.

    Args:
        config: config.json of a Qwen2 checkpoint.
        ceilings: of `measure`.
        batch, length, accumulation: sequences, their tokens, micro-batches a step.
        rank: of LoRA on all seven projections.
        quantised: NF4 base, unpacked twice a micro-batch (three times with a reference pass); otherwise 16 bit, read by
            the products themselves.
        recompute, reference_pass: as in `flops_per_token`.
    """
    tokens = batch * length * accumulation
    flops = sum(flops_per_token(config, length, rank, recompute, reference_pass).values()) * tokens
    weights = config["num_hidden_layers"] * sum(k * o for k, o in linears(config).values())
    trainable = config["num_hidden_layers"] * sum(rank * (k + o) for k, o in linears(config).values())
    unpacked = (3 if reference_pass else 2) * accumulation * weights * (NF4_BYTES + 2) if quantised else 0.0
    parts = {
        "products_ms": 1e3 * flops / ceilings["flops_per_s"],
        "unpack_ms": 1e3 * unpacked / ceilings["copy_bytes_per_s"],
        "optimizer_ms": 1e3 * ADAMW_BYTES * trainable / ceilings["copy_bytes_per_s"],
    }
    return parts | {"ms": sum(parts.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args()
    print("RESULT " + json.dumps(measure(options.device, **(SMOKE if options.device == "cpu" else {}))))


if __name__ == "__main__":
    main()
