"""verify, end to end: what must pass passes, and beside it every fault that must not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2tool.checkpoint.adapter import delta, open_adapter
from qwen2tool.errors import UserError
from qwen2tool.verify.limits import FEWEST_TOKENS
from qwen2tool.verify.report import Report
from qwen2tool.verify.run import verify
from qwen2tool.verify.statistics import LogitFigures
from tests.tiny import write_tiny
from tests.verify.common import State, peft_merged, random_samples, read_state, variant, without

SAMPLES = random_samples()
SCORED = 6 * 44


def run(reference: Path, candidate: Path, **options: Any) -> Report:
    return verify(reference, candidate, options.pop("samples", SAMPLES), **options)


def measured(report: Report) -> tuple[LogitFigures, LogitFigures]:
    """(candidate, floor), and the promises that every report keeps."""
    assert report.figures is not None and report.floor is not None
    assert report.exit_code == {"equivalent": 0, "different": 1, "undecided": 2}[report.verdict]
    parsed = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert (parsed["schema_version"], parsed["verdict"]) == (2, report.verdict)
    return report.figures, report.floor


def test_a_folder_and_itself(base_folder: Path) -> None:
    report = run(base_folder, base_folder)
    figures, floor = measured(report)
    assert (report.verdict, figures.tokens) == ("equivalent", SCORED)
    assert figures.kld_max < 1e-10
    assert 1e-6 < floor.kld_mean < 1e-3
    assert report.floor_of == "bfloat16 against float32"


def test_other_shards_order_and_metadata(tmp_path: Path, base_folder: Path) -> None:
    shuffled = variant(base_folder, tmp_path / "new", lambda state: dict(reversed(state.items())), shards=5)
    report = run(base_folder, shuffled)
    assert report.verdict == "equivalent"
    assert {tensor.kind for tensor in report.tensors} == {"identical"}


def test_what_peft_merged(base_folder: Path, adapter_folder: Path, merged_folder: Path) -> None:
    report = run(base_folder, merged_folder, adapter=adapter_folder)
    figures, floor = measured(report)
    assert report.verdict == "equivalent"
    assert figures.kld_mean < floor.kld_mean


Edit = Callable[[State, State, dict[str, torch.Tensor]], State]


def unmerged(base: State, merged: State, updates: dict[str, torch.Tensor]) -> State:
    return base


def halved(base: State, merged: State, updates: dict[str, torch.Tensor]) -> State:
    return merged | {n: (base[n].float() + u / 2).bfloat16() for n, u in updates.items()}


def one_layer_forgotten(base: State, merged: State, updates: dict[str, torch.Tensor]) -> State:
    return merged | {n: base[n] for n in updates if ".layers.1." in n}


def merged_twice(base: State, merged: State, updates: dict[str, torch.Tensor]) -> State:
    return merged | {n: (base[n].float() + 2 * u).bfloat16() for n, u in updates.items()}


@pytest.mark.parametrize("edit", [unmerged, halved, one_layer_forgotten, merged_twice])
def test_a_wrong_merge(
    tmp_path: Path, base_folder: Path, adapter_folder: Path, merged_folder: Path, edit: Edit
) -> None:
    updates = {f"{module}.weight": delta(pair) for module, pair in open_adapter(adapter_folder).pairs.items()}
    wrong = variant(merged_folder, tmp_path / "wrong", lambda s: edit(read_state(base_folder), s, updates))
    report = run(base_folder, wrong, adapter=adapter_folder)
    figures, floor = measured(report)
    assert report.verdict == "different"
    assert figures.kld_mean > 10 * floor.kld_mean


def test_all_biases_dropped(tmp_path: Path, base_folder: Path) -> None:
    report = run(base_folder, variant(base_folder, tmp_path / "dropped", without("bias")))
    figures, floor = measured(report)
    assert (report.verdict, report.reason) == ("different", "the q, k and v biases of all 3 layers are missing")
    assert figures.kld_mean > 100 * floor.kld_mean
    assert any("zeros" in note for note in report.notes)


BIAS = "model.layers.1.self_attn.v_proj.bias"


def tiny_bias(state: State) -> None:
    state[BIAS] *= 1e-4


def no_bias(state: State) -> None:
    state[BIAS].zero_()


def test_a_zeroed_bias_that_the_logits_cannot_see(tmp_path: Path, base_folder: Path) -> None:
    small = variant(base_folder, tmp_path / "small", tiny_bias)
    report = run(small, variant(small, tmp_path / "zeroed", no_bias))
    figures, floor = measured(report)
    assert figures.kld_mean < floor.kld_mean
    assert (report.verdict, report.reason) == ("different", "the v bias of layer 1 is zero")


def nudge(name: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[name].view(torch.int16).view(-1)[5] += 1

    return change


@pytest.mark.parametrize("name", [BIAS, "model.layers.0.self_attn.k_proj.bias", "model.norm.weight"])
def test_one_unit_of_one_entry_of_a_vector(tmp_path: Path, base_folder: Path, name: str) -> None:
    report = run(base_folder, variant(base_folder, tmp_path / "nudged", nudge(name)))
    figures, floor = measured(report)
    assert report.verdict == "different"
    assert figures.kld_mean < floor.kld_mean
    assert [tensor.name for tensor in report.worst] == [name]


def test_one_unit_of_one_entry_of_a_matrix_is_within_noise_and_of_a_table_is_not_decided(
    tmp_path: Path, base_folder: Path
) -> None:
    matrix = variant(base_folder, tmp_path / "matrix", nudge("model.layers.0.mlp.up_proj.weight"))
    assert run(base_folder, matrix).verdict == "equivalent"
    table = variant(base_folder, tmp_path / "table", nudge("model.embed_tokens.weight"))
    assert run(base_folder, table).verdict == "undecided"


def test_fp32_rounded_to_bf16_and_back_to_back(tmp_path: Path) -> None:
    fine = write_tiny(tmp_path / "fine", dtype=torch.float32)
    coarse = variant(fine, tmp_path / "coarse", lambda state: {n: t.bfloat16() for n, t in state.items()})
    report = run(fine, coarse)
    assert (report.verdict, report.floor_of) == ("equivalent", "bfloat16 against float32")
    same = run(fine, fine)
    floor = measured(same)[1]
    assert (same.verdict, same.floor_of) == ("equivalent", "eager against sdpa, float32")
    assert 0 < floor.kld_mean < 1e-8
    shrunk = variant(fine, tmp_path / "shrunk", lambda state: {n: t * (1 - 2**-7) for n, t in state.items()})
    assert run(fine, shrunk).verdict == "different"


def test_an_fp32_merge_is_held_to_fp32_noise(tmp_path: Path, adapter_folder: Path) -> None:
    base = write_tiny(tmp_path / "base", dtype=torch.float32)
    exact = peft_merged(base, adapter_folder, torch.float32)
    good = run(base, variant(base, tmp_path / "good", lambda state: exact), adapter=adapter_folder)
    assert good.verdict == "equivalent"
    assert measured(good)[0].kld_mean < 1e-8
    coarse = {name: t.bfloat16().float() if "proj.weight" in name else t for name, t in exact.items()}
    assert run(base, variant(base, tmp_path / "bad", lambda s: coarse), adapter=adapter_folder).verdict == "different"


def swap_layers(state: State) -> State:
    swapped = {".layers.0.": ".layers.2.", ".layers.2.": ".layers.0."}
    other = {n: next((n.replace(a, b) for a, b in swapped.items() if a in n), n) for n in state}
    return {other[name]: tensor for name, tensor in state.items()}


def test_swapped_layers(tmp_path: Path, base_folder: Path) -> None:
    assert run(base_folder, variant(base_folder, tmp_path / "swapped", swap_layers)).verdict == "different"


def test_rope_theta_in_the_config_alone(tmp_path: Path, base_folder: Path) -> None:
    wrong = {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    report = run(base_folder, variant(base_folder, tmp_path / "theta", config=wrong))
    assert report.verdict == "different"
    assert "rope_theta" in report.reason
    assert {tensor.kind for tensor in report.tensors} == {"identical"}


def test_little_text(base_folder: Path, adapter_folder: Path, merged_folder: Path) -> None:
    for tokens, word in ((FEWEST_TOKENS + 4, "equivalent"), (FEWEST_TOKENS + 3, "undecided")):
        report = run(base_folder, merged_folder, adapter=adapter_folder, max_tokens=tokens)
        assert report.verdict == word
    assert report.exit_code == 2
    silent = [replace(sample, scored=(False,) * 48) for sample in SAMPLES]
    nothing = run(base_folder, merged_folder, adapter=adapter_folder, samples=silent)
    assert (nothing.verdict, nothing.figures) == ("undecided", None)
    damaged = run(base_folder, merged_folder, max_tokens=8)
    assert measured(damaged)[0].tokens == 4


def test_max_tokens_cuts_the_text(base_folder: Path) -> None:
    assert measured(run(base_folder, base_folder, max_tokens=60))[0].tokens == 44 + 8


def break_norm(state: State) -> None:
    state["model.norm.weight"][3] = torch.nan


def test_nan_on_either_side(tmp_path: Path, base_folder: Path) -> None:
    broken = variant(base_folder, tmp_path / "broken", break_norm)
    assert run(base_folder, broken).verdict == "different"
    assert run(broken, broken).verdict == "undecided"


def huge(state: State) -> None:
    state["model.layers.0.mlp.down_proj.weight"] *= 1e6


def test_a_floor_that_overflows_judges_nothing(tmp_path: Path, base_folder: Path, adapter_folder: Path) -> None:
    large = variant(base_folder, tmp_path / "large", huge)
    merged = variant(large, tmp_path / "merged", lambda state: peft_merged(large, adapter_folder, torch.bfloat16))
    assert run(large, merged, adapter=adapter_folder).verdict == "equivalent"
    assert run(large, merged, adapter=adapter_folder, dtype="float16").verdict == "undecided"


def test_nf4_is_the_function_that_qlora_trained(
    tmp_path: Path, base_folder: Path, adapter_folder: Path, merged_folder: Path
) -> None:
    """A merge onto the 16-bit base is another function, one onto the dequantised NF4 base the same but for rounding."""
    plain = run(base_folder, merged_folder, adapter=adapter_folder, adapter_on="nf4")
    assert plain.verdict == "different"
    assert {tensor.kind for tensor in plain.tensors} == {"identical", "one rounding"}
    faithful = variant(merged_folder, tmp_path / "nf4", lambda s: s | nf4_merged(base_folder, adapter_folder))
    report = run(base_folder, faithful, adapter=adapter_folder, adapter_on="nf4")
    assert measured(report)[0].kld_mean < measured(plain)[0].kld_mean / 100
    assert report.verdict == "equivalent"


def nf4_merged(base: Path, adapter: Path) -> State:
    """Each adapted weight through bitsandbytes' NF4 and back, plus its update, rounded to bf16."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    state, merged = read_state(base), {}
    for module, pair in open_adapter(adapter).pairs.items():
        packed, how = quantize_4bit(state[f"{module}.weight"].float(), quant_type="nf4", compress_statistics=True)
        merged[f"{module}.weight"] = (dequantize_4bit(packed, how) + delta(pair)).bfloat16()
    return merged


