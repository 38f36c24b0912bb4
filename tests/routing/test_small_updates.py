"""LoRA's first steps move B by the learning rate: what that adds to an output is far below the rounding of 16 bits, and
must come through it all the same. Rounded once, sums are as often too large as too small; added to what is rounded
already, small terms are lost every time.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

import qwen2tool.routing.stack
from qwen2tool.kernels import lora
from qwen2tool.kernels.dropout import unpack_bits
from qwen2tool.kernels.group import Adapter, Group, Projection, assemble
from qwen2tool.kernels.lora import draw_bits, gradient_rows, group_backward, group_forward, new_rows
from qwen2tool.routing import layer, operands
from qwen2tool.routing.plan import find_stack
from qwen2tool.routing.swap import route
from tests.kernels.device import DEVICE
from tests.kernels.test_nf4 import quantised
from tests.routing.models import batch
from tests.tiny import TARGETS, tiny_model

TOKENS, COLUMNS, RANK, STEP = 512, 64, 8, 2e-4
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def gain(found, wanted):
    """How much of `wanted` is in `found`: 1 is all of it."""
    found, wanted = found.double(), wanted.double()
    return float((found * wanted).sum() / wanted.square().sum())


def drawn(seed):
    """A `randn` of its own generator."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator).to(DEVICE)


@pytest.fixture(params=[True, False], ids=["extended", "separate"])
def extended(request, monkeypatch):
    for module in (lora, layer, operands):
        monkeypatch.setattr(module, "prefers_extended", lambda group, tokens: request.param)
    return request.param


@DTYPES
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "on a stream"])
@pytest.mark.parametrize("kind", [None, "nf4"])
def test_of_a_group(extended, dtype, residual, kind):
    """Two projections, one with a bias and two adapters; the stream lies on the grid of its dtype."""
    randn = drawn(seed=0)
    projections, outs, updates = [], (96, 64), []
    x = randn(TOKENS, COLUMNS).to(dtype)
    for out, count in zip(outs, (2, 1), strict=True):
        weight = randn(out, COLUMNS).to(dtype) * COLUMNS**-0.5
        if kind:
            weight, _ = quantised((out, COLUMNS), kind=kind, seed=out)
        adapters = [Adapter(randn(RANK, COLUMNS) * COLUMNS**-0.5, STEP * randn(out, RANK).sign(), 0.5)] * count
        projections.append(Projection(weight, randn(out).to(dtype) if count == 2 else None, tuple(adapters)))
        updates.append(sum((x.double() @ a.double().T) @ b.double().T * s for a, b, s in adapters))
    stream = (4 * randn(TOKENS, sum(outs))).to(dtype) if residual else None

    def output(some):
        weights = assemble(some, dtype, extended=extended)
        rows = new_rows(TOKENS, COLUMNS, some.width, weights)
        rows.plain.copy_(x)
        return group_forward(rows, some, weights, residual=stream).double()

    without = Group(tuple(p._replace(adapters=tuple(a._replace(b=a.b * 0) for a in p.adapters)) for p in projections))
    found = output(Group(tuple(projections))) - output(without)
    parts = found.split(outs, 1)
    assert all(abs(gain(part, update) - 1) < 0.15 for part, update in zip(parts, updates, strict=True))
    base = output(without)  # the negative control: added to what is rounded already
    lost = [
        gain((some + update).to(dtype).double() - some, update)
        for some, update in zip(base.split(outs, 1), updates, strict=True)
    ]
    assert dtype == torch.float16 or max(lost) < 0.6, lost


