"""On a GPU: groups of linears with LoRA at real sizes, and inside a captured graph."""

from __future__ import annotations

import pytest
import torch

from qwen2tool.kernels.lora import lora_group
from tests.kernels.device import DEVICE
from tests.kernels.poison import nan_memory  # noqa: F401  (a fixture)
from tests.kernels.test_lora import BF16, DROPOUT, FORM, FP16, SEED, P, assert_right, forced_form, make, run  # noqa: F401

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_memory")]


REAL = {
    "qkv 7B": ([(64,), (64,), (64,)], [(3584, True), (512, True), (512, True)], 3584),
    "gate up 7B": ([(64,), (64,)], [(18944, False), (18944, False)], 3584),
    "down 0.5B": ([(8,)], [(896, False)], 4864),
    "several": ([(64, 8), (1,), ()], [(896, True), (128, True), (128, True)], 896),
}


@FORM
@DROPOUT
@pytest.mark.parametrize("kind", [None, "nf4"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", REAL)
def test_real_sizes(name, dtype, kind, dropout, form):
    ranks, linears, columns = REAL[name]
    case = make((ranks, linears), dtype, rows=2048, columns=columns, dropout=dropout, kind=kind)
    found, again = run(case), run(case)
    assert_right(found, case, dtype)
    assert all(torch.equal(found[name], again[name]) for name in found)


@FORM
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_captured_in_a_graph(dtype, form):
    """Replayed with a new x and a new seed, it gives what an eager call gives: nothing was read on the host."""
    case = make((REAL["several"][0], REAL["several"][1]), dtype, rows=512, columns=896, dropout=P, kind="nf4")
    x, seed = case.x.detach().clone().requires_grad_(), torch.tensor(1, device=DEVICE)

    def step():
        y = lora_group(x, case.group, seed)
        return y.detach(), *torch.autograd.grad(y, [x, *case.group.parameters], case.dy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    first = [value.clone() for value in captured]
    with torch.no_grad():
        x.mul_(0.5)
        seed.fill_(SEED)
    graph.replay()
    for replayed, eager, before in zip(captured, step(), first, strict=True):
        assert torch.equal(replayed, eager) and not torch.equal(replayed, before)
