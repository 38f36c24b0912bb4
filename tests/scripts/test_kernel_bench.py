"""Kernel timings: at a small size on the CPU each op's runs compute the same thing; failures and shares are kept."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
import torch

from benchmarks import kernel_cases, kernels
from benchmarks.kernel_cases import Case, Sizes

SMALL = Sizes(
    rows=32, length=16, hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=16, vocab=300, rank=4, device="cpu"
)  # fmt: skip
LIMITS = {"copy_bytes_per_s": 1e9, "flops_per_s": 1e10}
SAME = {
    "rms_norm_forward": "torch",
    "rms_norm_backward": "torch",
    "rms_norm_backward, residual added": "torch",
    "swiglu_forward": "torch",
    "swiglu_backward": "torch",
    "dequantise, gate": "bitsandbytes",
    "dequantise, gate and up": "bitsandbytes",
    "masked_grad_a": "torch",
    "masked_grad_x": "torch",
    "lora_group, qkv forward": "bitsandbytes",
    "lora_group, qkv both": "bitsandbytes",
    "attend, uniform forward": "torch",
    "attend, uniform both": "torch",
    "attend, ragged forward": "torch",
    "attend, ragged both": "torch",
    "head, both": "torch",
}
"""Ops whose runs give the same numbers; the others draw their own masks or do less (RoPE without bias)."""


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    monkeypatch.setattr(kernel_cases, "CACHE_BYTES", 1 << 14)


def flat(result: object) -> torch.Tensor:
    """All numbers of a run's result; a norm's rstd is left out, halves of a gradient lie side by side."""
    if isinstance(result, torch.Tensor):
        return result.detach().float().flatten()
    parts = [part for part in result if part is not None and part.dim() > 1]
    same_rows = len({part.shape for part in parts}) == 1
    return torch.cat(parts, 1).float().flatten() if same_rows else torch.cat([part.float().flatten() for part in parts])


@pytest.mark.parametrize("name", SAME)
def test_what_is_compared_is_the_same(name):
    """Both in bf16, so to a few roundings; another input set is the negative control."""
    torch.manual_seed(0)
    case = kernels.OPS[name](SMALL)
    other = flat(case.runs[SAME[name]]()(0))
    if name in ("masked_grad_a", "dequantise, gate and up"):  # below each other, not side by side
        other = torch.cat([part.float().flatten() for part in case.runs[SAME[name]]()(0)])
    wrong = case.runs["ours"]()(1)
    assert relative(flat(wrong), other) > 0.05
    assert relative(flat(case.runs["ours"]()(0)), other) < 0.02


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", kernels.OPS)
def test_every_op_is_timed(name):
    row = kernels.measure(name, SMALL, LIMITS)
    assert row["microseconds"]["ours"] > 0, row
    assert {"of_copy", "of_products"} & row.keys()
    others = {run: time for run, time in row["microseconds"].items() if run != "liger"}
    assert len(others) > 1 and all(isinstance(time, float) for time in others.values()), row


def test_shares_are_fewest_bytes_and_flops_over_the_time():
    case = Case(shape="", runs={}, bytes=5e3, flops=2e4)
    shares = kernels.shares(case, 10.0, LIMITS)
    assert shares["bytes_per_s"] == pytest.approx(5e8) and shares["of_copy"] == pytest.approx(0.5)
    assert shares["flops_per_s"] == pytest.approx(2e9) and shares["of_products"] == pytest.approx(0.2)
    assert kernels.shares(case, "ImportError: gone", LIMITS) == {}


def test_an_op_or_a_peer_that_fails_is_kept(monkeypatch):
    def broken() -> object:
        raise RuntimeError("first line\nlast line")

    case = Case(shape="1 x 1", runs={"ours": lambda: lambda i: i, "liger": broken}, bytes=1.0)
    monkeypatch.setitem(kernels.OPS, "half", lambda sizes: case)
    monkeypatch.setitem(kernels.OPS, "none", lambda sizes: broken())
    row = kernels.measure("half", SMALL, LIMITS)
    assert row["microseconds"]["liger"] == "RuntimeError: last line" and "of_copy" in row
    assert kernels.measure("none", SMALL, LIMITS)["microseconds"] == {"ours": "RuntimeError: last line"}


def test_a_round_of_inputs_exceeds_the_cache():
    assert kernel_cases.sets_for(1 << 20) == 2
    assert kernel_cases.sets_for(1 << 12) == 4
    assert kernel_cases.sets_for(1) == 16


def test_result_file_and_table(monkeypatch, tmp_path, capsys):
    file = tmp_path / "kernels.json"
    line = ["--ops", "rms_norm_forward", "--rows", "4", "2", "--device", "cpu", "--result", str(file)]
    monkeypatch.setattr("sys.argv", ["kernels.py", *line])
    file.write_text('{"kernels": {"rows": []}}')
    kernels.main()
    parts = json.loads(file.read_text())
    part = parts.pop("kernels rms_norm_forward rows 4 2 cpu")
    assert parts == {"kernels": {"rows": []}}, "what an earlier run measured stays"
    assert [row["shape"] for row in part["rows"]] == ["4 x 4096", "2 x 4096"]
    assert part["ceilings"]["copy_bytes_per_s"] > 0 and part["made_by"]["machine"]["torch"] == version("torch")
    assert "| rms_norm_forward | 4 x 4096 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"), [(["--ops", "soft"], "no op begins with 'soft'"), (["--rows", "3000"], "multiples of")]
)
def test_wrong_arguments(monkeypatch, capsys, flags, message):
    monkeypatch.setattr("sys.argv", ["kernels.py", *flags])
    with pytest.raises(SystemExit):
        kernels.parse()
    assert message in capsys.readouterr().err