def test_no_logits_where_the_candidate_cannot_run(tmp_path: Path, base_folder: Path) -> None:
    report = run(base_folder, variant(base_folder, tmp_path / "less", without("0.mlp.up_proj.weight")))
    assert (report.verdict, report.figures) == ("different", None)
    assert report.reason == "model.layers.0.mlp.up_proj.weight is missing"
    deeper = run(base_folder, variant(base_folder, tmp_path / "deeper", config={"num_hidden_layers": 4}))
    assert (deeper.verdict, deeper.figures) == ("different", None)
    assert "num_hidden_layers" in deeper.reason
    wider = run(base_folder, write_tiny(tmp_path / "wider", vocab_size=400))
    assert (wider.verdict, wider.figures) == ("different", None)


def test_a_qwen2_renamed_a_llama_loses_its_biases_in_every_reader(tmp_path: Path, base_folder: Path) -> None:
    renamed = variant(base_folder, tmp_path / "renamed", config={"model_type": "llama"})
    report = run(base_folder, renamed)
    assert (report.verdict, report.reason) == ("different", "the q, k and v biases of all 3 layers are missing")
    assert any("attention_bias" in note for note in report.notes)
    with pytest.raises(UserError, match="attention_bias off"):
        run(renamed, base_folder)
    whole = variant(base_folder, tmp_path / "whole", config={"model_type": "llama", "attention_bias": True})
    assert run(base_folder, whole).verdict == run(whole, base_folder).verdict == "equivalent"


