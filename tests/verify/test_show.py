"""The printed report, as a pipe gets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2tool.verify.run import verify
from qwen2tool.verify.show import print_report
from qwen2tool.verify.statistics import format_ratio
from tests.verify.common import State, random_samples, variant, without


def test_verdict_figures_and_width(tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dropped = variant(base_folder, tmp_path / "dropped", without("bias"))
    print_report(verify(base_folder, dropped, random_samples()))
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[0] == "different: the q, k and v biases of all 3 layers are missing"
    assert "tensors: 30 identical, 0 one rounding, 0 different, 9 missing, 0 extra" in lines
    assert "biases: 0 in the candidate, 9 in the reference" in lines
    assert [line.split()[0] for line in lines if line.startswith(("noise", "candidate "))][:5] == [
        "noise,",
        "noise,",
        "noise",
        "noise",
        "candidate",
    ]
    assert max(len(line) for line in lines if not line.startswith("diagnosis: ")) <= 100
    assert "zeros" in output.err


def test_a_difference_is_listed_with_its_size(
    base_folder: Path, merged_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_report(verify(base_folder, merged_folder, random_samples(1)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("different: the logits differ by ")
    listed = [line for line in lines if line.startswith("model.layers.")]
    assert len(listed) == 8 and all(len(line.split()) == 4 for line in listed)


def scale(state: State) -> None:
    state["model.layers.1.mlp.down_proj.weight"] *= 0.5


def test_the_layer_at_fault_is_marked(tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = variant(base_folder, tmp_path / "bad", scale)
    print_report(verify(base_folder, bad, random_samples(), gradients=True, tolerance=0.5))
    output = capsys.readouterr().out
    start = next(n for n, line in enumerate(output.splitlines()) if line.startswith("layer "))
    first, hurt, behind = output.splitlines()[start + 2 : start + 5]
    assert first.split() == ["0", *"0000000"]
    assert hurt.split()[:5] == ["1", *"0000"] and hurt.split()[5] == "0.5*"
    assert behind.split()[:4] == ["2", *"000"] and "*" not in behind
    assert "first beyond its noise: mlp of layer 1, 0.5; " in output
    assert "gradients: 45 compared on the same input; " in output and "allowed mean KLD: 0.5" in output
    assert max(len(line) for line in output.splitlines() if not line.startswith(("diagnosis", "equiv", "diff"))) <= 100


def test_identical_layers_need_no_table(base_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_report(verify(base_folder, base_folder, random_samples()))
    assert "layers: all 3 compute the same to the last bit" in capsys.readouterr().out.splitlines()


def test_layers_that_one_side_lacks_are_not_called_the_same(
    tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut(state: State) -> State:
        return {name: tensor for name, tensor in state.items() if not name.startswith("model.layers.2.")}

    short = variant(base_folder, tmp_path / "cut", cut, {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2})
    print_report(verify(base_folder, short, random_samples()))
    lines = capsys.readouterr().out.splitlines()
    assert "layers: the 2 that both sides have compute the same to the last bit; 1 is on one side only" in lines


@pytest.mark.parametrize(
    ("ratio", "error", "shown"),
    [(1.00011812, 4.3e-5, "1.000118 ± 0.000043"), (0.8358, 1.1e-2, "0.836 ± 0.011"), (1.0, 0.0, "1 ± 0"),
     (1.5e9, 2e8, "1.50e+09 ± 2.0e+08"), (1.0, float("nan"), "1 ± nan")],
)  # fmt: skip
def test_a_ratio_has_the_digits_of_its_error(ratio: float, error: float, shown: str) -> None:
    assert format_ratio(ratio, error) == shown
