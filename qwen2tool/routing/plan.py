"""Which implementation each module of a model gets, and why, as data: what is printed, tested and logged.

The plan asks the very function that decides at every forward pass (`examine.examine_stack`), so it cannot claim a
fusion that does not run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from qwen2tool.errors import UserError
from qwen2tool.kernels.group import Projection
from qwen2tool.kernels.nf4 import Quantised
from qwen2tool.routing.examine import LayerSpec, NeedsBatch, NotFused, examine_head, examine_norm, examine_stack

Implementation = Literal["fused layer", "kernel", "reference"]


@dataclass(frozen=True)
class Route:
    """One module: its name in the model, what runs for it, and the reason."""

    module: str
    implementation: Implementation
    reason: str


@dataclass(frozen=True)
class RoutePlan:
    """Routes of all modules, in the order of the forward pass."""

    routes: tuple[Route, ...]

    @property
    def layers(self) -> dict[int, Route]:
        """Those of whole layers, by index."""
        last = ((route.module.rpartition(".")[2], route) for route in self.routes)
        return {int(name): route for name, route in last if name.isdigit()}

    @property
    def counts(self) -> dict[str, int]:
        """Layers by implementation, for a line of a log."""
        return dict(Counter(route.implementation for route in self.layers.values()))

    @property
    def all_fused(self) -> bool:
        """Whether every layer is."""
        return set(self.counts) == {"fused layer"}

    @property
    def left(self) -> frozenset[int]:
        """Indices of the layers that are transformers' own."""
        return frozenset(index for index, route in self.layers.items() if route.implementation == "reference")

    def to_json(self) -> list[dict[str, str]]:
        """Plain values."""
        return [vars(route).copy() for route in self.routes]


def plan_routes(model: Any, *, reference: bool = False, left: Collection[int] = ()) -> RoutePlan:
    """The plan for a transformers Qwen2 (under PEFT or not, routed already or not); nothing is touched.

    Args:
        reference: leave every layer to transformers, as `route` does with the same argument.
        left: layers to leave to transformers, as `route` does with the `left` of its plan.

    Raises:
        UserError: another architecture.
    """
    stack, prefix = find_stack(model)
    original = vars(stack).get("original", stack)
    routes = [Route(f"{prefix}.embed_tokens", "reference", "a lookup")]
    layers = _layers(original, reference, left)
    for index, layer in enumerate(layers):
        routes += _layer_routes(layer, f"{prefix}.layers.{index}")
    routes += [_norm_route(original.norm, f"{prefix}.norm", layers[-1]), *_head_routes(model, prefix)]
    return RoutePlan(tuple(routes))


def _layers(original: Any, reference: bool, left: Collection[int]) -> list[LayerSpec | NotFused]:
    """What `examine_stack` finds, or for every layer why none is fused."""
    if reference:
        return [NotFused("asked for")] * len(original.layers)
    try:
        return examine_stack(original, left)
    except NeedsBatch as why:
        return [why] * len(original.layers)


def find_stack(model: Any) -> tuple[Any, str]:
    """The inner model (`Qwen2Model` or what stands for it) and its dotted name in `model`.

    Raises:
        UserError: there is none, or it is the model itself, which nothing holds.
    """
    from transformers import Qwen2Model

    for name, module in model.named_modules():
        # Its own children: PEFT's wrappers answer for what they wrap.
        if not {"embed_tokens", "layers", "norm"} <= module._modules.keys():
            continue
        kind = getattr(getattr(module, "config", None), "model_type", None)
        if kind != "qwen2":
            raise UserError(f"the model is {kind!r}, not 'qwen2'", "Routes exist for Qwen2 alone; run it without them")
        if (own := type(vars(module).get("original", module))) is not Qwen2Model:
            raise UserError(f"{name} is a {own.__name__}, not transformers' Qwen2Model", "Run it without routes")
        if not name:
            raise UserError("a bare Qwen2Model, which nothing holds", "Give the Qwen2ForCausalLM around it")
        return module, name
    raise UserError(f"{type(model).__name__} holds no Qwen2 decoder", "Give a Qwen2ForCausalLM, with or without PEFT")


LINEARS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def _modules(name: str) -> list[str]:
    return [f"{name}.{room}.{linear}" for room, linears in LINEARS.items() for linear in linears]


def _layer_routes(layer: LayerSpec | NotFused, name: str) -> list[Route]:
    modules = _modules(name)
    if isinstance(layer, NotFused):
        return [Route(module, "reference", str(layer)) for module in (name, *modules)]
    routes = [Route(name, "fused layer", "one autograd node: norms, RoPE, centred keys, SwiGLU, residuals")]
    linears = [(projection, group.dropout) for group in layer.groups for projection in group.projections]
    for module, (projection, dropout) in zip(modules, linears, strict=True):
        routes.append(Route(module, "fused layer", _describe(module, projection, dropout, layer)))
    return routes


def _describe(module: str, projection: Projection, dropout: float, spec: LayerSpec) -> str:
    linear = module.split(".")[-1]
    weight = projection.weight
    base = "4-bit" if isinstance(weight, Quantised) else str(weight.dtype).removeprefix("torch.")
    ranks = "+".join(str(adapter.a.shape[0]) for adapter in projection.adapters)
    bias = {"q_proj": spec.q_bias, "k_proj": spec.k_bias}.get(linear, projection.bias)
    parts = [f"{base} base", f"LoRA rank {ranks}" if ranks else "no adapter"]
    if ranks and dropout:
        parts.append(f"dropout {dropout:g}")
    if bias is not None:
        parts.append("bias in fp32 with RoPE" if linear in ("q_proj", "k_proj") else "bias in the product")
    return ", ".join(parts)


def _norm_route(norm: Any, name: str, last: LayerSpec | NotFused) -> Route:
    """The last norm; it is transformers' own where the whole pass is."""
    try:
        if isinstance(last, NeedsBatch):
            raise last
        examine_norm(norm)
    except NotFused as why:
        return Route(name, "reference", str(why))
    return Route(name, "kernel", "RMSNorm in one pass")


def _head_routes(model: Any, prefix: str) -> Iterator[Route]:
    """The head of a causal model; other models have none of a known name."""
    head = model.get_output_embeddings()
    if head is None:
        return
    name = f"{prefix.rpartition('.')[0]}.lm_head".lstrip(".")
    try:
        examine_head(head)
    except NotFused as why:
        yield Route(name, "reference", f"{why}; its logits are held whole")
        return
    yield Route(name, "kernel", "log-probabilities in chunks, logits are never held whole")
