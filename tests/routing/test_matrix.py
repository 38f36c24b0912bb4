"""A routed model and the unrouted one, each against a float64 truth: every combination that training can meet.

Case: what is held (16- or 32-bit or NF4 base), dropout with its masks replayed, the adapter on or off, the batch
(plain, packed, padded on either side) and the geometry. The truth computes with the very weights of the run, so nothing
but the arithmetic differs: weights fit into bf16 and fp16 alike, NF4 ones are unpacked as the format defines them.
Compared are logits, the output of each layer, the gradient of the embeddings and those of every A and B, over real
tokens alone.

Here one geometry runs on the CPU; `test_matrix_gpu.py` runs the rest with the same code.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from qwen2tool.kernels.dropout import keep_bits, unpack_bits
from qwen2tool.kernels.nf4 import dequantise_reference, from_bnb
from qwen2tool.routing import stack as stack_module
from qwen2tool.routing.attention import safe_attention
from qwen2tool.routing.examine import MASKS_PER_LAYER
from qwen2tool.routing.plan import find_stack
from qwen2tool.routing.swap import route, unroute
from tests.routing.models import batch, fill_adapters, padding
from tests.tiny import TARGETS, tiny_model
from tests.tolerances import FACTOR, assert_no_worse, ratio

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linears of one input; each group has its stream of masks, each linear a mask of its own."""
RANK, ALPHA, SEED = 5, 12, 3
SAYS_NOTHING = 0.2
"""A reference as wrong as that is no measure."""

Geometry = tuple[tuple[str, Any], ...]
"""Changes of tests.tiny's config, as pairs."""

SMALL: Geometry = (("num_hidden_layers", 2),)


class Case(NamedTuple):
    """What a truth is made for; the dtypes share it. `layout`: plain, packed, left or right."""

    geometry: Geometry
    quantize: str
    dropout: float
    adapter: str
    layout: str
    columns: int
    device: str


@lru_cache(maxsize=1)
def master(geometry: Geometry, device: str) -> Any:
    """fp32 weights that bf16 and fp16 hold exactly, with queries of a quarter of the size.

    Sharper attention is full of near-ties, and one that falls the other way in 16 bit makes errors of order 1 of any
    implementation; large biases of k have tests of their own.
    """
    model = tiny_model(**dict(geometry)).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.data = (parameter.data / (4 if "q_proj" in name else 1)).bfloat16().half().float()
    return model.to(device)


