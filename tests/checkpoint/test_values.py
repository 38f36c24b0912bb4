"""Statistics of tensor data against torch, and what inspect makes of zeros, NaN and a head that is not tied."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from qwen2tool.checkpoint import raw, values
from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.header import read_header
from qwen2tool.checkpoint.report import inspect_checkpoint
from qwen2tool.checkpoint.show import print_report
from qwen2tool.checkpoint.values import measure, measure_tensor
from tests.checkpoint.edits import load_state, put, rewrite
from tests.tiny import write_tiny

K1 = "model.layers.1.self_attn.k_proj.bias"
EMBEDDING = "model.embed_tokens.weight"


def stats_of(tensor: torch.Tensor, tmp_path):
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    return measure_tensor(read_header(tmp_path / "x.safetensors").tensors["x"])


def findings(folder) -> str:
    report = inspect_checkpoint(folder, values=True)
    assert report.exit_code == bool(report.findings)
    return " ".join(report.findings)


def zero(*endings: str):
    def change(state):
        for name, tensor in state.items():
            if name.endswith(endings):
                tensor.zero_()

    return change


def test_norms_and_extremes_are_those_of_torch(base_folder):
    stats, state = measure(open_checkpoint(base_folder)), load_state(base_folder)
    assert stats.keys() == state.keys()
    for name, tensor in state.items():
        wide = tensor.double()
        assert stats[name].l2 == pytest.approx(wide.norm().item(), rel=1e-6), name
        assert stats[name].max_abs == wide.abs().max().item(), name
        assert stats[name].zeros == (tensor == 0).sum().item(), name
        assert (stats[name].numel, stats[name].nan, stats[name].inf) == (tensor.numel(), 0, 0), name


def test_a_report_holds_the_bias_table(base_folder):
    report, state = inspect_checkpoint(base_folder, values=True), load_state(base_folder)
    assert report.exit_code == 0
    table = report.to_json()["biases"]["stats"]
    for layer in range(3):
        for projection in "qkv":
            wanted = state[f"model.layers.{layer}.self_attn.{projection}_proj.bias"].double()
            assert table[str(layer)][projection]["l2"] == pytest.approx(wanted.norm().item(), rel=1e-6)
    matrices = {n: t.double() for n, t in state.items() if t.dim() == 2}
    together = report.to_json()["values"]["matrices"]
    assert together["count"] == len(matrices) == 23
    assert together["l2"] == pytest.approx(torch.cat([t.flatten() for t in matrices.values()]).norm().item(), rel=1e-6)
    largest = sorted(matrices, key=lambda n: -matrices[n].abs().max().item())[:5]
    assert [row["name"] for row in together["worst"]] == largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_pieces_add_up(tmp_path, monkeypatch, dtype):
    """Pieces of 64 bytes, an odd length, every kind of special value in some piece but not in all."""
    monkeypatch.setattr(values, "BLOCK_BYTES", 64)
    x = torch.randn(1003, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[[3, 900]], x[[4, 5, 901]], x[[100, 101, 102, 700]] = float("nan"), float("-inf"), 0.0
    found, finite = stats_of(x, tmp_path), x[x.isfinite()].double()
    assert (found.nan, found.inf, found.zeros, found.numel) == (2, 3, (x == 0).sum().item(), 1003)
    assert found.l2 == pytest.approx(finite.norm().item(), rel=1e-6) and found.max_abs == finite.abs().max().item()


def test_norms_of_long_tensors_keep_their_digits(tmp_path):
    x = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    truth = x.double().norm().item()
    assert stats_of(x, tmp_path).l2 == pytest.approx(truth, rel=1e-7)
    assert torch.linalg.vector_norm(x).item() != pytest.approx(truth, rel=1e-5), "fp32 alone would not do"


def test_squares_do_not_overflow(tmp_path):
    x = torch.tensor([3e30, -4e30])
    assert stats_of(x, tmp_path).l2 == pytest.approx(5e30, rel=1e-6)
    assert not torch.linalg.vector_norm(x).square().isfinite()


def test_an_empty_tensor_has_no_values(tmp_path):
    found = stats_of(torch.empty(0, 4), tmp_path)
    assert (found.l2, found.max_abs, found.zero_fraction, found.all_zero) == (0.0, 0.0, 0.0, False)


def test_re_initialised_biases(base_copy):
    rewrite(base_copy, zero("_proj.bias"))
    assert "all q/k/v biases are zero in every layer: they were re-initialised" in findings(base_copy)
    report = inspect_checkpoint(base_copy)
    assert report.exit_code == 1 and report.headline.startswith("all 9 q/k/v biases are there, but every one is zero")


def test_one_zero_bias_is_named(base_copy):
    rewrite(base_copy, zero(K1))
    text = findings(base_copy)
    assert f"1 of 9 q/k/v biases are all zero, the first is {K1}" in text and "re-initialised" not in text


def test_a_single_zero_in_a_bias_is_no_finding(base_copy):
    rewrite(base_copy, lambda state: state[K1].__setitem__(0, 0.0))
    assert findings(base_copy) == ""
    assert inspect_checkpoint(base_copy, values=True).to_json()["biases"]["stats"]["1"]["k"]["zero_fraction"] == 1 / 32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(base_copy, value, capsys):
    rewrite(base_copy, lambda state: state[K1].__setitem__(0, value))
    report = inspect_checkpoint(base_copy, values=True)
    assert report.findings == (f"1 tensor is not finite (NaN or Inf), the first is {K1}",)
    stats = report.to_json()["biases"]["stats"]["1"]["k"]
    assert stats["nan"] + stats["inf"] == 1 and stats["l2"] < 100
    print_report(report)
    assert ("1 NaN" if value != value else "1 Inf") in capsys.readouterr().out


def test_a_hole_in_a_download(base_copy):
    rewrite(base_copy, zero("model.layers.2.mlp.gate_proj.weight"))
    assert "1 weight is all zero, the first is model.layers.2.mlp.gate_proj.weight" in findings(base_copy)


def test_parts_of_packed_weights_are_no_matrices(base_copy):
    before = inspect_checkpoint(base_copy, values=True).to_json()["values"]["matrices"]
    put(base_copy, "model.layers.0.mlp.up_proj.weight.quant_map", torch.full((16,), 50.0))
    after = inspect_checkpoint(base_copy, values=True).to_json()["values"]["matrices"]
    assert after == before and before["max_abs"] < 50


def test_values_beyond_fp16_are_a_note(base_copy):
    rewrite(base_copy, lambda state: state[EMBEDDING][0].__setitem__(0, 70000.0))
    report = inspect_checkpoint(base_copy, values=True)
    assert report.exit_code == 0 and any(EMBEDDING in note and "65504" in note for note in report.notes)
    rewrite(base_copy, lambda state: state[EMBEDDING][0].__setitem__(0, 65000.0))
    assert inspect_checkpoint(base_copy, values=True).to_json()["values"]["beyond_fp16"] == []


def test_a_tied_head_stored_twice(tmp_path):
    folder = write_tiny(tmp_path / "tied", tie_word_embeddings=True)
    table = load_state(folder)[EMBEDDING]
    put(folder, "lm_head.weight", table.clone())
    report = inspect_checkpoint(folder, values=True)
    assert report.to_json()["head"]["lm_head"] == "equal" and report.exit_code == 0
    table[-1, -1] += 1
    put(folder, "lm_head.weight", table)
    report = inspect_checkpoint(folder, values=True)
    assert report.to_json()["head"]["lm_head"] == "different" and "head is tied" in report.findings[0]


def test_a_tied_head_that_was_trained_apart_shows_without_values(tmp_path, monkeypatch):
    """A hundred places are looked at; a difference in one entry elsewhere takes --values."""
    monkeypatch.setattr(raw, "PLACE_BYTES", 4)
    folder = write_tiny(tmp_path / "tied", tie_word_embeddings=True)
    table = load_state(folder)[EMBEDDING]
    put(folder, "lm_head.weight", table.clone())
    assert inspect_checkpoint(folder).sections["head"]["lm_head"] == "present"
    for change in (table * 1.01, torch.cat([table[:-1], table[:1]]), table[:-1].clone(), table.float()):
        put(folder, "lm_head.weight", change)
        report = inspect_checkpoint(folder)
        assert (report.sections["head"]["lm_head"], report.exit_code) == ("different", 1)
        assert any("the head is tied, but lm_head.weight differs" in finding for finding in report.findings)
    table[1, 0] += 1
    put(folder, "lm_head.weight", table)
    states = [inspect_checkpoint(folder, values=values).sections["head"]["lm_head"] for values in (False, True)]
    assert states == ["present", "different"]
