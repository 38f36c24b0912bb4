"""Words for lost biases."""

from __future__ import annotations

from qwen2tool.verify.biases import describe_biases
from qwen2tool.verify.tensors import TensorComparison


def name(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.self_attn.{projection}_proj.bias"


def compared(layer: int, projection: str, *, zeroed: bool = False) -> TensorComparison:
    return TensorComparison(name=name(layer, projection), kind="different", zeroed=zeroed)


def test_all_of_them() -> None:
    missing = [name(layer, projection) for projection in "vkq" for layer in range(3)]
    assert describe_biases(missing, [], 3) == ["the q, k and v biases of all 3 layers are missing"]
    assert describe_biases(missing, [], 4) == ["the q, k and v biases of layers 0-2 are missing"]


def test_one_of_them() -> None:
    assert describe_biases([], [compared(12, "v", zeroed=True)], 24) == ["the v bias of layer 12 is zero"]


def test_states_are_told_apart_and_layers_drawn_together() -> None:
    found = [compared(layer, "k") for layer in (7, 0, 1, 2)] + [compared(5, "q", zeroed=True)]
    assert describe_biases([name(5, "k")], found, 24) == [
        "the k bias of layer 5 is missing",
        "the k biases of layers 0-2 and 7 are different",
        "the q bias of layer 5 is zero",
    ]


def test_what_is_no_finding() -> None:
    fine = [TensorComparison(name=name(0, "q"), kind=kind) for kind in ("identical", "one rounding")]
    weight = TensorComparison(name="model.layers.0.self_attn.q_proj.weight", kind="different")
    assert describe_biases(["model.norm.weight"], [*fine, weight], 3) == []
