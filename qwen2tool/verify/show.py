"""The report for a reader: the verdict first, then what each stage saw; tables fit 100 columns."""

from __future__ import annotations

from math import isnan

from qwen2tool.console import console, format_number, print_table, remark, say
from qwen2tool.verify.report import LISTED, Report
from qwen2tool.verify.statistics import LogitFigures
from qwen2tool.verify.tensors import count_kinds

STYLE = {"equivalent": "bold green", "different": "bold red", "undecided": "bold yellow"}
COLUMNS = ("", "mean KLD", "median", "99 %", "max", "same top", "PPL", "PPL ratio")


def print_report(report: Report) -> None:
    """Verdict, inventory and tensors, logits, notes."""
    console().print(f"{report.verdict}: {report.reason}", style=STYLE[report.verdict], markup=False)
    _print_files(report)
    if report.figures and report.floor:
        say("")
        ppl = format_number(report.figures.ppl_reference)
        title = f"{report.figures.tokens} scored tokens, reference PPL {ppl}; noise: reference, {report.floor_of}"
        print_table(title, COLUMNS, [_row("noise", report.floor), _row("candidate", report.figures)])
    for note in report.notes:
        remark(f"note: {note}")


def _print_files(report: Report) -> None:
    counts, found = count_kinds(report.tensors), report.inventory
    classes = ", ".join(f"{counts[kind]} {kind}" for kind in ("identical", "one rounding", "different"))
    say(f"tensors: {classes}, {len(found.missing)} missing, {len(found.extra)} extra")
    say(f"biases: {found.candidate_biases} in the candidate, {found.reference_biases} in the reference")
    if one_off := sum(tensor.one_off for tensor in report.tensors):
        say(f"one unit in the last place off base + adapter: {one_off:,} entries")
    if report.worst:
        rows = [
            (t.name, t.max_abs, t.relative_error, "-" if isnan(t.cosine) else t.cosine) for t in report.worst[:LISTED]
        ]
        print_table("", ("differs most", "max abs", "relative error", "cosine"), rows)


def _row(label: str, figures: LogitFigures) -> tuple[object, ...]:
    return (
        label,
        figures.kld_mean,
        figures.kld_median,
        figures.kld_99,
        figures.kld_max,
        f"{figures.same_top:.2%}",
        figures.ppl_candidate,
        f"{format_number(figures.ppl_ratio)} ± {figures.ppl_ratio_se:.1e}",
    )
