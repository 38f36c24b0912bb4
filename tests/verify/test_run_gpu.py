"""The same comparison on a GPU: the same verdicts and figures as on the CPU, and a fault in the same layer."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2tool.verify.run import verify
from tests.verify.common import State, random_samples, variant

pytestmark = pytest.mark.gpu


def scale(state: State) -> None:
    state["model.layers.1.mlp.down_proj.weight"] *= 0.5


def test_cuda_agrees_with_the_cpu(tmp_path: Path, base_folder: Path, adapter_folder: Path, merged_folder: Path) -> None:
    bad = variant(base_folder, tmp_path / "bad", scale)
    for candidate, adapter, word in (
        (base_folder, None, "equivalent"),
        (bad, None, "different"),
        (merged_folder, adapter_folder, "equivalent"),
    ):
        cpu, gpu = (
            verify(base_folder, candidate, random_samples(), adapter=adapter, gradients=True, device=device)
            for device in ("cpu", "cuda")
        )
        assert gpu.verdict == cpu.verdict == word
        assert cpu.figures is not None and gpu.figures is not None
        assert gpu.figures.kld_mean == pytest.approx(cpu.figures.kld_mean, rel=1e-3, abs=1e-8)
        assert [layer.beyond("bfloat16") == [] for layer in gpu.layers] == [
            layer.beyond("bfloat16") == [] for layer in cpu.layers
        ]
        for name, floor in cpu.floors.items():
            assert gpu.floors[name].kld_mean == pytest.approx(floor.kld_mean, rel=0.5)