@DTYPES
@pytest.mark.parametrize("dropout", [0.0, 0.25], ids=["all kept", "dropout"])
@pytest.mark.parametrize("kind", [None, "nf4"])
def test_of_the_gradient_of_x(extended, dtype, dropout, kind):
    """LoRA's part of dx, far below what the weights give, over all of a group's projections.

    Under dropout in the extended form not on a Hopper GPU, whose cuBLAS rounds a product before it adds it to what is
    there (`kernels.lora`).
    """
    randn = drawn(seed=1)
    projections, outs = [], (96, 64)
    for out in outs:
        weight, step = randn(out, COLUMNS).to(dtype), STEP
        if kind:
            (weight, _), step = quantised((out, COLUMNS), kind=kind, seed=out), 5 * STEP  # its weights are larger
        adapter = Adapter(randn(RANK, COLUMNS) * COLUMNS**-0.5, step * randn(out, RANK).sign(), 0.5)
        projections.append(Projection(weight, None, (adapter,)))
    dy = randn(TOKENS, sum(outs)).to(dtype)
    seed = torch.tensor(3, device=DEVICE)

    def gradient(*adapted):
        group = Group(tuple(adapted), dropout)
        weights, bits = assemble(group, dtype, extended=extended), draw_bits(group, TOKENS, seed)
        return group_backward(gradient_rows(dy, group, weights, bits), group, weights, bits).double()

    zero = [p._replace(adapters=tuple(a._replace(b=a.b * 0) for a in p.adapters)) for p in projections]
    base, bits = gradient(*zero), draw_bits(Group(tuple(projections), dropout), TOKENS, seed)
    keep = torch.ones(2, 1, 1, device=DEVICE) if bits is None else unpack_bits(bits, COLUMNS) / (1 - dropout)
    wanted = sum(
        keep[index].double() * ((part.double() @ a.b.double()) @ a.a.double() * a.scale)
        for index, (part, p) in enumerate(zip(dy.split(outs, 1), projections, strict=True))
        for a in p.adapters
    )
    assert abs(gain(gradient(*projections) - base, wanted) - 1) < 0.15
    lost = gain((base + wanted).to(dtype).double() - base, wanted)
    assert lost < 0.6, f"the negative control: added to what is rounded already, {lost}"


@DTYPES
def test_stream_and_bias_are_added_before_the_rounding(extended, dtype):
    """Both on one projection: the error is that of one rounding, not of two."""
    randn = drawn(seed=2)
    x, stream, bias = randn(TOKENS, COLUMNS).to(dtype), randn(TOKENS, 96).to(dtype), randn(96).to(dtype)
    weight = randn(96, COLUMNS).to(dtype) * COLUMNS**-0.5
    adapter = Adapter(randn(RANK, COLUMNS), STEP * randn(96, RANK).sign(), 0.5)
    group = Group((Projection(weight, bias, (adapter,)),))
    weights = assemble(group, dtype, extended=extended)
    rows = new_rows(TOKENS, COLUMNS, group.width, weights)
    rows.plain.copy_(x)
    update = (x.double() @ adapter.a.double().T) @ adapter.b.double().T * adapter.scale
    base = stream.double() + x.double() @ weight.double().T + update
    right = base + bias.double()
    once, twice = (right.to(dtype) - right).norm(), (base.to(dtype) + bias).double() - right
    assert (group_forward(rows, group, weights, residual=stream) - right).norm() < 1.05 * once
    assert twice.norm() > 1.2 * once, "the negative control"


def stream(dtype, kind, size, *, routed):
    """What the last norm of a model of one layer gets; the adapters of `kind` have a B of `size`, the others zero."""
    config = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_hidden_layers": 1}
    base = tiny_model(0, **config).to(DEVICE, dtype)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS))).train()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator)
            values = values * parameter.shape[1] ** -0.5 if "_A" in name else size * values.sign() * (kind in name)
            parameter.data = values.to(DEVICE)
    if routed:
        route(model)
    seen = []
    rms_norm = qwen2tool.routing.stack.rms_norm
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        if routed:
            patch.setattr(
                qwen2tool.routing.stack,
                "rms_norm",
                lambda x, *rest, **how: (seen.append(x), rms_norm(x, *rest, **how))[1],
            )
        else:
            find_stack(model)[0].norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        model(input_ids=batch(8, 64).to(DEVICE), use_cache=False)
    return seen[0].flatten(0, -2).double()


@pytest.mark.parametrize("kind", ["o_proj", "down_proj"])
def test_of_a_layer(extended, kind):
    """What o and down add to the residual stream, which is far larger, against float64."""
    truth = stream(torch.float64, kind, STEP, routed=False) - stream(torch.float64, kind, 0.0, routed=False)
    found = stream(torch.bfloat16, kind, STEP, routed=True) - stream(torch.bfloat16, kind, 0.0, routed=True)
    assert truth.abs().max() > 0 and abs(gain(found, truth) - 1) < 0.15


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "on a stream"])
@pytest.mark.parametrize("kind", [None, "nf4"])
def test_of_a_group_on_a_gpu(extended, dtype, residual, kind):
    test_of_a_group(extended, dtype, residual, kind)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("kind", [None, "nf4"])
def test_of_the_gradient_of_x_on_a_gpu(extended, dtype, kind):
    for dropout in (0.0,) if extended else (0.0, 0.25):
        test_of_the_gradient_of_x(extended, dtype, dropout, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["o_proj", "down_proj"])
def test_of_a_layer_on_a_gpu(extended, kind):
    test_of_a_layer(extended, kind)
