"""The report for a reader: the verdict first, then what each stage saw."""

from __future__ import annotations

from qwen2tool.console import console, format_number, print_table, remark, say
from qwen2tool.verify.report import LISTED, Report
from qwen2tool.verify.statistics import LogitFigures
from qwen2tool.verify.tensors import count_kinds

STYLE = {"equivalent": "bold green", "different": "bold red", "undecided": "bold yellow"}
COLUMNS = ("logits", "KLD mean", "median", "99 %", "max", "same top-1", "PPL ref", "PPL", "PPL ratio")


def print_report(report: Report) -> None:
    """Verdict, tensors, logits."""
    console().print(f"{report.verdict}: {report.reason}", style=STYLE[report.verdict], markup=False)
    counts = count_kinds(report.tensors)
    say("tensors: " + ", ".join(f"{counts[kind]} {kind}" for kind in ("identical", "one rounding", "different")))
    for names, what in ((report.inventory.missing, "missing"), (report.inventory.extra, "extra")):
        if names:
            say(f"{what}: {len(names)} tensors: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}")
    if report.worst:
        rows = [(t.name, t.max_abs, t.relative_error, t.cosine) for t in report.worst[:LISTED]]
        print_table("", ("differs most", "max abs", "relative error", "cosine"), rows)
    if report.figures and report.floor:
        rows_ = [_row(f"noise: {report.floor_of}", report.floor), _row("candidate", report.figures)]
        print_table("", COLUMNS, rows_)
        say(f"over {report.figures.tokens} tokens")
    for note in report.notes:
        remark(f"note: {note}")


def _row(label: str, figures: LogitFigures) -> tuple[object, ...]:
    return (
        label,
        figures.kld_mean,
        figures.kld_median,
        figures.kld_99,
        figures.kld_max,
        f"{figures.same_top:.2%}",
        figures.ppl_reference,
        figures.ppl_candidate,
        f"{format_number(figures.ppl_ratio)} ± {format_number(figures.ppl_ratio_se)}",
    )
