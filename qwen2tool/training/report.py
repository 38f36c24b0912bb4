"""What a run did, as figures: written to report.json and printed at the end."""

from __future__ import annotations

import platform
import statistics
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch

from qwen2tool import __version__
from qwen2tool.console import format_bytes, print_table, resident_peak, say
from qwen2tool.training.evaluate import DpoScore, SftScore
from qwen2tool.training.tasks import Score


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """Figures of one run. Times in seconds, memory in bytes, losses in nats; `eval_*` are None without `eval_data`.

    `routes` says what ran for each module and what layers kept, as `fast.Plans` has it.
    `first_loss` and `last_loss` are means over the first and last tenth of the steps.
    `tokens` are those of all batches, prompts included and nothing that only fills up, and `train_seconds` is what the
    steps over them took, first batch to last (without loading, scoring and DPO's reference log-probs). Of a resumed run
    both are what this process did.
    """

    task: str
    output: str
    steps: int
    records: int
    skipped: int
    cut: int
    trainable_parameters: int
    first_loss: float
    last_loss: float
    seconds: float
    tokens: int
    train_seconds: float
    step_seconds: float
    peak_memory: int
    peak_memory_of: str
    eval_before: Score | None
    eval_after: Score | None
    routes: dict[str, Any]
    environment: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def environment() -> dict[str, str]:
    """Versions and device that every figure depends on."""
    packages = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes")
    found = {"qwen2tool": __version__, "python": platform.python_version()}
    found |= {name: version(name) for name in packages}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return found | {"device": device}


def peak_memory() -> tuple[int, str]:
    """(bytes, of what): allocated on the GPU where there is one, else resident in this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated(), "GPU, allocated"
    return resident_peak(), "process, resident"


def median(values: list[float]) -> float:
    """Of the steps after the first, which also pays for warming up."""
    return statistics.median(values[1:] or values or [0.0])


def ends(losses: list[float]) -> tuple[float, float]:
    """Means of the first and of the last tenth: one batch's loss says more about the batch than about the model."""
    tenth = max(1, len(losses) // 10)
    return statistics.mean(losses[:tenth]), statistics.mean(losses[-tenth:])


def print_report(report: TrainReport) -> None:
    """The figures a user looks for first."""
    say(f"adapter: {report.output}/adapter")
    rows: list[tuple[object, ...]] = [
        ("loss, first and last tenth", f"{report.first_loss:.4f} -> {report.last_loss:.4f}"),
        ("steps", f"{report.steps} ({report.step_seconds:.3g} s each, {report.seconds:.0f} s in all)"),
        ("tokens", f"{report.tokens:,} ({report.tokens / report.train_seconds:,.0f} a second)"),
        ("records", f"{report.records} used, {report.cut} cut at max_length, {report.skipped} left out"),
        ("trainable parameters", f"{report.trainable_parameters:,}"),
        ("peak memory", f"{format_bytes(report.peak_memory)} ({report.peak_memory_of})"),
    ]
    before, after = report.eval_before, report.eval_after
    if isinstance(before, SftScore) and isinstance(after, SftScore):
        rows.append(("held-out NLL", f"{before.nll:.4f} -> {after.nll:.4f} over {after.tokens} tokens"))
        rows.append(("held-out perplexity", f"{before.perplexity:.4g} -> {after.perplexity:.4g}"))
    if isinstance(before, DpoScore) and isinstance(after, DpoScore):
        rows.append(
            ("held-out reward accuracy", f"{before.accuracy:.3f} -> {after.accuracy:.3f} over {after.pairs} pairs")
        )
        rows.append(("held-out reward margin", f"{before.margin:.4f} -> {after.margin:.4f}"))
        rows.append(("chosen likelier per token", f"{before.preferred:.3f} -> {after.preferred:.3f}"))
    print_table("", ("", report.task.upper()), rows, numeric_from=2)
