"""What a conversion did, for the one who asked for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen2tool.checkpoint.view import View
from qwen2tool.console import format_bytes, print_table, remark, resident_peak, say
from qwen2tool.convert.plan import Job
from qwen2tool.convert.restore import Restored


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """`tensors` counts by what happened to them; `lossy` is what reading the source could not bring back.

    `damage` is that of the manifest, `resumed_shards` counts those that an earlier run had finished (of a GGUF, which
    is one file, `resumed_tensors`). `warnings` are about the source: one sentence each.
    """

    output: str
    read_as: str
    to: str
    mapping: str
    tensors: dict[str, int]
    nbytes: int
    resumed_shards: int
    resumed_tensors: int
    side_files: tuple[str, ...]
    biases: dict[str, Any] | None
    damage: dict[str, Any] | None
    lossy: str
    warnings: tuple[str, ...]
    seconds: float
    peak_memory: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def report_of(
    out: Path,
    view: View,
    job: Job,
    manifest: dict[str, Any],
    side_files: list[str],
    nbytes: int,
    restored: Restored | None,
    seconds: float,
    warnings: tuple[str, ...],
    *,
    resumed_shards: int = 0,
    resumed_tensors: int = 0,
) -> ConvertReport:
    """The report of a conversion that is done."""
    return ConvertReport(
        output=str(out),
        read_as=view.kind,
        to=manifest["to"],
        mapping=job.mapping,
        tensors=dict(Counter(job.how.values())),
        nbytes=nbytes,
        resumed_shards=resumed_shards,
        resumed_tensors=resumed_tensors,
        side_files=tuple(side_files),
        biases=restored.to_json() if restored else None,
        damage=manifest["damage"],
        lossy=view.lossy,
        warnings=warnings,
        seconds=seconds,
        peak_memory=resident_peak(),
    )


def print_report(report: ConvertReport) -> None:
    """The figures a user looks for first."""
    say(f"converted: {report.output}")
    counts = ", ".join(f"{count} {how}" for how, count in sorted(report.tensors.items(), key=lambda item: -item[1]))
    rows = [
        ("read as", report.read_as),
        ("mapping", report.mapping),
        ("tensors", f"{counts} ({format_bytes(report.nbytes)})"),
        ("carried over", ", ".join(report.side_files) or "nothing: the source has no tokenizer beside its weights"),
        ("time, peak memory", f"{report.seconds:.1f} s, {format_bytes(report.peak_memory)} (process, resident)"),
    ]
    if report.biases:
        rows.insert(2, ("biases", _biases(report.biases)))
    if report.damage:
        rows.insert(2, ("rounding" if "worst" in report.damage else "LOST", _damage(report.damage)))
    print_table("", ("", "conversion"), rows, numeric_from=2)
    if report.lossy:
        remark(f"note: {report.lossy}")
    resumed = f"{report.resumed_shards} shards" if report.resumed_shards else f"{report.resumed_tensors} tensors"
    if report.resumed_shards or report.resumed_tensors:
        remark(f"note: {resumed} of an earlier run were found whole and kept")


def _biases(biases: dict[str, Any]) -> str:
    return (
        f"{len(biases['restored'])} from {biases['original']}; of the other {biases['compared']} tensors "
        f"{biases['byte_equal']} are its own byte for byte"
    )


def _damage(damage: dict[str, Any]) -> str:
    if "worst" in damage:
        return (
            f"{damage['what']}: relative error {_share(damage['median_relative_error'])} (median), "
            f"{_share(damage['worst_relative_error'])} in {damage['worst']}; {damage['exact']} other tensors exact"
        )
    return (
        f"{damage['what']}: mean KLD {damage['mean_kld']:.3g}, same top-1 {damage['same_top1']:.1%}, perplexity "
        f"{damage['perplexity_before']:,.4g} before, {damage['perplexity_after']:,.4g} after"
    )


def _share(value: float) -> str:
    """A percentage; a power of ten where one digit behind the point would say 0.0 of what is not 0."""
    return f"{value:.1%}" if value >= 5e-4 or not value else f"{value:.1e}"
