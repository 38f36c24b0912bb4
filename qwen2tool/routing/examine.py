"""What a decoder layer of transformers (with or without PEFT) holds, or why the fused layer cannot stand for it.

Read anew at every forward pass, so that an adapter switched, disabled, deleted or merged in between is seen, and the
plan that is printed comes from the same lines that decide what runs. Nothing is guessed: a module whose exact class,
hooks or options are not known here goes to the reference path, with the reason in words.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qwen2tool.kernels.backend import FLOATS
from qwen2tool.kernels.group import Adapter, Group, Projection
from qwen2tool.kernels.nf4 import Quantised, from_bnb

ATTENTION = ("sdpa", "eager", "flex_attention")
"""Transformers' own implementations beside the flash ones: all of them the same function as ours."""
CAPTURE = "transformers.utils.output_capturing"
"""Hooks that stay on a model once hidden states were asked for; they act in the passes that ask again, which we leave
to the original."""
MASKS_PER_LAYER = 4
"""Streams of dropout a layer uses: one a group, so that no two groups share a mask."""
PEFT_LORA = ("peft.tuners.lora.layer", "peft.tuners.lora.bnb")
"""Where the LoRA linears that are known here live: IA3, LoHa and others have a class `Linear` of their own."""


class NotFused(Exception):
    """Why a layer takes the reference path; the message is the reason shown in the plan."""


class NeedsBatch(NotFused):
    """Why the whole pass is the original's: something in it looks at the rows of the batch, or is not known here.

    A layer on the reference path sees the tokens of all rows behind each other, without padding; that is the same
    function only for modules that treat every token alone.
    """


