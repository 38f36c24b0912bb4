"""The report for a reader: the verdict first, then what each level saw; tables fit 100 columns."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, isfinite, isnan
from typing import Any

from qwen2tool.console import console, format_number, print_table, remark, say
from qwen2tool.verify.layer_figures import PARTS, LayerFigures
from qwen2tool.verify.report import LISTED, Report
from qwen2tool.verify.statistics import LogitFigures, format_ratio
from qwen2tool.verify.tensors import count_kinds

STYLE = {"equivalent": "bold green", "different": "bold red", "undecided": "bold yellow"}
LOGITS = ("", "mean KLD", "median", "99 %", "max", "top-1", "top-5", "PPL")
LAYERS = ("layer", *PARTS, "accumulated")
BEYOND = "*"
TINY = 1e-12
MOST_LAYERS = 12
"""Layers that are printed; JSON has all."""


def print_report(report: Report) -> None:
    """Verdict, diagnoses, inventory and tensors, layers, logits, notes."""
    console().print(f"{report.verdict}: {report.reason}", style=STYLE[report.verdict], markup=False)
    for diagnosis in report.diagnoses:
        say(f"diagnosis: {diagnosis.sentence}")
    _print_files(report)
    if report.layers:
        _print_layers(report)
    if report.figures and report.floors:
        _print_logits(report, report.figures)
    if report.generations:
        _print_generations(report.generations)
    if report.tasks:
        rows = [
            (s["task"], s["metric"], s["reference"], s["candidate"], s["difference"]) for s in report.tasks["scores"]
        ]
        say("")
        print_table("tasks", ("task", "metric", "reference", "candidate", "difference"), rows, numeric_from=2)
    for note in report.notes:
        remark(f"note: {note}")


def _print_files(report: Report) -> None:
    counts, found = count_kinds(report.tensors), report.inventory
    classes = ", ".join(f"{counts[kind]} {kind}" for kind in ("identical", "one rounding", "different"))
    renamed = f" ({len(found.renamed)} of them under another name)" if found.renamed else ""
    say(f"tensors: {classes}, {len(found.missing)} missing, {len(found.extra)} extra{renamed}")
    say(f"biases: {found.candidate_biases} in the candidate, {found.reference_biases} in the reference")
    if one_off := sum(tensor.one_off for tensor in report.tensors):
        say(f"one unit in the last place off base + adapter: {one_off:,} {'entry' if one_off == 1 else 'entries'}")
    if report.worst:
        rows = [
            (t.name, t.max_abs, t.relative_error, "-" if isnan(t.cosine) else t.cosine) for t in report.worst[:LISTED]
        ]
        print_table("", ("differs most", "max abs", "relative error", "cosine"), rows)


def _print_layers(report: Report) -> None:
    """Own errors, part by part, beside the noise of a part; all layers, or those with the largest own errors."""
    layers, first = report.layers, report.first_beyond
    say("")
    if not any(error for layer in layers for error in (*layer.own.values(), *layer.accumulated.values())):
        say(_all_the_same(layers))
    else:
        worst = sorted(layers, key=_badness, reverse=True)[:MOST_LAYERS]
        of = "" if len(worst) == len(layers) else f", {len(worst)} of {len(layers)} layers"
        title = f"errors of each layer on the reference's input{of}; {BEYOND} is beyond the {report.dtype} noise"
        rows = [_layer_row(layer, report.dtype) for layer in sorted(worst, key=lambda layer: layer.index)]
        print_table(title, LAYERS, [*rows, *_noise_rows(layers)])
    if first is not None:
        noise = f"its own noise is {_short(first.noise)}"
        say(f"first beyond its noise: {first.part} of layer {first.layer}, {_short(first.error)}; {noise}")
    if any(layer.gradients for layer in layers):
        _print_gradients(report)


def _all_the_same(layers: list[LayerFigures]) -> str:
    both = sum(bool(layer.own) for layer in layers)
    if (alone := len(layers) - both) == 0:
        return f"layers: all {both} compute the same to the last bit"
    verb = "is" if alone == 1 else "are"
    return f"layers: the {both} that both sides have compute the same to the last bit; {alone} {verb} on one side only"


def _badness(layer: LayerFigures) -> tuple[float, float]:
    """By its own errors first, then by what came down to it."""
    return max(layer.own.values(), default=inf), layer.accumulated.get("output", inf)


def _layer_row(layer: LayerFigures, dtype: str) -> tuple[object, ...]:
    beyond = {found.part for found in layer.beyond(dtype)}
    own = [_short(layer.own.get(part)) + BEYOND * (part in beyond) for part in PARTS]
    return (layer.index, *own, _short(layer.accumulated.get("output")))


def _noise_rows(layers: list[LayerFigures]) -> list[tuple[object, ...]]:
    """The least and the most noise of any layer, part by part."""
    rows: list[tuple[object, ...]] = []
    for label, pick in (("noise, least", min), ("noise, most", max)):
        own = [
            pick((e for layer in layers if (e := layer.own_noise.get(part)) is not None), default=None)
            for part in PARTS
        ]
        grown = pick((run["output"] for layer in layers for run in layer.noise.values()), default=None)
        rows.append((label, *map(_short, own), _short(grown)))
    return rows


def _short(value: float | None) -> str:
    """Two digits in at most six characters."""
    if value is None:
        return "-"
    return f"{value:.2g}" if value == 0 or 1e-3 <= value < 100 or not isfinite(value) else f"{value:.1e}"


def _print_gradients(report: Report) -> None:
    """How many, and which is furthest from the reference's, measured by its noise."""
    found = [
        (error / max(layer.gradient_noise[name], TINY), layer.index, name, error, layer.gradient_noise[name])
        for layer in report.layers
        for name, error in layer.gradients.items()
    ]
    ratio, index, name, error, noise = max(found)
    say(f"gradients: {len(found)} compared on the same input; furthest from the reference's by its noise:")
    say(f"  {name} of layer {index}, off by {_short(error)}; {_short(ratio)} times its noise of {_short(noise)}")


