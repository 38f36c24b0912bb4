"""Groups of linears with LoRA against `lora.reference` in the same dtype and in float64; unwritten memory is NaN."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from qwen2tool.kernels import backend, lora
from qwen2tool.kernels.dropout import keep_bits, unpack_bits
from qwen2tool.kernels.group import Adapter, Group, Projection, assemble, prefers_extended
from qwen2tool.kernels.lora import group_forward, lora_group, new_rows, reference
from qwen2tool.kernels.nf4 import Quantised
from tests.kernels.device import DEVICE, nearest_bf16  # noqa: F401  (a fixture)
from tests.kernels.poison import nan_memory  # noqa: F401  (a fixture)
from tests.kernels.test_masked import bf16_products  # noqa: F401  (a fixture)
from tests.kernels.test_nf4 import quantised, truth
from tests.tolerances import assert_as_good

pytestmark = pytest.mark.usefixtures("nearest_bf16", "bf16_products", "nan_memory")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
P, STREAM, SEED = 0.3, 5, 2**40 + 3
K = 72
# Ranks of the adapters of each projection; how many columns it has, and whether it has a bias.
SHAPES = {
    "1 3 8": ([(1,), (3,), (8,)], [(40, True), (7, False), (12, True)]),
    "64 and none": ([(64,), ()], [(33, False), (20, True)]),
    "several on one": ([(3, 1), (), (8,)], [(24, True), (9, False), (5, False)]),
    "five in all": ([(2, 1), (1, 4), (3,)], [(10, True), (6, True), (21, True)]),
    "no adapter": ([(), ()], [(11, True), (16, False)]),
}


class Case(NamedTuple):
    """A group, and the same with 4-bit weights as bitsandbytes unpacks them: in the dtype of x, and in float64."""

    group: Group
    like: Group
    wide: Group
    x: torch.Tensor
    dy: torch.Tensor
    bits: torch.Tensor | None


def between(dtype: torch.dtype) -> float:
    """NaN; in 16 bit on a CPU a large number, since torch's own products may multiply it with zero there (`blank`)."""
    return float("nan") if DEVICE == "cuda" or dtype == torch.float32 else 30_000.0


