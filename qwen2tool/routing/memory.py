"""The memory plan: what each layer keeps for its backward, and where, so that a run is the fastest that fits a budget.

Legend: N tokens a pass, H hidden, I intermediate, Q and KV columns of q and of k or v, R summed ranks, s bytes of the
compute dtype. A layer keeps its input (N H s) in any case. "attention" keeps q, k, v, attention's output and h besides,
N s (2 Q + 2 KV + H), and saves the products of q, k, v and o and attention itself; "mlp" keeps gate and up,
N s (2 I + R), and saves their product; "all" keeps both. Each saves about 5.5 ms a GB on a Hopper GPU. Inputs, and gate
and up of as many layers as the bus carries while the forward computes, may wait on the host instead, and so may an
untied embedding table, and the 4-bit weights of all layers but the first and the last while others are at work. What is
left of the budget lifts layers, the last ones first: theirs is the memory that the backward frees first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, get_args

from qwen2tool.routing.host import LAG
from qwen2tool.routing.layer import Keep
from qwen2tool.routing.sizes import COPIES, PRODUCTS, Sizes

Recompute = Literal["auto", "all", "none"]
WORKSPACES = 80_000_000
"""What libraries hold on a GPU beside it: cuBLAS 34 MB for the one thread that launches, cuDNN the rest."""
CHUNKS = (1024, 512, 256, 128, 64, 32, 16)
"""Logits at a time to choose from."""
SPARED = (0, 2, 4)
"""So many layers before the last, which never has, have no gate and up on the host: where the backward begins memory is
scarcest, and what comes back for them would have to be there then."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a run keeps where.

    Attributes:
        keep: a level for each layer.
        host_inputs: so many layers, from the first, keep their input on the host.
        host_gate_up: these layers keep gate and up, on the host.
        host_embedding: the embedding table waits on the host.
        host_weights: so many layers, from the second, have their 4-bit weights on the host while others are at work.
        head_rows: logits at a time, None for the op's own choice.
        frugal: weights are unpacked again instead of held from the recomputation to the backward.
        tails: drop(x) A^T is kept, which costs little and saves little.
        layers_unpacked: so many layers, from the first, keep their 4-bit weights unpacked all the time.
        estimate: bytes at the peak.
        saved: products that the backward need not repeat, in floating-point operations.
    """

    keep: tuple[Keep, ...]
    host_inputs: int = 0
    host_gate_up: frozenset[int] = frozenset()
    host_embedding: bool = False
    head_rows: int | None = None
    frugal: bool = False
    tails: bool = True
    layers_unpacked: int = 0
    host_weights: int = 0
    estimate: int = 0
    saved: float = 0.0

    @property
    def layers_away(self) -> frozenset[int]:
        """Those of `host_weights`; the first one is needed before anything could have brought it."""
        return frozenset(range(1, self.host_weights + 1))

    def __str__(self) -> str:
        kept = ", ".join(f"{count} x {level}" for level, count in self.describe()["keep"].items() if count)
        moved = (
            f"{self.host_inputs} layer inputs on the host" if self.host_inputs else "",
            f"gate and up of {len(self.host_gate_up)} on the host" if self.host_gate_up else "",
            "embedding on the host" if self.host_embedding else "",
            f"4-bit weights of {self.host_weights} on the host" if self.host_weights else "",
            f"weights of {self.layers_unpacked} unpacked" if self.layers_unpacked else "",
        )
        return "; ".join([f"kept {kept}", *filter(None, moved)])

    def describe(self) -> dict[str, Any]:
        """Plain values for a log and a report."""
        return {
            "keep": {level: self.keep.count(level) for level in get_args(Keep)},
            "layer_inputs_on_host": self.host_inputs,
            "gate_up_on_host": len(self.host_gate_up),
            "embedding_on_host": self.host_embedding,
            "weights_on_host": self.host_weights,
            "head_rows": self.head_rows,
            "frugal": self.frugal,
            "tails": self.tails,
            "layers_unpacked": self.layers_unpacked,
            "estimated_bytes": self.estimate,
        }


def plan_memory(sizes: Sizes, budget: int, recompute: Recompute = "auto", *, host: bool = True) -> MemoryPlan:
    """The fastest plan whose estimate stays within `budget` bytes; the smallest one where none does.

    Args:
        recompute: "all" and "none" fix what layers keep; "auto" fills the budget.
        host: whether anything may wait on the host.
    """
    plans = list(_candidates(sizes, recompute, host))
    fitting = [plan for plan in plans if plan.estimate <= budget]
    if not fitting:
        return min(plans, key=lambda plan: plan.estimate)
    if recompute != "auto":
        return max(fitting, key=lambda plan: plan.saved)
    # In the order of what they may come to, and no further than that can be the best.
    best: MemoryPlan | None = None
    bounds = [(_most(sizes, plan, budget), plan) for plan in fitting]
    for bound, plan in sorted(bounds, key=lambda pair: -pair[0]):
        if best is not None and bound < best.saved:
            break
        lifted = _lift(sizes, plan, budget)
        if best is None or lifted.saved > best.saved:
            best = lifted
    assert best is not None
    return best


def _most(sizes: Sizes, plan: MemoryPlan, budget: int) -> float:
    """As much as `_lift` can make `plan` save, or more: the best rate a byte, for what is left of the budget, for what
    the last layer keeps for nothing and for what a layer on its way from the host leaves below the peak."""
    rates = [sizes.attention_products / sizes.attention, sizes.mlp_products / sizes.mlp]
    if sizes.packed and sizes.adapted:
        rates.append(sizes.unpacking_always / sizes.unpacked)
    return plan.saved + max(rates) * (budget - plan.estimate + sizes.attention + (LAG + 1) * sizes.mlp)


def _candidates(sizes: Sizes, recompute: Recompute, host: bool) -> Iterator[MemoryPlan]:
    """Ways to spend the host's memory and bus, before the device's is filled."""
    level: Keep = "all" if recompute == "none" else "input"
    # The last layer's weights are at work where the backward begins, wherever they wait.
    counts = (0, (sizes.layers - 2) // 2, sizes.layers - 2) if host else (0,)
    away = [count for count in counts if count == 0 or sizes.gone(count) > 0]
    embeddings = (True,) if sizes.embedding_on_host else (False, True) if sizes.embedding and host else (False,)
    for host_embedding in embeddings:
        for host_inputs in (0, sizes.layers - 1) if host and recompute != "none" and sizes.layers > 1 else (0,):
            shares = (0.0, sizes.gate_up_share) if host_inputs and recompute == "auto" else (0.0,)
            for share in shares:
                spared = [count for count in SPARED if count < host_inputs] if share else [0]
                for last, weights, frugal, tails, rows in product(spared, away, (False, True), (True, False), CHUNKS):
                    bare = MemoryPlan(
                        (), host_inputs, host_embedding=host_embedding, head_rows=rows, frugal=frugal, tails=tails,
                        host_weights=weights,
                    )  # fmt: skip
                    yield _plan(sizes, level, share, last, bare)


def _plan(sizes: Sizes, level: Keep, share: float, last: int, bare: MemoryPlan) -> MemoryPlan:
    """`bare` with layers that keep `level`; a `share` of those whose inputs are on the host have gate and up there, but
    none of the `last`."""
    reach = bare.host_inputs - last
    share = min(share * bare.host_inputs / max(reach, 1), 1.0)
    chosen = frozenset(i for i in range(reach) if int((i + 1) * share) > int(i * share))
    keep: tuple[Keep, ...] = tuple("mlp" if i in chosen else level for i in range(sizes.layers))
    # Reading embeddings over the bus costs a little; it breaks ties. What goes to the host and comes back takes device
    # memory's time from kernels that need it: counted twice, for they wait for each other.
    cost = bare.host_embedding * sizes.input / sizes.bus * PRODUCTS + sizes.chunking(bare.head_rows or CHUNKS[0])
    cost += 4 * (bare.host_inputs * sizes.input + len(chosen) * sizes.mlp) / COPIES * PRODUCTS
    cost += sizes.waiting(bare.host_weights, bare.host_inputs, len(chosen)) * PRODUCTS
    cost += 4 * bare.host_weights * sizes.layer_packed / COPIES * PRODUCTS
    cost += sizes.layers * ((sizes.unpacking if bare.frugal else 0.0) + (0.0 if bare.tails else sizes.tails_again))
    saved = len(chosen) * sizes.mlp_products - cost
    if level == "all":
        saved += sizes.layers * (sizes.mlp_products + sizes.attention_products)
    plan = replace(bare, keep=keep, host_gate_up=chosen, saved=saved)
    return replace(plan, estimate=peak(sizes, plan))


def peak(sizes: Sizes, plan: MemoryPlan) -> int:
    """Bytes at the highest of: each layer's forward, the head, each layer's backward.

    Layers below the one at work have what they keep, in the backward those above have given it back. So what the last
    layer keeps takes the place of what it would recompute, and costs next to nothing.
    """
    static = sizes.static - (sizes.embedding if plan.host_embedding else 0) + plan.layers_unpacked * sizes.unpacked
    static -= sizes.gone(plan.host_weights)
    attention, mlp, tails, x = sizes.attention, sizes.mlp, sizes.tails, sizes.input
    kept = [
        (tails if plan.tails else 0)
        + (attention if level in ("attention", "all") else 0)
        + (mlp if level in ("mlp", "all") and index not in plan.host_gate_up else 0)
        for index, level in enumerate(plan.keep)
    ]
    # Gate and up, kept or recomputed, are gone when attention's turn comes.
    in_mlp = sizes.mlp_backward + sizes.mlp_backward_weights(plan.frugal) + mlp
    in_layer = tails + attention + max(in_mlp, sizes.attention_backward)
    in_forward = sizes.forward
    below, highest = 0, 0
    moving = [0] * LAG + [mlp if index in plan.host_gate_up else 0 for index in range(sizes.layers)]
    for index, own in enumerate(kept):
        # Forward: its own input, with the host those of layers that are on their way there.
        inputs = min(index, LAG) + 1 if plan.host_inputs else index + 1
        forward = inputs * x + sum(moving[index : index + LAG]) + in_forward
        # Backward: its own, with the host the one of the layer below, and gates and ups of two, on their way back.
        inputs = min(index, 1) + 1 if plan.host_inputs else index + 1
        backward = inputs * x + sum(moving[index + LAG - 2 : index + LAG]) + in_layer
        highest = max(highest, below + forward, below + backward)
        below += own
    inputs = min(sizes.layers, LAG + 1) if plan.host_inputs else sizes.layers
    at_head = inputs * x + sum(moving[-LAG:]) + sizes.head(plan.head_rows or 1024)
    return WORKSPACES + static + max(highest, below + at_head)


def _lift(sizes: Sizes, plan: MemoryPlan, budget: int) -> MemoryPlan:
    """Lifts as many layers as fit, the last ones of a level first: attention of all before gate and up. What is left
    keeps weights unpacked, which saves a fifth as much a byte."""
    plan = _lift_level(sizes, plan, budget, "input", "attention", sizes.attention_products)
    plan = _lift_level(sizes, plan, budget, "mlp", "all", sizes.attention_products)
    plan = _lift_level(sizes, plan, budget, "attention", "all", sizes.mlp_products)
    if not sizes.packed or not sizes.adapted or plan.host_weights:
        return plan
    count = min((budget - plan.estimate) // sizes.unpacked, sizes.layers)
    lifted = replace(plan, layers_unpacked=count, saved=plan.saved + count * sizes.unpacking_always)
    return replace(lifted, estimate=peak(sizes, lifted))


def _lift_level(sizes: Sizes, plan: MemoryPlan, budget: int, before: Keep, after: Keep, gain: float) -> MemoryPlan:
    """The last layers at level `before` keep `after`, as many as fit; each saves `gain` operations."""
    below = [index for index, level in enumerate(plan.keep) if level == before]

    def lifted(count: int) -> MemoryPlan:
        chosen = set(below[len(below) - count :])
        keep = tuple(after if index in chosen else level for index, level in enumerate(plan.keep))
        found = replace(plan, keep=keep, saved=plan.saved + count * gain)
        return replace(found, estimate=peak(sizes, found))

    fitting = bisect_right(range(1, len(below) + 1), budget, key=lambda count: lifted(count).estimate)
    return lifted(fitting) if fitting else plan
