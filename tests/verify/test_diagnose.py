"""Patterns one by one, with what looks like them and is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2tool.checkpoint.adapter import Adapter, delta, open_adapter
from qwen2tool.checkpoint.view import Derived, read
from qwen2tool.convert.read import open_qwen2
from qwen2tool.verify import diagnose as module
from qwen2tool.verify.diagnose import Diagnosis, diagnose
from qwen2tool.verify.inventory import compare_inventories
from qwen2tool.verify.patterns.grids import NF4, find_grid, find_roundings
from qwen2tool.verify.patterns.lowrank import find_rank
from qwen2tool.verify.patterns.orders import find_order, named_orders
from qwen2tool.verify.patterns.sentences import CODES
from qwen2tool.verify.statistics import LogitFigures
from qwen2tool.verify.tensors import compare_tensors
from tests.tiny import write_adapter
from tests.verify import zoo
from tests.verify.common import State, peft_merged, variant
from tests.verify.faults import FAULTS

LAYER = "model.layers.1."
K_BIAS, UP = f"{LAYER}self_attn.k_proj.bias", f"{LAYER}mlp.up_proj.weight"


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def diagnosed(
    reference: Path, candidate: Path, adapters: Sequence[Adapter] = (), mine: Any = None, figures: Any = None
) -> list[Diagnosis]:
    mine, theirs = mine or open_qwen2(reference), open_qwen2(candidate, whole=False)
    return diagnose(mine, theirs, compare_inventories(mine, theirs), compare_tensors(mine, theirs), figures, adapters)


@pytest.fixture
def changed(tmp_path: Path, base_folder: Path) -> Callable[[Callable[[State], Any]], list[Diagnosis]]:
    """What is said of a copy of the base whose tensors were edited."""
    return lambda change: diagnosed(base_folder, variant(base_folder, tmp_path / "changed", change))


def test_nothing_is_said_of_a_copy(base_folder: Path) -> None:
    assert diagnosed(base_folder, base_folder) == []


def test_two_faults_are_two_diagnoses_the_surer_one_first(changed: Any) -> None:
    def both(state: State) -> None:
        state[UP] = state[UP] * 2
        state[K_BIAS] = torch.zeros_like(state[K_BIAS])

    found = changed(both)
    assert [d.code for d in found] == ["bias_zero", "weight_scaled"]
    assert [d.tensors for d in found] == [(K_BIAS,), (UP,)]
    assert found[0].sentence.startswith("The k bias of layer 1 is zero, ") and "--biases-from" in found[0].sentence
    assert found[1].sentence.startswith("up_proj.weight of layer 1 is 2 times the reference's")


def test_a_float16_overflow_is_told_from_other_nan(tmp_path: Path, base_folder: Path) -> None:
    def enlarge(state: State) -> None:
        state[UP][3, 4] = 1e5

    large = variant(base_folder, tmp_path / "large", enlarge)
    half = variant(large, tmp_path / "half", lambda s: {key: tensor.half() for key, tensor in s.items()})
    (found,) = diagnosed(large, half)
    assert (found.code, found.tensors) == ("not_finite", (UP,))
    assert "too large for float16" in found.sentence
    broken = variant(large, tmp_path / "nan", lambda s: s.update({UP: s[UP] * torch.nan}))
    (found,) = diagnosed(large, broken)
    assert found.code == "not_finite" and "float16" not in found.sentence


def test_one_entry_is_named_with_both_values(changed: Any) -> None:
    def edit(state: State) -> None:
        state[UP][7, 9] = 42.0

    (found,) = changed(edit)
    assert found.code == "entry_changed"
    assert f"{UP}[7, 9] is 42 instead of " in found.sentence


@pytest.mark.parametrize(("units", "code", "is_fault"), [(1, "entry_rounded", False), (2, "entry_changed", True)])
def test_one_unit_in_the_last_place_is_no_mistake(changed: Any, units: int, code: str, is_fault: bool) -> None:
    def edit(state: State) -> None:
        for _ in range(units):
            state[UP][7, 9] = torch.nextafter(state[UP][7, 9], torch.tensor(9.0, dtype=state[UP].dtype))

    (found,) = changed(edit)
    assert (found.code, found.is_fault) == (code, is_fault)


def test_rows_of_a_table_may_be_new_tokens(changed: Any) -> None:
    def edit(state: State) -> None:
        state["model.embed_tokens.weight"][7:9] += 1

    (found,) = changed(edit)
    assert found.code == "rows_changed" and not found.is_fault


def test_two_entries_are_not_one(changed: Any) -> None:
    def edit(state: State) -> None:
        state[UP][7, 9] = state[UP][50, 3] = 42.0

    (found,) = changed(edit)
    assert found.code == "rows_changed" and "rows 7, 50 (2 of 100)" in found.sentence and found.is_fault


def test_what_is_like_nothing_known_is_called_unknown(changed: Any) -> None:
    (found,) = changed(lambda state: state.update({UP: zoo.noise(state[UP], zoo.Zoo(3, 4, 2))}))
    assert found.code == "unknown" and f"{UP} by 0.1" in found.sentence


def test_a_head_that_is_tied_by_mistake(tmp_path: Path, base_folder: Path) -> None:
    def tie(state: State) -> None:
        del state["lm_head.weight"]

    tied = variant(base_folder, tmp_path / "tied", tie, config={"tie_word_embeddings": True})
    (found,) = diagnosed(base_folder, tied)
    assert found.code == "head_tied"


def test_identical_tensors_and_other_logits(base_folder: Path) -> None:
    kinds = dict.fromkeys(LogitFigures.__dataclass_fields__, 1e-3)
    figures = LogitFigures(**kinds)  # type: ignore[arg-type]
    (found,) = diagnosed(base_folder, base_folder, figures=figures)
    assert found.code == "arithmetic"


# Adapters


@pytest.mark.parametrize("carried", [False, True], ids=["beside the base", "in the reference's view"])
@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0, -1.0])
def test_how_much_of_an_adapter_is_held(
    tmp_path: Path, base_folder: Path, adapter_folder: Path, factor: float, carried: bool
) -> None:
    adapter = open_adapter(adapter_folder)

    def merge(state: State) -> None:
        for name, pair in adapter.pairs.items():
            key = f"{name}.weight"
            state[key] = (state[key].float() + factor * delta(pair)).bfloat16()

    candidate = variant(base_folder, tmp_path / "merged", merge)
    view = open_qwen2(base_folder, adapters=[adapter_folder] if carried else [])
    if factor == 0 and not carried:
        return  # the candidate is the base: there is no difference to explain
    (found,) = diagnosed(base_folder, candidate, [adapter], view)
    expected = {0.0: "adapter_not_applied", 2.0: "adapter_twice"}.get(factor, "adapter_scaling")
    assert found.code == expected
    assert len(found.tensors) == len(adapter.pairs)
    assert expected != "adapter_scaling" or f"{factor:g} times the adapter" in found.sentence


def test_of_two_adapters_the_one_that_is_missing_is_named(
    tmp_path: Path, base_folder: Path, adapter_folder: Path
) -> None:
    second = write_adapter(tmp_path / "second", base_folder, seed=8, target_modules=["q_proj", "v_proj"])
    only_first = variant(
        base_folder, tmp_path / "one", lambda s: peft_merged(base_folder, adapter_folder, torch.float32)
    )
    opened = [open_adapter(adapter_folder), open_adapter(second)]
    view = open_qwen2(base_folder, adapters=[adapter_folder, second])
    (found,) = diagnosed(base_folder, only_first, opened, view)
    assert found.code == "adapter_not_applied" and "the adapter second is not in" in found.sentence.lower()


def test_an_adapter_that_was_merged_right_is_no_finding(
    tmp_path: Path, base_folder: Path, adapter_folder: Path
) -> None:
    right = variant(base_folder, tmp_path / "right", lambda s: peft_merged(base_folder, adapter_folder, torch.float32))
    view = open_qwen2(base_folder, adapters=[adapter_folder])
    assert diagnosed(base_folder, right, [open_adapter(adapter_folder)], view) == []


@pytest.mark.parametrize("carried", [False, True], ids=["beside the base", "in the reference's view"])
def test_adapters_that_were_merged_one_after_the_other_were_rounded_twice(
    tmp_path: Path, base_folder: Path, adapter_folder: Path, carried: bool
) -> None:
    """Neither of the two is another one than was named, which an update of low rank would say."""
    folders = [adapter_folder, write_adapter(tmp_path / "second", base_folder, seed=8)]
    adapters = [open_adapter(folder) for folder in folders]

    def merge(state: State) -> None:
        for adapter in adapters:
            for name, pair in adapter.pairs.items():
                state[f"{name}.weight"] = (state[f"{name}.weight"].float() + delta(pair)).bfloat16()

    candidate = variant(base_folder, tmp_path / "merged", merge)
    view = open_qwen2(base_folder, adapters=folders if carried else [])
    (found,) = diagnosed(base_folder, candidate, adapters, view)
    assert (found.code, found.is_fault) == ("rounded_weights", False)
    assert len(found.tensors) == len(adapters[0].pairs)
    assert "are the base with the adapters, rounded more than once" in found.sentence
    (third,) = diagnosed(base_folder, candidate, adapters[:1], open_qwen2(base_folder, adapters=folders[:1]))
    assert third.code == "low_rank_update" and "another one than the one named" in third.sentence


def test_a_merge_nobody_told_of_is_an_update_of_low_rank(
    tmp_path: Path, base_folder: Path, adapter_folder: Path
) -> None:
    merged = variant(base_folder, tmp_path / "m", lambda s: peft_merged(base_folder, adapter_folder, torch.bfloat16))
    (found,) = diagnosed(base_folder, merged)
    assert found.code == "low_rank_update" and len(found.tensors) == 21


def test_noise_has_no_low_rank() -> None:
    weight = numbers(96, 80)
    update = numbers(96, 3, seed=1) @ numbers(3, 80, seed=2)
    assert find_rank(weight, weight + update) == 3
    assert find_rank(weight, weight + numbers(96, 80, seed=3)) is None
    assert find_rank(weight, weight) is None


# Orders


@pytest.mark.parametrize("number", range(len([*named_orders(4 * 6, 4)])))
def test_every_named_order_is_found_by_its_name(number: int) -> None:
    x = numbers(24)
    words, index = [*named_orders(24, 4)][number]
    found = find_order(x, x[index], 4)
    same = [other for other, positions in named_orders(24, 4) if torch.equal(positions, index)]
    assert found in same and words in same
    assert find_order(x[:, None].repeat(1, 3), x[index][:, None].repeat(1, 3), 4) == found


def test_orders_that_have_no_name() -> None:
    x = numbers(24)
    assert find_order(x, x, 4) is None
    assert find_order(x, x + 0.5, 4) is None
    assert find_order(x, x.roll(5), 4) == "rotated by 5 of 24 entries"
    assert find_order(x, x.view(4, 6)[[2, 0, 1, 3]].reshape(-1), 4) == "with the heads in the order 2, 0, 1, 3"
    mixed = x[torch.randperm(24, generator=torch.Generator().manual_seed(1))]
    assert find_order(x, mixed, 4) == "in an order that is none of the known ones"


def test_interleaving_is_that_of_llama_conversion() -> None:
    """(heads, 2, size / 2) -> (heads, size / 2, 2), as converters to GGUF reorder q and k."""
    x = numbers(2 * 8)
    found = find_order(x, x.view(2, 2, 4).transpose(1, 2).reshape(-1), 2)
    assert found is not None and "interleaved" in found


# Rounding and quantisation


@pytest.mark.parametrize("block", [32, 64, 128, 256, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_is_found_with_its_block(block: int, dtype: torch.dtype) -> None:
    weight = zoo.nf4(block)(numbers(64, 256) * 0.03).to(dtype)
    assert find_grid(weight.reshape(-1), 256) == f"NF4 in blocks of {block}"


def test_the_levels_are_bitsandbytes_own() -> None:
    from bitsandbytes.functional import get_4bit_type

    assert torch.allclose(torch.tensor(NF4), get_4bit_type("nf4", device="cpu"), atol=1e-6)


@pytest.mark.parametrize("quantised", [zoo.int4_blocks, zoo.int8_rows], ids=["4-bit", "8-bit"])
def test_integers_are_found(quantised: Callable[[torch.Tensor], torch.Tensor]) -> None:
    found = find_grid(quantised(numbers(64, 256)).reshape(-1), 256)
    assert found in ("4-bit integers in blocks of 32", "8-bit integers with a scale a row")


def test_blocks_with_an_offset_are_found_by_their_few_values() -> None:
    blocks = numbers(512, 32)
    low, step = blocks.amin(1, keepdim=True), (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / 15
    found = find_grid((((blocks - low) / step).round() * step + low).reshape(-1), 256)
    assert found is not None and found.startswith("4 bits or fewer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_not_quantised_is_on_no_grid(dtype: torch.dtype) -> None:
    assert find_grid(numbers(1 << 16).to(dtype), 256) is None
    assert find_grid(torch.zeros(1 << 10), 32) is None


def test_roundings_are_told_apart() -> None:
    x = numbers(1 << 14)
    assert find_roundings(x, x.bfloat16().float())[0] == "rounded to bfloat16"
    assert find_roundings(x * 1e-5, (x * 1e-5).bfloat16().half()) == ["rounded twice, to bfloat16 and then to float16"]
    assert find_roundings(x, x.half().bfloat16()) == ["rounded twice, to float16 and then to bfloat16"]
    cut = (x.view(torch.int32) & -65536).view(torch.float32)
    assert find_roundings(x, cut) == ["cut to bfloat16 instead of rounded"]
    assert find_roundings(x, x + 1e-2) == []


def test_matrices_beyond_the_limit_share_the_pattern_of_those_that_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base_folder: Path
) -> None:
    def quantise(state: State) -> None:
        zoo.on_matrices(zoo.nf4(64))(state, zoo.Zoo(3, 4, 2))

    candidate = variant(base_folder, tmp_path / "nf4", quantise)
    monkeypatch.setattr(module, "MOST_MATRICES", 4)
    (found,) = diagnosed(base_folder, candidate)
    assert found.code == "quantised_weights" and len(found.tensors) == 21


def test_every_code_that_the_zoo_plants_has_its_sentence() -> None:
    planted = {code for fault in FAULTS for code in fault.codes}
    assert planted <= CODES.keys()
    assert len(planted) >= 24


def test_they_share_it_though_some_of_the_reference_are_quantised_already(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base_folder: Path
) -> None:
    """A model made of a GGUF file has its own grids, another one a matrix."""

    def first_ones(state: State) -> None:
        for key in (UP, UP.replace("layers.1", "layers.0")):
            state[key] = zoo.int4_blocks(state[key])

    def quantise(state: State) -> None:
        zoo.on_matrices(zoo.nf4(64))(state, zoo.Zoo(3, 4, 2))

    reference = variant(base_folder, tmp_path / "mixed", first_ones)
    candidate = variant(reference, tmp_path / "nf4", quantise)
    monkeypatch.setattr(module, "MOST_MATRICES", 11)
    found = diagnosed(reference, candidate)
    assert {d.code for d in found} == {"quantised_weights"} and sum(len(d.tensors) for d in found) == 21
    assert any("those of the reference through 4-bit integers in blocks of 32" in d.sentence for d in found)


@pytest.mark.parametrize("packed", ["candidate", "reference"])
def test_a_format_that_is_stored_is_taken_at_its_word(base_folder: Path, packed: str) -> None:
    """A view whose linears are read from Q4_K: no grid has to be recognised."""
    plain = open_qwen2(base_folder)

    def as_packed(tensor: Any) -> Any:
        if not tensor.name.endswith("_proj.weight"):
            return tensor
        source = replace(tensor, dtype="Q4_K")
        compute = lambda: zoo.int4_blocks(read(tensor).float())  # noqa: E731
        return Derived(name=tensor.name, dtype="F32", shape=tensor.shape, sources=(source,), compute=compute)

    other = replace(plain, tensors={name: as_packed(tensor) for name, tensor in plain.tensors.items()})
    mine, theirs = (plain, other) if packed == "candidate" else (other, plain)
    found = diagnose(mine, theirs, compare_inventories(mine, theirs), compare_tensors(mine, theirs))
    assert [d.code for d in found] == ["quantised_weights"] and len(found[0].tensors) == 21
    expected = (
        "quantisation (GGUF's Q4_K) and back" if packed == "candidate" else "the reference went through GGUF's Q4_K"
    )
    assert expected in found[0].sentence


def test_a_changed_matrix_of_a_quantised_reference_is_not_its_original(tmp_path: Path, base_folder: Path) -> None:
    def quantise(state: State) -> None:
        zoo.on_matrices(zoo.nf4(64))(state, zoo.Zoo(3, 4, 2))

    def change(state: State) -> None:
        state[UP] = zoo.noise(state[UP], zoo.Zoo(3, 4, 2))

    quantised = variant(base_folder, tmp_path / "nf4", quantise)
    (found,) = diagnosed(quantised, variant(quantised, tmp_path / "changed", change))
    assert (found.code, found.tensors) == ("unknown", (UP,))
    (found,) = diagnosed(quantised, base_folder)
    assert found.code == "quantised_weights" and "where the reference went through NF4" in found.sentence


def test_a_reference_that_is_not_finite_is_named_and_the_candidate_is_not_blamed(
    tmp_path: Path, base_folder: Path
) -> None:
    def break_one(state: State) -> None:
        state[UP][3, 5] = torch.nan

    bad = variant(base_folder, tmp_path / "bad", break_one)
    (found,) = diagnosed(bad, base_folder)
    assert (found.code, found.tensors, found.is_fault) == ("reference_not_finite", (UP,), False)
    assert "The reference's own up_proj.weight of layer 1 holds NaN or Inf" in found.sentence
