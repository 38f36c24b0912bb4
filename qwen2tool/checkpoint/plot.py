"""The norms of the q, k and v biases by layer as a picture: a lost or zeroed one is a hole in a line.

matplotlib is an extra (`pip install qwen2tool[plot]`) and imported here only. 900 x 500 pixels, log scale, since the
norms of one model span four orders of magnitude; what a log scale cannot show (missing, zero, not finite) is marked on
the bottom line.
"""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2tool.checkpoint.inventory import QKV
from qwen2tool.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qwen2tool.checkpoint.report import Report

COLOURS = {"q": "#0072b2", "k": "#d55e00", "v": "#009e73"}
"""Told apart by readers who see few colours, and by their markers."""
MARKERS = {"q": "o", "k": "s", "v": "^"}
STATES = {"missing": "x", "zero": "v", "not finite": "*"}
ROWS = {"q": 1.0, "k": 0.72, "v": 0.52}
"""Heights of the marks at the bottom, so that three lost ones of a layer are three marks."""


def require_target(file: Path, overwrite: bool) -> None:
    """Passes a picture's name before anything is computed.

    Raises:
        UserError: it exists and may not be replaced, is no .png, has no folder, or matplotlib is not installed.
    """
    if file.suffix.lower() != ".png":
        raise UserError(f"--plot is {file}, not a .png file", "Give a name that ends in .png")
    if file.is_dir() or (file.exists() and not overwrite):
        raise UserError(f"{file}: exists", "Pass --overwrite to replace it, or choose another name")
    if not file.parent.is_dir():
        raise UserError(f"{file.parent}: no such folder", "Create it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--plot needs matplotlib", "Install it: pip install qwen2tool[plot]") from None


def plot_biases(report: Report, file: Path, overwrite: bool = False) -> None:
    """Draws `report`'s bias norms into `file`, which appears whole or not at all.

    Raises:
        UserError: as `require_target`, or the biases were not read.
    """
    require_target(file, overwrite)
    if not report.sections["biases"]["read"]:
        raise UserError(f"{report.path}: its biases were not read", "Name a checkpoint on this machine")
    handle, scratch = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(_draw(report))
        Path(scratch).chmod(0o644)
        Path(scratch).replace(file)
    finally:
        Path(scratch).unlink(missing_ok=True)


def points(report: Report) -> dict[str, dict[int, float | str]]:
    """projection -> layer -> its norm, or why there is none to draw ("missing", "zero", "not finite")."""
    biases = report.sections["biases"]
    found: dict[str, dict[int, float | str]] = {p: {} for p in QKV}
    for layer in range(report.checkpoint.geometry.num_hidden_layers):
        for p in QKV:
            stats = biases["stats"].get(str(layer), {}).get(p)
            found[p][layer] = "missing" if stats is None else _state(stats)
    return found


def _state(stats: dict[str, Any]) -> float | str:
    if stats["nan"] or stats["inf"]:
        return "not finite"
    return float(stats["l2"]) if stats["l2"] > 0 else "zero"


def _draw(report: Report) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: nothing of the process is switched
    axes = figure.add_subplot()
    rows = points(report)
    sizes = [value for row in rows.values() for value in row.values() if isinstance(value, float)]
    floor = min(sizes, default=1.0) / 4
    for p in QKV:
        _line(axes, p, rows[p], floor)
    axes.set_yscale("log")
    axes.set_ylim(floor / 3, max(sizes, default=1.0) * 2)
    axes.set_xlim(-0.7, len(rows["q"]) - 0.3)
    axes.set_xlabel("layer")
    axes.set_ylabel("norm of the bias")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    name, sound = report.path.resolve().name, report.judgement.biases_sound
    axes.set_title(f"{name}\n{report.headline}", fontsize=10, color="black" if sound else "#b00000", wrap=True)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _line(axes: Axes, projection: str, row: dict[int, float | str], floor: float) -> None:
    colour = COLOURS[projection]
    drawn = [value if isinstance(value, float) else float("nan") for value in row.values()]
    axes.plot(list(row), drawn, color=colour, marker=MARKERS[projection], markersize=4, label=f"{projection} bias")
    for state, marker in STATES.items():
        layers = [layer for layer, value in row.items() if value == state]
        if layers:
            axes.plot(
                layers, [floor * ROWS[projection]] * len(layers), color=colour, marker=marker, markersize=7,
                markeredgewidth=2, linestyle="none", label=f"{projection} {state}: {len(layers)}",
            )  # fmt: skip
