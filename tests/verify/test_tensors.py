"""Which differences are a rounding, and which are damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwen2tool.checkpoint.adapter import delta, open_adapter
from qwen2tool.verify.sides import open_sides
from qwen2tool.verify.tensors import BLOCK, TensorComparison, compare_tensor, compare_tensors
from tests.verify.common import State, peft_merged, variant

WEIGHT = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
UPDATE = torch.randn(40, 24, generator=torch.Generator().manual_seed(1)) * 0.1


def kind(reference: torch.Tensor, candidate: torch.Tensor, update: torch.Tensor | None = None) -> str:
    return compare_tensor("x.weight", reference, candidate, update).kind


def step(tensor: torch.Tensor, steps: int) -> torch.Tensor:
    """A copy whose entry [3, 5] is so many units in the last place further from zero."""
    changed = tensor.clone()
    bits = changed.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
    bits[3, 5] += steps
    return changed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_either_way_and_one_unit_more(dtype: torch.dtype) -> None:
    rounded = WEIGHT.to(dtype)
    assert kind(WEIGHT, rounded) == kind(rounded, WEIGHT) == kind(rounded, rounded.float()) == "one rounding"
    assert kind(rounded, rounded.clone()) == "identical"
    assert kind(WEIGHT, step(rounded, 1)) == kind(rounded, step(rounded, 1)) == "different"


def test_bf16_as_fp16_is_one_rounding_but_an_overflow_is_not() -> None:
    """Below 6e-5 fp16 has fewer digits than bf16, above 65504 nothing."""
    small = (WEIGHT * 1e-5).bfloat16()
    assert kind(small, small.half()) == "one rounding"
    assert kind(small, (small * 2).half()) == "different"
    large = (WEIGHT * 1e5).bfloat16()
    assert kind(large, large.half()) == "different"


def test_nan_equals_itself_only_byte_for_byte() -> None:
    broken = WEIGHT.clone()
    broken[0, 0] = torch.nan
    assert kind(broken, broken.clone()) == "identical"
    assert kind(WEIGHT, broken) == "different"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_update_may_be_off_by_one_unit_and_no_more(dtype: torch.dtype) -> None:
    base = WEIGHT.bfloat16()
    exact = (base.float() + UPDATE).to(dtype)
    assert compare_tensor("x.weight", base, exact, UPDATE).one_off == 0
    near = compare_tensor("x.weight", base, step(exact, 1), UPDATE)
    assert (near.kind, near.one_off) == ("one rounding", 1)
    far = step(exact, 64 if dtype == torch.float32 else 2)
    assert kind(base, far, UPDATE) == "different"


def test_an_update_that_is_left_out_halved_or_of_another_layer() -> None:
    base = WEIGHT.bfloat16()
    for wrong in (0 * UPDATE, UPDATE / 2, UPDATE.flip(0)):
        assert kind(base, (base.float() + wrong).bfloat16(), UPDATE) == "different"


def test_where_weight_and_update_cancel_the_order_of_sums_may_show() -> None:
    """W = -update but for 1e-9: fp32 noise of the update is thousands of units of the result."""
    base, noisy = -UPDATE + 1e-9, UPDATE * (1 + 2**-23)
    assert kind(base, base + noisy, UPDATE) == "one rounding"
    assert kind(base, base + UPDATE * (1 + 2**-12), UPDATE) == "different"


def test_distances_against_torch_and_across_blocks() -> None:
    a = torch.randn(BLOCK + 9, generator=torch.Generator().manual_seed(2))
    b = a + 0.1 * torch.randn(BLOCK + 9, generator=torch.Generator().manual_seed(3))
    found = compare_tensor("x.weight", a, b)
    wide, other = a.double(), b.double()
    assert found.max_abs == pytest.approx((other - wide).abs().max().item(), rel=1e-12)
    assert found.relative_error == pytest.approx(((other - wide).norm() / wide.norm()).item(), rel=1e-9)
    assert found.cosine == pytest.approx(torch.nn.functional.cosine_similarity(wide, other, dim=0).item(), rel=1e-9)
    last = a.clone()
    last[-1] += 1
    assert compare_tensor("x.weight", a, last).kind == "different"


def test_zeroed() -> None:
    assert compare_tensor("x.bias", WEIGHT, 0 * WEIGHT).zeroed
    assert not compare_tensor("x.bias", WEIGHT, WEIGHT / 2).zeroed
    assert not compare_tensor("x.bias", 0 * WEIGHT, WEIGHT).zeroed


def compare_folders(reference: Path, candidate: Path, adapter: Path | None = None) -> dict[str, TensorComparison]:
    sides = open_sides(reference, candidate, adapters=[adapter] if adapter else [])
    found = compare_tensors(sides.stored, sides.candidate.view, sides.reference.update)
    return {comparison.name: comparison for comparison in found}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peft_merge_is_one_rounding_from_base_and_adapter(
    tmp_path: Path, base_folder: Path, adapter_folder: Path, dtype: torch.dtype
) -> None:
    merged = variant(base_folder, tmp_path / "merged", lambda state: peft_merged(base_folder, adapter_folder, dtype))
    found = compare_folders(base_folder, merged, adapter_folder)
    assert {c.kind for c in found.values()} <= {"identical", "one rounding"}
    assert len(found) == 39
    against_base = compare_folders(base_folder, merged)
    assert sum(c.kind == "different" for c in against_base.values()) == 21


def test_one_adapted_weight_that_lacks_its_update_is_the_one_that_differs(
    tmp_path: Path, base_folder: Path, adapter_folder: Path
) -> None:
    module = "model.layers.1.mlp.up_proj"
    update = delta(open_adapter(adapter_folder).pairs[module])

    def forget(state: State) -> State:
        merged = peft_merged(base_folder, adapter_folder, torch.bfloat16)
        original = state[f"{module}.weight"]
        assert not torch.equal(merged[f"{module}.weight"], original)
        return merged | {f"{module}.weight": original}

    found = compare_folders(base_folder, variant(base_folder, tmp_path / "forgot", forget), adapter_folder)
    assert [name for name, c in found.items() if c.kind == "different"] == [f"{module}.weight"]
    assert found[f"{module}.weight"].max_abs == pytest.approx(update.abs().max().item(), rel=1e-5)


def double_the_head(state: State) -> None:
    state["lm_head.weight"] = state["model.embed_tokens.weight"] * 2


def store_the_head(state: State) -> None:
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()


def test_a_tied_head_may_be_stored_if_it_is_the_table(tmp_path: Path, tied_folder: Path) -> None:
    same = compare_folders(tied_folder, variant(tied_folder, tmp_path / "stored", store_the_head))
    assert {c.kind for c in same.values()} == {"identical"}
    untied = variant(tied_folder, tmp_path / "untied", store_the_head, config={"tie_word_embeddings": False})
    assert {c.kind for c in compare_folders(tied_folder, untied).values()} == {"identical"}
    other = compare_folders(tied_folder, variant(tied_folder, tmp_path / "other", double_the_head))
    assert [name for name, c in other.items() if c.kind == "different"] == ["lm_head.weight"]


def one_entry(state: State) -> None:
    state["lm_head.weight"][200, 3] += 1


@pytest.mark.parametrize("change", [lambda s: None, one_entry, double_the_head, lambda s: s["lm_head.weight"].zero_()])
def test_a_large_matrix_is_compared_in_blocks_to_the_same_end(
    tmp_path: Path, base_folder: Path, change: Callable[[State], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = variant(base_folder, tmp_path / "other", lambda state: (change(state), state)[1])
    whole = compare_folders(base_folder, other)["lm_head.weight"]
    monkeypatch.setattr("qwen2tool.verify.tensors.LARGE", 1000)
    monkeypatch.setattr("qwen2tool.verify.tensors.BLOCK", 64 * 64)
    blocks = compare_folders(base_folder, other)["lm_head.weight"]
    assert (blocks.kind, blocks.zeroed, blocks.max_abs) == (whole.kind, whole.zeroed, whole.max_abs)
    assert blocks.relative_error == pytest.approx(whole.relative_error)
    assert blocks.cosine == pytest.approx(whole.cosine, nan_ok=True)
