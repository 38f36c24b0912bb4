"""Gradients of a layer against autograd through transformers' and PEFT's own layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.verify.gradients import GradientInput, Gradients, layer_gradients, relative_error
from qwen2tool.verify.one_layer import OneLayer
from qwen2tool.verify.run import verify
from qwen2tool.verify.sides import open_sides
from qwen2tool.verify.single import LINEARS, SEED, load_layer, put_lora, random_pairs
from qwen2tool.verify.stream import text_of
from tests.verify.common import State, random_samples, variant

TEXT = text_of(random_samples(3, 20))
BATCH = TEXT.batches()[0]
X = torch.randn(TEXT.tokens, 64, generator=torch.Generator().manual_seed(4))


def ours(folder: Path, index: int, dtype: torch.dtype = torch.float32) -> Gradients:
    layer = OneLayer(open_sides(folder, folder).candidate, "cpu")
    layer.fill(index)
    layer.cast(dtype)
    return layer_gradients(layer, GradientInput(index, [(BATCH, X)]))


def theirs(folder: Path, index: int) -> Gradients:
    """PEFT's LoRA layers in transformers' layer, in fp32."""
    checkpoint = open_checkpoint(folder)
    model: Any = load_layer(checkpoint, index, dtype=torch.float32, device="cpu")
    model.norm = torch.nn.Identity()
    parameters = put_lora(model.layers[0], index, random_pairs(checkpoint, index), None, dtype=torch.float32)
    x = X.clone().requires_grad_()
    y = model(inputs_embeds=x.view(3, 20, 64), use_cache=False)[0].view(60, 64)
    dy = torch.randn(X.shape, generator=torch.Generator().manual_seed(SEED + index))
    found = torch.autograd.grad(y, [x, *parameters.values()], dy)
    return dict(zip(("input", *parameters), found, strict=True))


@pytest.mark.parametrize("index", [0, 2])
def test_gradients_are_those_of_peft_in_transformers(base_folder: Path, index: int) -> None:
    found, wanted = ours(base_folder, index), theirs(base_folder, index)
    assert found.keys() == wanted.keys() and len(found) == 1 + 2 * len(LINEARS)
    other = ours(base_folder, 1)
    for name, gradient in wanted.items():
        assert relative_error(found[name], gradient) < 1e-5, name
        assert gradient.abs().max() > 0, name
        assert relative_error(other[name], gradient) > 0.1, name


def zero_v(state: State) -> None:
    state["model.layers.1.self_attn.v_proj.bias"].zero_()


def halve_down(state: State) -> None:
    state["model.layers.1.mlp.down_proj.weight"] *= 0.5


def test_errors_beside_the_noise_of_16_bit(tmp_path: Path, base_folder: Path) -> None:
    report = verify(base_folder, variant(base_folder, tmp_path / "v", zero_v), random_samples(), gradients=True)
    clean, hurt, behind = report.layers
    assert set(clean.gradients) == {"input", *(f"{n}.lora_{side}" for n in LINEARS for side in "AB")}
    assert max(clean.gradients.values()) == max(behind.gradients.values()) == 0
    for name in ("self_attn.o_proj.lora_A", "mlp.up_proj.lora_A", "self_attn.q_proj.lora_B"):
        assert hurt.gradients[name] > 3 * hurt.gradient_noise[name] > 1e-4, name
    assert {found.part for found in hurt.beyond("bfloat16")} >= {"v", "gradient of self_attn.o_proj.lora_A"}
    assert clean.beyond("bfloat16") == behind.beyond("bfloat16") == []


def test_they_are_not_computed_unless_asked_for(base_folder: Path) -> None:
    assert all(not layer.gradients for layer in verify(base_folder, base_folder, random_samples(2)).layers)


def test_an_adapted_reference_has_the_gradients_of_the_merged_model(
    base_folder: Path, adapter_folder: Path, merged_folder: Path
) -> None:
    merged = verify(base_folder, merged_folder, random_samples(), adapter=adapter_folder, gradients=True)
    assert merged.verdict == "equivalent"
    for layer in merged.layers:
        assert 0 < layer.gradients["input"] < 2 * layer.gradient_noise["input"]
    plain = verify(base_folder, base_folder, random_samples(), adapter=adapter_folder, gradients=True)
    assert plain.verdict == "different"
    assert all(layer.gradients["input"] > 5 * layer.gradient_noise["input"] for layer in plain.layers)


def test_relative_error_of_what_is_not_there() -> None:
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_error(torch.ones(3), torch.zeros(3)) == float("inf")
    assert relative_error(torch.full((3,), float("nan")), torch.ones(3)) == float("inf")
    assert relative_error(torch.ones(2), torch.ones(3)) == float("inf")