@dataclass(frozen=True)
class LayerSpec:
    """A decoder layer as the fused layer needs it; tensors are the model's own, nothing is copied.

    Attributes:
        index: which layer it is.
        heads, kv_heads, head_dim: geometry of attention.
        norm1, norm2: weights (H,) of the norms before attention and before the MLP.
        eps: of both norms.
        q_bias, k_bias: (heads * head_dim,) and (kv_heads * head_dim,), or None; added with RoPE, in fp32.
        qkv, o, gate_up, down: the four groups of linears; v's bias is in qkv, those of q and k are not.
    """

    index: int
    heads: int
    kv_heads: int
    head_dim: int
    norm1: torch.Tensor
    norm2: torch.Tensor
    eps: float
    q_bias: torch.Tensor | None
    k_bias: torch.Tensor | None
    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    groups: tuple[Group, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", (self.qkv, self.o, self.gate_up, self.down))

    @property
    def parameters(self) -> list[torch.Tensor]:
        """What can get a gradient: A and B of all adapters, group by group, then the two norms."""
        return [tensor for group in self.groups for tensor in group.parameters] + [self.norm1, self.norm2]


def examine_stack(stack: Any, left: Collection[int] = ()) -> list[LayerSpec | NotFused]:
    """Every layer of the inner model as data, or why it takes the reference path: what the plan says and a pass does.

    Args:
        stack: transformers' `Qwen2Model`, whole.
        left: layers that somebody wants to take it.

    Raises:
        NeedsBatch: why no layer may be run apart from transformers' own pass.
    """
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    rotary = stack.rotary_emb
    _require(type(rotary) is Qwen2RotaryEmbedding, f"rotary_emb is a {type(rotary).__name__}", NeedsBatch)
    for name, module in (("the inner model", stack), ("rotary_emb", rotary), ("the last norm", stack.norm)):
        _require_untouched(name, module)
    kind = stack.config._attn_implementation
    _require(kind in ATTENTION or "flash" in kind, f"attention is {kind}, which is not known here", NeedsBatch)
    count = stack.config.num_hidden_layers
    _require(len(stack.layers) == count, f"config.num_hidden_layers asks for {count} layers alone", NeedsBatch)
    found: list[LayerSpec | NotFused] = []
    for index, layer in enumerate(stack.layers):
        try:
            spec = examine_layer(layer, stack.config, index)
            _require(index not in left, "asked for")
            found.append(spec)
        except NeedsBatch as why:
            raise NeedsBatch(f"in layer {index}: {why}") from None
        except NotFused as why:
            _require(kind == "sdpa", f"in layer {index}: {why}; {kind} attention takes the batch as it is", NeedsBatch)
            found.append(why)
    return found


def examine_norm(norm: nn.Module) -> tuple[torch.Tensor, float]:
    """Weight and eps of a norm that the kernel can stand for.

    Raises:
        NotFused: it is wrapped or has hooks.
    """
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    _require(type(norm) is Qwen2RMSNorm, f"the norm is a {type(norm).__name__}")
    _require_untouched("the norm", norm)
    return norm.weight, norm.variance_epsilon  # type: ignore[return-value]


def examine_head(head: nn.Module) -> torch.Tensor:
    """Weight (V, H) of a head whose logits need not be held.

    Raises:
        NotFused: it is trained, adapted, wrapped or has hooks.
    """
    _require(type(head) is nn.Linear, f"the head is a {type(head).__module__.split('.')[0]} {type(head).__name__}")
    _require_untouched("the head", head)
    weight: torch.Tensor = head.weight  # type: ignore[assignment]
    _require(not weight.requires_grad and head.bias is None, "the head is trained or has a bias")
    return weight


def examine_layer(layer: Any, config: Any, index: int) -> LayerSpec:
    """The layer as data.

    Raises:
        NotFused: with the reason, naming the module.
    """
    from transformers.activations import SiLUActivation
    from transformers.models.qwen2 import modeling_qwen2 as qwen2

    attention, mlp = layer.self_attn, layer.mlp
    norm1, norm2 = layer.input_layernorm, layer.post_attention_layernorm
    for name, module, kind in (
        ("layer", layer, qwen2.Qwen2DecoderLayer),
        ("self_attn", attention, qwen2.Qwen2Attention),
        ("mlp", mlp, qwen2.Qwen2MLP),
        ("input_layernorm", norm1, qwen2.Qwen2RMSNorm),
        ("post_attention_layernorm", norm2, qwen2.Qwen2RMSNorm),
    ):
        _require(type(module) is kind, f"{name} is a {type(module).__name__}, not transformers' {kind.__name__}")
        _require_untouched(name, module)
    _require(config.layer_types[index] == "full_attention", "the layer's attention slides over a window")
    _require(type(mlp.act_fn) in (nn.SiLU, SiLUActivation), f"the activation is {type(mlp.act_fn).__name__}, not SiLU")
    _require_untouched("act_fn", mlp.act_fn)
    _require(not (layer.training and attention.attention_dropout), "attention dropout is on")
    _require(norm1.variance_epsilon == norm2.variance_epsilon, "its two norms have different eps")
    stream = index * MASKS_PER_LAYER
    q, k, v = (_examine_linear(f"{n}_proj", getattr(attention, f"{n}_proj")) for n in "qkv")
    o = _examine_linear("o_proj", attention.o_proj)
    gate, up, down = (_examine_linear(f"{n}_proj", getattr(mlp, f"{n}_proj")) for n in ("gate", "up", "down"))
    for name, linear in (("o_proj", o), ("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        _require(linear.projection.bias is None, f"{name} has a bias, which no Qwen2 has")
    both = (q.projection.bias is None) == (k.projection.bias is None)
    _require(both, "only one of q_proj and k_proj has a bias")
    return LayerSpec(
        index=index,
        heads=q.projection.weight.shape[0] // attention.head_dim,
        kv_heads=k.projection.weight.shape[0] // attention.head_dim,
        head_dim=attention.head_dim,
        norm1=norm1.weight,
        norm2=norm2.weight,
        eps=norm1.variance_epsilon,
        q_bias=q.projection.bias,
        k_bias=k.projection.bias,
        qkv=_group((q.without_bias(), k.without_bias(), v), stream),
        o=_group((o,), stream + 1),
        gate_up=_group((gate, up), stream + 2),
        down=_group((down,), stream + 3),
    )


@dataclass(frozen=True)
class _Linear:
    name: str
    projection: Projection
    dropout: float

    def without_bias(self) -> _Linear:
        return _Linear(self.name, self.projection._replace(bias=None), self.dropout)


def _group(linears: tuple[_Linear, ...], stream: int) -> Group:
    """Linears of one input; projections without an adapter draw no mask and do not speak for the probability."""
    rates = {linear.dropout for linear in linears if linear.projection.adapters}
    names = ", ".join(linear.name for linear in linears)
    _require(len(rates) < 2, f"{names} have different LoRA dropouts")
    return Group(tuple(linear.projection for linear in linears), rates.pop() if rates else 0.0, stream)


def _examine_linear(name: str, module: Any) -> _Linear:
    _require_untouched(name, module)
    if not _is_peft(module):
        return _Linear(name, _examine_base(name, module), 0.0)
    kind, home = type(module).__name__, type(module).__module__
    _require(home in PEFT_LORA, f"{name} is a {kind} of {home}, which is not known here", NeedsBatch)
    _require(kind in ("Linear", "Linear4bit"), f"{name} is a PEFT {kind} layer, which has no fused form")
    base = _examine_base(name, module.base_layer)
    _require_untouched(name, module.base_layer)
    if module.disable_adapters:
        _require(not module.merged, f"{name} has a merged adapter that is switched off")
        return _Linear(name, base, 0.0)
    if module.merged:
        return _Linear(name, base, 0.0)
    adapters, rates = [], set()
    for adapter in module.active_adapters:
        if adapter in module.lora_A:
            adapters.append(_examine_adapter(name, module, adapter))
            rates.add(_dropout(name, module.lora_dropout[adapter]))
    _require(len(rates) < 2, f"{name} has active adapters with different dropouts")
    return _Linear(name, base._replace(adapters=tuple(adapters)), rates.pop() if rates else 0.0)


def _examine_base(name: str, module: Any) -> Projection:
    """The frozen linear: nn.Linear, or bitsandbytes' Linear4bit on quantised weights."""
    kind = type(module)
    bias = getattr(module, "bias", None)
    _require(bias is None or not bias.requires_grad, f"the bias of {name} is trained")
    if kind is nn.Linear:
        weight = module.weight
        _require(not weight.requires_grad, f"the weight of {name} is trained")
        _require(weight.dtype in (*FLOATS, torch.float64), f"the weight of {name} is {weight.dtype}")
        return Projection(weight, bias)
    _require(
        kind.__module__.startswith("bitsandbytes.") and kind.__name__ == "Linear4bit",
        f"{name} is a {kind.__name__}, which has no fused form",
    )
    if module.weight.is_meta:
        return Projection(_promised(module.weight), bias)
    _require(module.weight.quant_state is not None, f"{name} is not quantised yet")
    try:
        return Projection(from_bnb(module.weight), bias)
    except ValueError as why:
        raise NotFused(f"{name}: {why}") from None


def _promised(weight: torch.Tensor) -> Quantised:
    """A 4-bit weight that has no data yet: enough for a plan, and nothing else can be done on the meta device."""
    rows, columns = weight.shape
    return Quantised(weight, weight, weight, 64, None, None, 1, None, (rows, columns), weight.dtype)


def _is_peft(module: nn.Module) -> bool:
    """Asked only where PEFT is loaded: nothing else can have made such a layer."""
    if "peft.tuners.tuners_utils" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _examine_adapter(name: str, module: Any, adapter: str) -> Adapter:
    variant = module.lora_variant.get(adapter)
    if variant is not None:
        kind = type(variant).__name__
        by_token = kind == "DoraLinearVariant"
        raise (NotFused if by_token else NeedsBatch)(f"{name} has the LoRA variant {kind}")
    a, b = module.lora_A[adapter], module.lora_B[adapter]
    _require(type(a) is nn.Linear and type(b) is nn.Linear, f"the LoRA of {name} is not made of plain linears")
    _require(a.bias is None and b.bias is None, f"the LoRA of {name} has a bias (lora_bias)")
    _require_untouched(f"the LoRA of {name}", a, b)
    return Adapter(a.weight, b.weight, float(module.scaling[adapter]))


def _dropout(name: str, module: nn.Module) -> float:
    """The probability that counts now: 0 in eval mode."""
    _require_untouched(f"the LoRA dropout of {name}", module)
    if type(module) is nn.Identity or not module.training:
        return 0.0
    _require(type(module) is nn.Dropout, f"the LoRA dropout of {name} is a {type(module).__name__}")
    return float(module.p)  # type: ignore[arg-type]


def _require_untouched(name: str, *modules: nn.Module) -> None:
    """Hooks and replaced forwards see the batch as transformers has it, or nothing at all in a fused layer.

    Raises:
        NeedsBatch: a module has one.
    """
    for module in modules:
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks) and any(_home(hook) != CAPTURE for kind in hooks for hook in kind.values()):
            raise NeedsBatch(f"{name} has hooks")
        if "forward" in vars(module):
            raise NeedsBatch(f"the forward of {name} was replaced")


def _home(hook: Any) -> str:
    """The module of the function that is the hook."""
    return str(getattr(hook, "__module__", ""))


def _require(passed: bool, reason: str, failure: type[NotFused] = NotFused) -> None:
    if not passed:
        raise failure(reason)
