"""The comparison of fused layers for a reader; the table fits 100 columns."""

from __future__ import annotations

from collections import Counter
from statistics import fmean

from qwen2tool.console import console, print_table, remark, say
from qwen2tool.verify.limits import NOISE_MULTIPLE
from qwen2tool.verify.report import LISTED
from qwen2tool.verify.route_report import WHOLE, Errors, LayerReport, RouteReport
from qwen2tool.verify.show import STYLE

GRADIENTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ROUTE_COLUMNS = ("layer", "output", "input grad", "q_proj", "k_proj", "v_proj", "nearest its bar", "of bar")


def print_routes(report: RouteReport) -> None:
    """Verdict, layers by what runs for them, the layers nearest to their bar, notes."""
    console().print(f"{report.verdict}: {report.reason}", style=STYLE[report.verdict], markup=False)
    for reason, count in Counter(layer.not_fused for layer in report.layers).items():
        say(f"layers: {count} fused" if reason is None else f"layers: {count} run as transformers' own: {reason}")
    if report.layers:
        _print_layers(report)
    for note in report.notes:
        remark(f"note: {note}")


def _print_layers(report: RouteReport) -> None:
    layers = report.layers
    nearest = sorted(layers, key=lambda layer: -layer.worst(report.dtype)[1])[:LISTED]
    of = "" if len(nearest) == len(layers) else f", {len(nearest)} of {len(layers)} layers"
    base = " on NF4" if report.quantize == "nf4" else ""
    unit, name = (1e6, "millionths") if report.dtype == "float32" else (100, "%")
    title = f"{report.dtype}{base}, {sum(report.lengths)} tokens, error in {name}: transformers' own > routed{of}"
    rows = [_layer_row(layer, report, unit) for layer in sorted(nearest, key=lambda layer: layer.index)]
    say("")
    print_table(title, ROUTE_COLUMNS, [*rows, *_summary_rows(layers, unit)])
    bar = f"{NOISE_MULTIPLE} x transformers' own"
    say(f"q_proj, k_proj, v_proj: gradients of their LoRA; truth {report.truth}; bar {bar}")


def _columns(layer: LayerReport) -> list[Errors | None]:
    return [layer.errors.get(name) for name in WHOLE] + [layer.linear(name) for name in GRADIENTS]


def _layer_row(layer: LayerReport, report: RouteReport, unit: float) -> tuple[object, ...]:
    name, ratio = layer.worst(report.dtype)
    return (layer.index, *(_pair(e, unit) for e in _columns(layer)), name.split(".", 1)[-1], f"{ratio:.2f}")


def _summary_rows(layers: tuple[LayerReport, ...], unit: float) -> list[tuple[object, ...]]:
    """Mean and largest of each column over all layers, those that are not listed included."""
    rows: list[tuple[object, ...]] = []
    for label, summary in (("mean", fmean), ("most", max)):
        cells = []
        for column in zip(*map(_columns, layers), strict=True):
            there = [errors for errors in column if errors is not None]
            total = Errors(summary(e.reference for e in there), summary(e.routed for e in there)) if there else None
            cells.append(_pair(total, unit))
        rows.append((label, *cells, "", ""))
    return rows


def _pair(errors: Errors | None, unit: float) -> str:
    return "-" if errors is None else f"{errors.reference * unit:.2g} > {errors.routed * unit:.2g}"