def _print_logits(report: Report, figures: LogitFigures) -> None:
    say("")
    floors: Mapping[str, LogitFigures] = report.floors
    title = f"{figures.tokens} scored tokens, reference PPL {format_number(figures.ppl_reference)}"
    rows = [_row(f"noise {n}", floor) for n, floor in enumerate(floors.values(), 1)]
    print_table(title, LOGITS, [*rows, _row("candidate", figures)])
    ratio = format_ratio(figures.ppl_ratio, figures.ppl_ratio_se)
    say(f"NLL difference {figures.nll_difference:+.2e} ± {figures.nll_difference_se:.1e}, PPL ratio {ratio}")
    say("; ".join(f"noise {n}: {name}" for n, name in enumerate(floors, 1)))
    if report.tolerance is not None:
        say(f"allowed mean KLD: {format_number(report.tolerance)}")


def _print_generations(found: dict[str, Any]) -> None:
    """How many continuations are the same, beside what the reference's own rounding does to them."""
    say("")
    rows = [
        (label, f"{part['same']:.1%}", f"{part['agreeing']:.1%}", "-" if part["first"] is None else part["first"])
        for label, part in ((f"noise, {found['floor_of']}", found["floor"]), ("candidate", found["candidate"]))
    ]
    title = f"{found['prompts']} greedy continuations of at most {found['new_tokens']} tokens"
    print_table(title, ("", "same to the end", "tokens before a difference", "soonest"), rows)


def _row(label: str, figures: LogitFigures) -> tuple[object, ...]:
    return (
        label,
        figures.kld_mean,
        figures.kld_median,
        figures.kld_99,
        figures.kld_max,
        f"{figures.same_top:.2%}",
        f"{figures.same_top5:.2%}",
        figures.ppl_candidate,
    )
