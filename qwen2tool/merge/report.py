"""What a merge did, and how much of the update outlived the rounding to the output's dtype.

A 16-bit weight absorbs a small update: the logits barely notice (rounding errors cancel), but a tool that hides it lets
users wonder. fp16 or fp32 output keeps more.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from qwen2tool.console import format_bytes, print_table, remark, say


class Survival(NamedTuple):
    """Of one weight: ||(merged - base) - update|| / ||update||, and the share of its entries that did not change."""

    relative_error: float
    unchanged: float


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """Counts of tensors, the survival of each merged weight, seconds, and peak resident bytes of the process.

    `byte_identical` says that the tensors without an update were copied as they are (no other dtype was asked for).
    """

    output: str
    merged_tensors: int
    untouched_tensors: int
    byte_identical: bool
    survival: dict[str, Survival]
    side_files: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float
    peak_memory: int

    @property
    def median_survival(self) -> Survival:
        columns = zip(*self.survival.values(), strict=True)
        return Survival(*(statistics.median(column) for column in columns))

    @property
    def worst(self) -> str:
        """The weight whose update lost most to rounding."""
        return max(self.survival, key=lambda name: self.survival[name].relative_error)

    def to_json(self) -> dict[str, Any]:
        """Plain values; survival as its median and its worst weight."""
        plain = {key: value for key, value in asdict(self).items() if key != "survival"}
        worst = {"name": self.worst, **self.survival[self.worst]._asdict()}
        return plain | {"median_survival": self.median_survival._asdict(), "worst_survival": worst}


def print_report(report: MergeReport) -> None:
    """The figures a user looks for first."""
    say(f"merged: {report.output}")
    median, worst = report.median_survival, report.survival[report.worst]
    untouched = "byte-identical" if report.byte_identical else "converted to the chosen dtype"
    rows = [
        ("tensors", f"{report.merged_tensors} merged, {report.untouched_tensors} others {untouched}"),
        (
            "update lost to rounding",
            f"{median.relative_error:.2%} (median), {worst.relative_error:.2%} in {report.worst}",
        ),
        ("weights that did not change", f"{median.unchanged:.1%} (median)"),
        ("carried over", ", ".join(report.side_files)),
        ("time, peak memory", f"{report.seconds:.1f} s, {format_bytes(report.peak_memory)} (process, resident)"),
    ]
    print_table("", ("", "merge"), rows, numeric_from=2)
    for note in report.notes:
        remark(f"note: {note}")
