"""The picture of the bias norms: its size, what it marks, and that it appears whole or not at all."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from qwen2tool.checkpoint import plot
from qwen2tool.checkpoint.plot import plot_biases, points
from qwen2tool.checkpoint.report import inspect_checkpoint
from qwen2tool.errors import UserError
from tests.checkpoint.edits import drop, load_state, rewrite

K1, V2, Q0 = (f"model.layers.{i}.self_attn.{p}_proj.bias" for i, p in ((1, "k"), (2, "v"), (0, "q")))


def damage(folder: Path) -> None:
    drop(folder, K1)
    rewrite(folder, lambda state: (state[V2].zero_(), state[Q0].__setitem__(0, float("nan"))))


def drawn(folder: Path, file: Path) -> np.ndarray:
    plot_biases(inspect_checkpoint(folder), file)
    return imread(file)


def pixels(image: np.ndarray, colour: str) -> np.ndarray:
    """Rows of the pixels of one colour in the lower third, where marks are, without the legend at the right."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    rows, columns = np.nonzero(np.abs(image[..., :3] - wanted).max(-1) < 0.02)
    return rows[(rows > 330) & (columns < 690)]


def test_the_norms_are_those_of_torch(base_folder):
    state, found = load_state(base_folder), points(inspect_checkpoint(base_folder))
    for p in "qkv":
        wanted = [state[f"model.layers.{i}.self_attn.{p}_proj.bias"].double().norm().item() for i in range(3)]
        assert list(found[p].values()) == pytest.approx(wanted, rel=1e-6)


def test_what_cannot_be_drawn_is_told_apart(base_copy):
    damage(base_copy)
    found = points(inspect_checkpoint(base_copy))
    assert (found["k"][1], found["v"][2], found["q"][0]) == ("missing", "zero", "not finite")
    assert isinstance(found["k"][0], float)


def test_the_picture(base_folder, base_copy, tmp_path):
    whole = drawn(base_folder, tmp_path / "whole.png")
    damage(base_copy)
    damaged = drawn(base_copy, tmp_path / "damaged.png")
    assert whole.shape[:2] == damaged.shape[:2] == (500, 900)
    for p, colour in plot.COLOURS.items():
        assert len(pixels(damaged, colour)) > len(pixels(whole, colour)) + 10, f"{p} has a mark at the bottom"
    assert (tmp_path / "whole.png").stat().st_mode & 0o777 == 0o644


def test_an_existing_picture_stays(base_folder, tmp_path):
    file = tmp_path / "there.png"
    file.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"there\.png: exists"):
        plot_biases(inspect_checkpoint(base_folder), file)
    assert file.read_bytes() == b"mine"
    plot_biases(inspect_checkpoint(base_folder), file, overwrite=True)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_failure_leaves_nothing(base_folder, tmp_path, monkeypatch):
    def fail(_: object) -> bytes:
        raise RuntimeError("no ink")

    monkeypatch.setattr(plot, "_draw", fail)
    with pytest.raises(RuntimeError):
        plot_biases(inspect_checkpoint(base_folder), tmp_path / "out.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "words"), [("out.jpg", "not a .png"), ("nowhere/out.png", "no such folder"), ("folder.png", "exists")]
)
def test_a_target_that_cannot_be(base_folder, tmp_path, name, words):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=words):
        plot_biases(inspect_checkpoint(base_folder), tmp_path / name, overwrite=True)


def test_the_extra_is_named(base_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install qwen2tool\[plot\]"):
        plot_biases(inspect_checkpoint(base_folder), tmp_path / "out.png")


def test_all_zero_biases_still_make_a_picture(base_copy, tmp_path):
    rewrite(base_copy, lambda state: [t.zero_() for n, t in state.items() if n.endswith("_proj.bias")])
    assert drawn(base_copy, tmp_path / "zero.png").shape[:2] == (500, 900)


def test_unread_biases_are_not_drawn(base_folder, tmp_path):
    report = inspect_checkpoint(base_folder)
    report.sections["biases"]["read"] = False
    with pytest.raises(UserError, match="not read"):
        plot_biases(report, tmp_path / "out.png")


def test_nothing_of_pyplot_is_imported(base_folder, tmp_path):
    sys.modules.pop("matplotlib.pyplot", None)
    drawn(base_folder, tmp_path / "out.png")
    assert "matplotlib.pyplot" not in sys.modules and torch.is_tensor(torch.ones(1))