def strided(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` as rows that lie further apart than they are long, `between` them what must not be read."""
    buffer = torch.full((values.shape[0] + 1, values.shape[1] + 8), between(dtype), dtype=dtype, device=DEVICE)
    return buffer[: values.shape[0], : values.shape[1]].copy_(values)


def frozen(size: tuple[int, int], dtype: torch.dtype, kind: str | None, generator: torch.Generator):
    """A weight (O, K) in `dtype` or 4 bits, and what it is in `dtype` and in float64."""
    if kind is None:
        weight = (torch.randn(size, generator=generator) * size[1] ** -0.5).to(DEVICE, dtype)
        return weight, weight, weight.double()
    weight, parameter = quantised(size, kind=kind, seed=size[0])
    return weight, truth(parameter, dtype), truth(parameter, FP32).double()


def in_double(projection: Projection) -> Projection:
    """Without its weight; parameters of its own."""
    copies = [(a.detach().double(), b.detach().double(), scale) for a, b, scale in projection.adapters]
    adapters = tuple(Adapter(a.requires_grad_(), b.requires_grad_(), scale) for a, b, scale in copies)
    return Projection(projection.weight, None if projection.bias is None else projection.bias.double(), adapters)


def make(shape, dtype, *, rows=63, columns=K, dropout=0.0, kind=None, adapters=FP32) -> Case:
    """Biases of order 1, B as large as A, scales away from 1, frozen weights in `dtype`, 4 bits, or "mixed"."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(size, generator=generator)

    ranks, linears = SHAPES[shape] if isinstance(shape, str) else shape
    projections, count = ([], [], []), itertools.count(2)
    for index, (own, (out, biased)) in enumerate(zip(ranks, linears, strict=True)):
        bits = ("nf4" if index == 0 else None) if kind == "mixed" else kind
        weight, like, wide = frozen((out, columns), dtype, bits, generator)
        bias = randn(out).to(DEVICE, dtype) if biased else None
        loras = []
        for rank in own:
            a, b = randn(rank, columns) * columns**-0.5, randn(out, rank)
            a, b = (t.to(DEVICE, adapters).requires_grad_() for t in (a, b))
            loras.append(Adapter(a, b, 0.3 * next(count)))
        made = Projection(weight, bias, tuple(loras))
        kinds = made, made._replace(weight=like), in_double(made)._replace(weight=wide)
        for place, projection in zip(projections, kinds, strict=True):
            place.append(projection)
    groups = [Group(tuple(place), dropout, STREAM) for place in projections]
    keep = None
    if dropout and groups[0].adapters:
        seed = torch.tensor(SEED, device=DEVICE)
        keep = keep_bits(seed, STREAM, dropout, rows, columns, len(groups[0].adapters), device=DEVICE)
    return Case(*groups, strided(randn(rows, columns), dtype), strided(randn(rows, groups[0].rows), dtype), keep)


def masks_of(case: Case) -> list[torch.Tensor] | None:
    """keep / (1 - p) of each adapter, (N, K) each."""
    if case.bits is None:
        return None
    return list(unpack_bits(case.bits, case.x.shape[1]).double() / (1 - case.group.dropout))


def named(y: torch.Tensor, gradients: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    names = ["dx"] + [f"d{which}{index}" for index in range(len(gradients) // 2) for which in "AB"]
    return {"y": y.detach()} | dict(zip(names, gradients, strict=True))


def plain(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """y and every gradient by autograd through `reference`, which never unpacks here; float64 is the truth."""
    group = case.wide if dtype == FP64 else case.like
    x = case.x.detach().to(dtype).requires_grad_()
    y = reference(x, group, masks_of(case))
    return named(y, torch.autograd.grad(y, [x, *group.parameters], case.dy.to(dtype)))


def run(case: Case, which: str = "reference") -> dict[str, torch.Tensor]:
    x = case.x.detach().requires_grad_()
    seed = torch.tensor(SEED, device=DEVICE) if case.group.dropout else None
    with backend.use("triton" if DEVICE == "cuda" else which):
        y = lora_group(x, case.group, seed)
        return named(y, torch.autograd.grad(y, [x, *case.group.parameters], case.dy))


def wrong_ones(found: dict[str, torch.Tensor], case: Case, dtype: torch.dtype) -> set[str]:
    """Names of the results that the tolerance rule refuses."""
    wrong, like, right = set(), plain(case, dtype), plain(case, FP64)
    assert found.keys() == right.keys()
    for name, value in found.items():
        try:
            assert_as_good(value, like[name], right[name], dtype)
        except AssertionError:
            wrong.add(name)
    return wrong


def assert_right(found: dict[str, torch.Tensor], case: Case, dtype: torch.dtype) -> None:
    assert wrong_ones(found, case, dtype) == set()


@pytest.fixture(name="form")
def forced_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces one of the two forms, whatever is cheaper; both must be asked for by some test."""
    monkeypatch.setattr(lora, "prefers_extended", lambda group, tokens: request.param == "extended")
    return request.param


FORM = pytest.mark.parametrize("form", ["extended", "separate"], indirect=True)
DROPOUT = pytest.mark.parametrize("dropout", [0.0, P], ids=["all kept", "dropout"])


@FORM
@DROPOUT
@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_every_gradient(shape, dtype, dropout, form):
    """fp32 adapters over activations of `dtype`, as PEFT keeps them; rows and gradients between NaN."""
    case = make(shape, dtype, dropout=dropout)
    found = run(case)
    assert all(found[name].dtype == (FP32 if name[:2] in ("dA", "dB") else dtype) for name in found)
    assert_right(found, case, dtype)


@FORM
@DROPOUT
@DTYPES
def test_kernels(dtype, dropout, form):
    """The same through Triton: unpacking, filling, masked products; a short odd shape for the interpreter."""
    case = make("1 3 8", dtype, rows=17, columns=64, dropout=dropout, kind="nf4")
    first, again = run(case, "triton"), run(case, "triton")
    assert_right(first, case, dtype)
    assert all(torch.equal(first[name], again[name]) for name in first)


@FORM
@DROPOUT
@DTYPES
@pytest.mark.parametrize("kind", ["nf4", "fp4", "mixed"])
def test_four_bit_weights(kind, dtype, dropout, form):
    assert_right(run(case := make("several on one", dtype, dropout=dropout, kind=kind)), case, dtype)


@FORM
@DROPOUT
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_few_rows(rows, dropout, form):
    """In fp32: of a single number in 16 bit, chance decides whose rounding is nearer."""
    case = make("1 3 8", FP32, rows=rows, dropout=dropout)
    found = run(case)
    assert_right(found, case, FP32)
    if not rows:
        assert all(not value.any() for value in found.values()), "no token, no gradient"


@FORM
def test_adapters_of_the_dtype_of_x_get_gradients_of_it(form):
    case = make("1 3 8", BF16, dropout=P, adapters=BF16)
    found = run(case)
    assert {value.dtype for value in found.values()} == {BF16}
    assert_right(found, case, BF16)


@FORM
def test_switched_off_is_the_base(form):
    """Without adapters in the group, dropout draws nothing and y is the linears' own, bias and all."""
    case = make("1 3 8", FP32, dropout=P)
    base = Group(tuple(p._replace(adapters=()) for p in case.group.projections), P, STREAM)
    y = lora_group(case.x, base, torch.tensor(SEED, device=DEVICE))
    linears = [torch.nn.functional.linear(case.x, p.weight, p.bias) for p in base.projections]
    torch.testing.assert_close(y, torch.cat(linears, 1))
    assert not torch.allclose(y, run(case)["y"])
    kept = lora_group(case.x, case.group, None)  # no seed: eval mode
    assert wrong_ones(run(case) | {"y": kept.detach()}, case, FP32) == {"y"}
    undropped = make("1 3 8", FP32)
    assert_right(run(undropped) | {"y": kept.detach()}, undropped, FP32)


def _adapter(case: Case, index: int, **changes) -> Case:
    """`case` with one field of the first adapter of one projection changed."""
    projections = list(case.group.projections)
    first, *others = projections[index].adapters
    projections[index] = projections[index]._replace(adapters=(first._replace(**changes), *others))
    return case._replace(group=Group(tuple(projections), case.group.dropout, case.group.stream))


def _projection(case: Case, index: int, **changes) -> Case:
    projections = list(case.group.projections)
    projections[index] = projections[index]._replace(**changes)
    return case._replace(group=Group(tuple(projections), case.group.dropout, case.group.stream))


def _mistakes(case: Case) -> dict[str, tuple[Case, set[str]]]:
    """Wrong groups, and what of y and the gradients has to differ for each."""
    first, second, third = case.group.projections
    a, b, _ = first.adapters[0]
    no_a, no_b = torch.zeros_like(a, requires_grad=True), torch.zeros_like(b, requires_grad=True)
    turned = second.adapters[0].a.detach().roll(1, 0).requires_grad_()
    lost_row = third.weight.clone().index_fill_(0, torch.tensor([4], device=DEVICE), 0)
    everything = set(plain(case, FP32))
    return {
        "a bias lost": (_projection(case, 0, bias=None), {"y"}),
        "a bias by one": (_projection(case, 2, bias=third.bias.roll(1)), {"y"}),
        "no scaling": (_adapter(case, 0, scale=1.0), {"y", "dx", "dA0", "dB0"}),
        "A zero": (_adapter(case, 0, a=no_a), {"y", "dx", "dB0"}),
        "B zero": (_adapter(case, 0, b=no_b), {"y", "dx", "dA0"}),
        "rows of A turned": (_adapter(case, 1, a=turned), {"y", "dx", "dB1"}),
        "a row of W lost": (_projection(case, 2, weight=lost_row), {"y", "dx"}),
        "another stream": (case._replace(group=Group(case.group.projections, P, STREAM + 1)), everything),
        "another p": (case._replace(group=Group(case.group.projections, 0.35, STREAM)), everything),
    }


@FORM
def test_every_mistake_shows_where_it_must(form):
    case = make("1 3 8", FP32, dropout=P)
    assert wrong_ones(run(case), case, FP32) == set()
    for name, (mistaken, expected) in _mistakes(case).items():
        assert wrong_ones(run(mistaken), case, FP32) == expected, name


def test_masks_of_two_adapters_differ():
    """Controls of the replay: one mask for all, or masks in another order, are refused."""
    case = make("1 3 8", FP32, dropout=P)
    found = run(case)
    for order in ([0, 0, 0], [1, 0, 2]):
        other = case._replace(bits=case.bits[order].contiguous())
        moved = {index for index, source in enumerate(order) if index != source}
        expected = {"y", "dx"} | {f"d{which}{index}" for which in "AB" for index in moved}
        assert wrong_ones(found, other, FP32) == expected


@FORM
@DTYPES
@pytest.mark.parametrize("wide", [False, True], ids=["same dtype", "fp32 stream"])
@pytest.mark.parametrize("place", ["new", "in place", "rows between NaN"])
def test_residual(place, wide, dtype, form):
    """y = residual + group(x); the fp32 stream keeps fp32, and what stands around `out` stays."""
    case = make("1 3 8", dtype, dropout=P)
    rows, columns = case.x.shape[0], case.group.rows
    kind = FP32 if wide else dtype
    residual = strided(torch.randn(rows, columns, generator=torch.Generator().manual_seed(4)), kind)
    before, out = residual.clone(), None
    if place != "new":
        out = residual if place == "in place" else strided(torch.full_like(before, float("nan")), kind)
    weights = assemble(case.group, dtype, extended=form == "extended")
    x = new_rows(rows, case.x.shape[1], case.group.width, weights)
    x.plain.copy_(case.x)
    with torch.no_grad():
        y = group_forward(x, case.group, weights, case.bits, residual=residual, out=out)
        right = before.double() + reference(case.x.double(), case.wide, masks_of(case))
        like = before + reference(case.x, case.like, masks_of(case))
    assert y.dtype == kind and (out is None or y is out)
    assert place == "in place" or torch.equal(residual, before)
    assert_as_good(y, like, right, dtype)
    if wide:
        assert not torch.equal(y, y.to(dtype).float()) or dtype == FP32
    for share in (1.0, 0.02):  # of the residual, lost
        with pytest.raises(AssertionError, match="error"):
            assert_as_good(y - share * before, like, right, dtype)
    if out is not None:
        around = torch.cat([out._base[-1], out._base[:, columns:].flatten()])
        assert torch.equal(around.nan_to_num(-1.0), torch.full_like(around, between(kind)).nan_to_num(-1.0))


@FORM
def test_incoming_gradients_and_inputs_are_left_alone(form):
    """Also one without memory of its own: `sum` expands a single number."""
    case = make("several on one", FP32, dropout=P)
    kept = [t.clone() for t in (case.x, case.dy, *case.group.parameters)]
    run(case)
    assert all(torch.equal(t, k) for t, k in zip((case.x, case.dy, *case.group.parameters), kept, strict=True))
    x = case.x.detach().requires_grad_()
    lora_group(x, case.group, torch.tensor(SEED, device=DEVICE)).sum().backward()
    ones = case._replace(dy=torch.ones_like(case.dy))
    assert_as_good(x.grad, plain(ones, FP32)["dx"], plain(ones, FP64)["dx"], FP32)


@FORM
@DROPOUT
@pytest.mark.parametrize("shape", ["several on one", "five in all"])
def test_gradcheck(shape, dropout, form):
    case = make(shape, FP64, rows=3, columns=10, dropout=dropout, adapters=FP64)
    x = case.x.detach().clone().requires_grad_()

    def function(x, *parameters):
        values = iter(parameters)
        projections = tuple(
            p._replace(adapters=tuple(Adapter(next(values), next(values), a.scale) for a in p.adapters))
            for p in case.group.projections
        )
        group = Group(projections, case.group.dropout, case.group.stream)
        return lora_group(x, group, torch.tensor(SEED, device=DEVICE))

    with backend.use("reference"):
        assert torch.autograd.gradcheck(function, (x, *case.group.parameters), fast_mode=True)
        assert torch.autograd.gradcheck(lambda x: reference(x, case.wide, masks_of(case)), (x,), fast_mode=True)


def test_the_cheaper_form_is_chosen():
    """8 O K bytes against 24 N O: 16-bit bases by tokens, 4-bit ones always (they are unpacked anyway)."""
    plain_base, bare = make("1 3 8", BF16).group, make("no adapter", BF16).group
    assert [prefers_extended(plain_base, K // 3 + more) for more in (-K // 3, 0, 1)] == [False, False, True]
    assert not prefers_extended(bare, 9 * K) and prefers_extended(make("no adapter", BF16, kind="nf4").group, 1)
    packed = make("1 3 8", BF16, kind="nf4").group
    assert isinstance(packed.projections[0].weight, Quantised) and prefers_extended(packed, 1)
    assert not prefers_extended(make("1 3 8", BF16, kind="mixed").group, 1)


def test_refusals():
    case = make("1 3 8", FP32)
    for x in (case.x[:, 1:], case.x[None]):
        with pytest.raises(ValueError, match=r"lora: x is .* not \(N, 72\)"):
            lora_group(x, case.group)


class Masked(torch.nn.Module):  # in the place of PEFT's dropout: a mask that is given
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


@DROPOUT
def test_the_reference_is_peft(dropout):
    """Two adapters on one linear with a bias: the definition itself, y and gradients, against PEFT in float64."""
    case = make(([(3, 5)], [(24, True)]), FP64, rows=9, dropout=dropout, adapters=FP64)
    (projection,), masks = case.wide.projections, masks_of(case)
    linear = torch.nn.Linear(K, 24, device=DEVICE, dtype=FP64)
    linear.weight.data, linear.bias.data = projection.weight, projection.bias
    model = torch.nn.Sequential(linear)
    for name, adapter in zip("uv", projection.adapters, strict=True):
        rank = len(adapter.a)
        config = LoraConfig(r=rank, lora_alpha=adapter.scale * rank, target_modules=["0"])
        inject_adapter_in_model(config, model, adapter_name=name)
    layer = model[0]
    layer.set_adapter(["u", "v"])
    for index, (name, adapter) in enumerate(zip("uv", projection.adapters, strict=True)):
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = adapter.a.data.clone(), adapter.b.data.clone()
        if masks:
            layer.lora_dropout[name] = Masked(masks[index])
    x = case.x.detach().requires_grad_()
    weights = [part[name].weight for name in "uv" for part in (layer.lora_A, layer.lora_B)]
    y = model(x)
    found = named(y, torch.autograd.grad(y, [x, *weights], case.dy))
    for name, ours in plain(case, FP64).items():
        assert_as_good(ours, found[name], found[name], FP64)
        with pytest.raises(AssertionError, match="error"):
            assert_as_good(ours * (1 + 1e-9), found[name], found[name], FP64)