@pytest.mark.parametrize(
    ("change", "word"),
    [({"model_type": "gemma"}, "gemma"), ({"quantization_config": {"quant_method": "gptq"}}, "quantised")],
)
def test_another_kind_of_checkpoint_is_refused(
    tmp_path: Path, base_folder: Path, change: dict[str, Any], word: str
) -> None:
    with pytest.raises(UserError, match=word):
        run(base_folder, variant(base_folder, tmp_path / "other", config=change))


def test_a_damaged_reference_is_refused_as_unusable(tmp_path: Path, base_folder: Path) -> None:
    with pytest.raises(UserError, match=r"reference.*9 of 9 q/k/v biases are missing") as caught:
        run(variant(base_folder, tmp_path / "dropped", without("bias")), base_folder)
    assert caught.value.exit_code == 2


def test_options_that_make_no_sense(base_folder: Path) -> None:
    with pytest.raises(UserError, match="--adapter-on"):
        run(base_folder, base_folder, adapter_on="nf4")
    with pytest.raises(UserError, match="token id 999"):
        run(base_folder, base_folder, samples=[replace(SAMPLES[0], ids=(999, *SAMPLES[0].ids[1:]))])


def test_an_adapter_of_another_base_is_noted(
    tmp_path: Path, base_folder: Path, adapter_folder: Path, merged_folder: Path
) -> None:
    marked = tmp_path / "adapter"
    marked.mkdir()
    for file in adapter_folder.iterdir():
        (marked / file.name).write_bytes(file.read_bytes())
    (marked / "qwen2tool.json").write_text(json.dumps({"base_fingerprint": "0" * 64}))
    report = run(base_folder, merged_folder, adapter=marked)
    assert report.verdict == "equivalent"
    assert any("another base" in note for note in report.notes)


