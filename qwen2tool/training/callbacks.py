"""What a run shows and keeps while it goes on: a progress bar, metrics.jsonl, the time of each step."""

from __future__ import annotations

import json
import sys
import time
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from qwen2tool.console import Advance, format_number, progress, remark

SHOWN = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies")


class MetricsFile(TrainerCallback):
    """Appends every log of the Trainer to a JSONL file: step, epoch, loss, grad_norm, learning_rate, rewards.

    The grad_norm of a step that float16's loss scaler skipped is infinite, which JSON has no word for: null.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """One line a log; flushed, so that a killed run has told what it saw."""
        if logs and state.is_world_process_zero:
            with self._file.open("a", encoding="utf-8") as handle:
                values = {k: v if not isinstance(v, float) or isfinite(v) else None for k, v in logs.items()}
                handle.write(json.dumps({"step": state.global_step, **values}, allow_nan=False) + "\n")


class StepClock(TrainerCallback):
    """Seconds of each optimizer step, the device waited for."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the clock before the first batch of a step."""
        self._start = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stops it after the optimizer."""
        self.seconds.append(_now() - self._start)


class ProgressBar(TrainerCallback):
    """A bar on a terminal; where output is piped, one plain line a tenth of the run."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._advance: Advance | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Opens the bar at the step the run starts from."""
        self._bar = progress("training", state.max_steps)
        self._advance = self._bar.__enter__()
        self._advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step on."""
        if self._advance:
            self._advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """The figures in words, now and then."""
        tenth = max(1, state.max_steps // 10)
        if logs and "loss" in logs and (state.global_step % tenth == 0 or sys.stderr.isatty()):
            figures = ", ".join(f"{name} {format_number(float(logs[name]))}" for name in SHOWN if name in logs)
            remark(f"step {state.global_step}/{state.max_steps}: {figures}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes the bar away."""
        self.close()

    def close(self) -> None:
        """Also for runs that end with an error."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