def quantise(model: Any, dtype: torch.dtype) -> None:
    """All linears but the head become bitsandbytes' NF4 with double quantisation, as its loader makes them."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, module in list(model.model.named_modules()):
        if type(module) is not nn.Linear:
            continue
        linear = Linear4bit(
            module.in_features, module.out_features, module.bias is not None, compute_dtype=dtype, device="meta"
        )
        linear.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4").to(module.weight.device)
        linear.bias, linear.support_avx512bf16_for_cpu = module.bias, False
        model.model.set_submodule(name, linear)
    model.is_loaded_in_4bit = True  # what PEFT asks


def unpacked(model: Any) -> None:
    """NF4 linears become plain ones of the values that they stand for."""
    for name, module in list(model.model.named_modules()):
        if type(module).__name__ != "Linear4bit":
            continue
        linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        values = dequantise_reference(from_bnb(module.weight), torch.float32)
        linear.weight, linear.bias = nn.Parameter(values, requires_grad=False), module.bias
        model.model.set_submodule(name, linear)
    model.is_loaded_in_4bit = False


@lru_cache(maxsize=4)
def built(geometry: Geometry, quantize: str, dtype: torch.dtype, device: str) -> Any:
    """Under PEFT, in training mode, adapters in fp32; float64 is the truth's, with everything in float64."""
    model = copy.deepcopy(master(geometry, device))
    narrow = torch.float32 if dtype == torch.float64 else dtype
    model = model.to(narrow)
    if quantize == "nf4":
        quantise(model, narrow)
    if dtype == torch.float64:
        unpacked(model)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
    model = get_peft_model(model, config)
    fill_adapters(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data /= 8  # as large as the base by itself, it would make attention sharp again
    return (model.double() if dtype == torch.float64 else model).train()


def model_of(case: Case, dtype: torch.dtype) -> Any:
    """`built`, with the dropout of `case` as PEFT makes it."""
    model = built(case.geometry, case.quantize, dtype, case.device)
    for module in find_stack(model)[0].modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(case.dropout) if case.dropout else nn.Identity()
    return model


def inputs_for(case: Case) -> dict[str, torch.Tensor]:
    """Ids of three rows (packed: one) with a mask or positions."""
    ids = batch(3, case.columns).to(case.device)
    if case.layout == "plain":
        return {"ids": ids}
    if case.layout == "packed":
        cuts = (case.columns // 3, case.columns // 2 + 1)
        lengths = (cuts[0], 1, cuts[1] - cuts[0] - 1, case.columns - cuts[1])
        return {"ids": ids[:1], "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].to(case.device)}
    return {"ids": ids, "attention_mask": padding(case.layout, 3, case.columns).to(case.device)}


def masks_for(model: Any, case: Case, inputs: dict[str, torch.Tensor], seed: int = SEED) -> dict[str, torch.Tensor]:
    """Of each linear with dropout: (B, T, K) bool, the bits that the routed pass draws; False in slots of padding."""
    if not case.dropout:
        return {}
    kept = inputs.get("attention_mask", torch.ones_like(inputs["ids"])) != 0
    torch.manual_seed(seed)
    drawn = torch.randint(2**62, (), device=case.device)  # the first number that a routed pass asks for
    found = {}
    for index, layer in enumerate(find_stack(model)[0].layers):
        linears = {n.split(".")[-1]: (n, m) for n, m in layer.named_modules() if n.split(".")[-1] in TARGETS}
        for group, names in enumerate(GROUPS):
            columns = linears[names[0]][1].in_features
            stream = index * MASKS_PER_LAYER + group
            bits = keep_bits(
                drawn, stream, case.dropout, int(kept.sum()), columns, len(names), device=case.device
            )  # fmt: skip
            for name, mask in zip(names, unpack_bits(bits, columns), strict=True):
                whole = torch.zeros(*kept.shape, columns, dtype=torch.bool, device=case.device)
                whole[kept] = mask
                found[f"{index}.{linears[name][0]}"] = whole
    return found


class Replayed(nn.Module):
    """Dropout with a given mask."""

    def __init__(self, mask: torch.Tensor, p: float) -> None:
        super().__init__()
        self.mask, self.p = mask, p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask.to(x.dtype) / (1 - self.p)


@contextmanager
def replayed(model: Any, masks: dict[str, torch.Tensor], p: float) -> Any:
    """Inside, PEFT's own layers drop what `masks` say."""
    layers, before = find_stack(model)[0].layers, {}
    for name, mask in masks.items():
        index, _, rest = name.partition(".")
        linear = layers[int(index)].get_submodule(rest)
        before[name] = (linear, linear.lora_dropout["default"])
        linear.lora_dropout["default"] = Replayed(mask, p)
    try:
        yield
    finally:
        for linear, dropout in before.values():
            linear.lora_dropout["default"] = dropout


@contextmanager
def outputs_of_layers(model: Any, kept: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A list that gets each layer's output at the real tokens, (N, H), whoever runs the layer."""
    found: list[torch.Tensor] = []
    real = stack_module.fused_layer

    def fused(*arguments: Any, **options: Any) -> torch.Tensor:
        found.append(real(*arguments, **options))
        return found[-1]

    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output)[kept])

    stack = find_stack(model)[0]
    handles = []
    if not isinstance(stack, stack_module.RoutedStack):
        handles = [layer.register_forward_hook(hook) for layer in stack.layers]
    with monkeypatch.context() as patch:
        patch.setattr(stack_module, "fused_layer", fused)
        yield found
    for handle in handles:
        handle.remove()


def passed(model: Any, case: Case, inputs: dict[str, torch.Tensor], monkeypatch: Any) -> dict[str, torch.Tensor]:
    """Everything that is compared, of a model as it stands, for a random projection of the logits as loss."""
    model.zero_grad()
    options = {name: value for name, value in inputs.items() if name != "ids"}
    kept = inputs.get("attention_mask", torch.ones_like(inputs["ids"])) != 0
    embedded = model.get_input_embeddings()(inputs["ids"]).detach().requires_grad_()
    adapters = model.disable_adapter() if case.adapter == "off" else nullcontext()
    torch.manual_seed(SEED)
    with outputs_of_layers(model, kept, monkeypatch) as outputs, adapters:
        logits = model(inputs_embeds=embedded, use_cache=False, **options).logits[kept]
        (logits * upstream(logits, model.config.hidden_size)).sum().backward()
    found = {"logits": logits.detach(), "embeddings": embedded.grad[kept]}
    found |= {f"layer {index}": output.detach() for index, output in enumerate(outputs)}
    return found | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def upstream(logits: torch.Tensor, hidden: int) -> torch.Tensor:
    """A random gradient of the logits that no dtype rounds, of a size that fp16 bears behind the head."""
    generator = torch.Generator(logits.device).manual_seed(11)
    size = (hidden / logits.shape[1]) ** 0.5
    return (torch.randn(logits.shape, generator=generator, device=logits.device) * size).bfloat16().half().to(logits)


@contextmanager
def wide_norms(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' RMSNorm computes in fp32 whatever its input; a truth needs more."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    with monkeypatch.context() as patch:
        patch.setattr(Qwen2RMSNorm, "forward", forward)
        yield


_truths: dict[Case, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = {}


def truth_of(case: Case, monkeypatch: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(what is compared, in float64; the masks); kept for the dtypes that follow."""
    if case not in _truths:
        _truths.clear()
        model = model_of(case, torch.float64)
        inputs = inputs_for(case)
        masks = masks_for(model, case, inputs)
        with replayed(model, masks, case.dropout), wide_norms(monkeypatch):
            _truths[case] = passed(model, case, inputs, monkeypatch), masks
    return _truths[case]


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """||found - truth|| / ||truth|| on the device: logits are too large to travel."""
    return float((found.double() - truth).norm() / truth.norm())


def plain_errors(case: Case, dtype: torch.dtype, monkeypatch: Any) -> dict[str, float]:
    """Of the unrouted model, its masks replayed."""
    truth, masks = truth_of(case, monkeypatch)
    model = model_of(case, dtype)
    with autocast(case, dtype), safe_attention(), replayed(model, masks, case.dropout):
        found = passed(model, case, inputs_for(case), monkeypatch)
    return errors_of(found, truth)


def routed_errors(
    case: Case, dtype: torch.dtype, monkeypatch: Any, inputs: dict[str, torch.Tensor] | None = None
) -> dict[str, float]:
    """Of the routed model, which draws its own masks; fp16 has the stream between layers in fp32, as in training."""
    truth, _ = truth_of(case, monkeypatch)
    model = model_of(case, dtype)
    plan = route(model, residual_dtype=torch.float32 if dtype == torch.float16 else None)
    try:
        assert plan.counts == {"fused layer": model.config.num_hidden_layers}
        with autocast(case, dtype):
            found = passed(model, case, inputs or inputs_for(case), monkeypatch)
    finally:
        unroute(model)
    return errors_of(found, truth)


def autocast(case: Case, dtype: torch.dtype) -> Any:
    return nullcontext() if dtype == torch.float32 else torch.autocast(case.device, dtype)


def errors_of(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, float]:
    assert found.keys() == truth.keys()
    return {name: relative_error(found[name], truth[name]) for name in truth}


def check(case: Case, dtype: torch.dtype, monkeypatch: Any) -> float:
    """See `assert_no_worse`; the unrouted model's error must be one that says something."""
    ours, theirs = (kind(case, dtype, monkeypatch) for kind in (routed_errors, plain_errors))
    layers = dict(case.geometry).get("num_hidden_layers", 3)
    assert len(ours) == 2 + layers + (2 * 7 * layers if case.adapter == "on" else 0)
    assert max(theirs.values()) < SAYS_NOTHING, theirs
    return assert_no_worse(ours, theirs)


def lost_bias_ratio(case: Case, dtype: torch.dtype, monkeypatch: Any) -> float:
    """The negative control: the same comparison without the v bias of layer 0."""
    theirs = plain_errors(case, dtype, monkeypatch)
    bias = find_stack(model_of(case, dtype))[0].layers[0].self_attn.v_proj.base_layer.bias
    before = bias.clone()
    try:
        bias.data.zero_()
        return ratio(routed_errors(case, dtype, monkeypatch), theirs)
    finally:
        bias.data.copy_(before)


def other_masks_ratio(case: Case, monkeypatch: Any) -> float:
    """Another one: masks of another seed, beside what our own error is with the right ones, in fp32."""
    ours = routed_errors(case, torch.float32, monkeypatch)
    model, inputs = model_of(case, torch.float32), inputs_for(case)
    truth, _ = truth_of(case, monkeypatch)
    with replayed(model, masks_for(model, case, inputs, SEED + 1), case.dropout):
        return ratio(errors_of(passed(model, case, inputs, monkeypatch), truth), ours)


def small(quantize: str = "none", dropout: float = 0.05, adapter: str = "on", layout: str = "left") -> Case:
    return Case(SMALL, quantize, dropout, adapter, layout, 17, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter", ["on", "off"])
@pytest.mark.parametrize("layout", ["plain", "packed", "left", "right"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_error_is_no_larger_than_the_unrouted_model_s(monkeypatch, quantize, dropout, layout, adapter, dtype):
    check(small(quantize, dropout, adapter, layout), dtype, monkeypatch)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_lost_bias_is_outside(monkeypatch, quantize):
    assert lost_bias_ratio(small(quantize), torch.bfloat16, monkeypatch) > 2 * FACTOR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_lost_gradient_is_outside(monkeypatch, dtype):
    """Of all tensors: the mean alone would not tell."""
    case = small(dropout=0.0, layout="plain")
    ours, theirs = (kind(case, dtype, monkeypatch) for kind in (routed_errors, plain_errors))
    assert_no_worse(ours, theirs)
    gradients = [name for name in ours if "lora_" in name]
    assert len(gradients) == 2 * 7 * 2
    for name in gradients:
        with pytest.raises(AssertionError):
            assert_no_worse(ours | {name: 1.0}, theirs)
    assert dtype == torch.float32 or ratio(ours | {gradients[0]: 1.0}, theirs) < FACTOR, "the mean alone"


def test_masks_of_another_seed_are_outside(monkeypatch):
    assert other_masks_ratio(small(), monkeypatch) > 100


def test_a_mask_of_the_other_side_is_outside(monkeypatch):
    case = small(dropout=0.0)
    theirs = plain_errors(case, torch.bfloat16, monkeypatch)
    other = inputs_for(case) | {"attention_mask": padding("right", 3, case.columns)}
    assert ratio(routed_errors(case, torch.bfloat16, monkeypatch, other), theirs) > 2 * FACTOR


def test_the_same_nf4_values_whatever_the_dtype():
    """What lets the dtypes share a truth."""
    weights = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = find_stack(built(SMALL, "nf4", dtype, "cpu"))[0].layers[0]
        weights.append(dequantise_reference(from_bnb(layer.mlp.up_proj.base_layer.weight), torch.float32))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    assert not torch.equal(
        weights[0], dict(master(SMALL, "cpu").named_parameters())["model.layers.0.mlp.up_proj.weight"]
    )