@pytest.mark.parametrize("exchanged", [False, True])
def test_models_of_other_widths_are_different(tmp_path: Path, base_folder: Path, exchanged: bool) -> None:
    sides = (base_folder, write_tiny(tmp_path / "wide", hidden_size=96))
    report = run(*(reversed(sides) if exchanged else sides), gradients=True)
    assert (report.verdict, report.figures) == ("different", None)
    assert "layers and logits not compared: the two have hidden states of different widths" in report.notes


def test_a_layer_that_was_cut_off_with_its_config_did_not_run_on_zeros(tmp_path: Path, base_folder: Path) -> None:
    def cut(state: State) -> State:
        return {name: tensor for name, tensor in state.items() if not name.startswith("model.layers.2.")}

    short = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    report = run(base_folder, variant(base_folder, tmp_path / "cut", cut, short))
    assert report.verdict == "different" and report.figures is not None
    assert not any("zeros" in note for note in report.notes)
    bare = run(base_folder, variant(base_folder, tmp_path / "bare", without("2.self_attn.v_proj.bias")))
    assert any("zeros" in note for note in bare.notes)


def test_a_reference_that_overflows_is_noted(tmp_path: Path, base_folder: Path) -> None:
    def enlarge(state: State) -> None:
        state["model.layers.0.self_attn.q_proj.bias"][0] = 1e5

    large = variant(base_folder, tmp_path / "large", enlarge)
    assert any("in float16 predicts NaN" in note for note in run(large, large, dtype="float16").notes)
    assert not any("predicts NaN" in note for note in run(large, large).notes)
    broken = variant(base_folder, tmp_path / "broken", lambda state: {k: v * torch.nan for k, v in state.items()})
    assert not any("predicts NaN" in note for note in run(broken, broken).notes)


def test_a_merge_onto_16_bit_is_not_blamed_for_its_rounding(
    base_folder: Path, adapter_folder: Path, merged_folder: Path
) -> None:
    report = run(base_folder, merged_folder, adapter=adapter_folder, adapter_on="nf4")
    assert report.verdict == "different"
    assert "NF4 base" in report.reason and "float32" not in report.reason
