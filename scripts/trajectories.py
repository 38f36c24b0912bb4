"""Trains the same data with the same seeds routed and not, and compares the losses step by step.

    python scripts/trajectories.py MODEL --data FILE --steps 50                                  (three dtypes on a GPU)
    python scripts/trajectories.py MODEL --data FILE --steps 300 --routes auto --dtypes bfloat16 float16

Two runs differ by rounding alone, and rounding moves a trajectory; how far is read off the reference path itself, run
in two dtypes. So for each seed stand beside each other

    |loss routed - loss reference| in one dtype,    |loss reference in one dtype - loss reference in fp32|

as mean and maximum over the steps. LoRA's dropout is 0: the two paths draw their masks from different generators. A
step that the fp16 loss scaler left out is counted, with its number; a run that stopped at a number that was not finite
keeps its losses and the message. The result is one part of a JSON file, `scripts/readme_tables.py` makes its table.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

from common import ROOT, write_result

sys.path.insert(0, str(ROOT))

ROUTED, REFERENCE = "auto", "reference"
"""The two values of `TrainSettings.routes`."""


def main() -> None:
    options = parse()
    part = measure(options)
    name = options.name or f"{options.steps} steps of {Path(options.model).name}"
    write_result(options.result, ["python", "scripts/trajectories.py", *sys.argv[1:]], {name: part})
    for line in part["comparisons"]:
        print(json.dumps(line))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Qwen2 folder or Hub id")
    parser.add_argument("--data", type=Path, required=True, help="instructions, JSON or JSONL")
    parser.add_argument("--eval-data", type=Path, help="held-out records; their NLL is taken after the last step")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], help="default: all there are"
    )
    parser.add_argument("--routes", nargs="+", choices=[ROUTED, REFERENCE], default=[ROUTED, REFERENCE])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--quantize", choices=["none", "nf4"], default="none")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--name", help="of the part in the result file")
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "trajectories.json")
    options = parser.parse_args(arguments)
    if options.dtypes is None:
        options.dtypes = ["float32", "bfloat16"] + (["float16"] if resolve_device(options.device) == "cuda" else [])
    return options


def resolve_device(name: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All runs and what they say of each other, as plain values."""
    runs = []
    for seed in options.seeds:
        for dtype in options.dtypes:
            for routes in options.routes:
                print(f"seed {seed}, {dtype}, routes {routes} ...", flush=True)
                run = train_once(options, seed=seed, dtype=dtype, routes=routes)
                end = run["stopped"] or f"last loss {run['losses'][-1]:.4f}, {run['skipped']} steps skipped"
                print(f"  {run['seconds']} s, {end}", flush=True)
                runs.append(run)
    setting = ("steps", "quantize", "rank", "alpha", "learning_rate", "batch_size", "accumulation", "max_length")
    return {
        "model": Path(options.model).name,
        "data": Path(options.data).name,
        "device": resolve_device(options.device),
        "setting": {name: getattr(options, name) for name in setting},
        "runs": runs,
        "comparisons": comparisons(runs),
    }


def train_once(options: argparse.Namespace, *, seed: int, dtype: str, routes: str) -> dict[str, Any]:
    """One `train`, in a folder that is thrown away: its losses and norms by step, in full, and how it ended."""
    import torch

    from qwen2tool.errors import UserError
    from qwen2tool.training.run import train
    from qwen2tool.training.settings import load_settings

    with tempfile.TemporaryDirectory() as folder, counted_steps() as stepped:
        fields = {
            "model": options.model, "data": str(options.data), "output": str(Path(folder) / "run"), "dropout": 0.0,
            "eval_data": str(options.eval_data) if options.eval_data else None, "quantize": options.quantize,
            "rank": options.rank, "alpha": options.alpha, "learning_rate": options.learning_rate,
            "scheduler": "constant", "batch_size": options.batch_size, "gradient_accumulation": options.accumulation,
            "max_length": options.max_length, "max_steps": options.steps, "skip_too_long": True,
            "device": options.device, "dtype": dtype, "routes": routes, "seed": seed,
        }  # fmt: skip
        settings = load_settings(None, fields)
        report, stopped = None, ""
        try:
            report = train(settings).to_json()
        except UserError as error:  # a loss or gradient that is not finite: a finding, not the end
            if not (Path(settings.output) / "settings.yaml").is_file():
                raise
            stopped = str(error)
        logs = read_logs(Path(settings.output) / "metrics.jsonl")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"seed": seed, "dtype": dtype, "routes": routes} | outcome(logs, len(stepped), report, stopped)


def outcome(
    logs: list[dict[str, Any]], stepped: int, report: dict[str, Any] | None, stopped: str = ""
) -> dict[str, Any]:
    """A run as plain values; `skipped_at` are the steps, from 1, whose gradient was not finite when it was clipped."""
    losses, norms = ([log[name] for log in logs] for name in ("loss", "grad_norm"))
    return {
        "losses": losses,
        "grad_norms": norms,
        "finite": all(map(isfinite, losses)) and not stopped,
        "skipped": len(logs) - stepped,
        "skipped_at": [log["step"] for log in logs if not isfinite(log["grad_norm"])],
        "stopped": stopped,
        "eval_before": report["eval_before"]["nll"] if report and report["eval_before"] else None,
        "eval_after": report["eval_after"]["nll"] if report and report["eval_after"] else None,
        "step_seconds": report["step_seconds"] if report else None,
        "seconds": round(report["seconds"], 1) if report else None,
        "layers": layer_counts(report) if report else None,
    }


def layer_counts(report: dict[str, Any]) -> dict[str, int]:
    """Decoder layers by what ran for them."""
    kinds = [r["implementation"] for r in report["routes"]["modules"] if r["module"].split(".")[-1].isdigit()]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def read_logs(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are steps."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [line for line in lines if "loss" in line]


@contextmanager
def counted_steps() -> Iterator[list[None]]:
    """A list that grows by one whenever an optimizer really stepped.

    The Trainer's own flag does not see a fused AdamW that leaves a step out, since it is called all the same and told
    by `found_inf` to do nothing; other optimizers are not called.
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook

    stepped: list[None] = []

    def note(optimizer: Any, *_: Any) -> None:
        found = getattr(optimizer, "found_inf", None)
        if found is None or not bool(found):
            stepped.append(None)

    handle = register_optimizer_step_post_hook(note)
    try:
        yield stepped
    finally:
        handle.remove()


def comparisons(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each seed: routed against reference in each dtype, and the reference in each dtype against it in fp32."""
    found = {(run["seed"], run["dtype"], run["routes"]): run for run in runs}
    lines = []
    for (seed, dtype, routes), run in found.items():
        if routes == ROUTED and (seed, dtype, REFERENCE) in found:
            lines.append(_line("routed against reference", dtype, run, found[seed, dtype, REFERENCE]))
        wide = found.get((seed, "float32", REFERENCE))
        if routes == ROUTED and dtype != "float32" and wide:
            lines.append(_line("routed against reference in float32", dtype, run, wide))
        if routes == REFERENCE and dtype != "float32" and wide:
            lines.append(_line("reference against reference in float32", dtype, run, wide))
    return lines


def _line(what: str, dtype: str, run: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    evals = run["eval_after"], other["eval_after"]
    return {
        "what": what,
        "dtype": dtype,
        "seed": run["seed"],
        **difference(run["losses"], other["losses"]),
        "held_out": None if None in evals else abs(evals[0] - evals[1]),
    }


def difference(losses: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Mean and maximum of |loss - other| over the steps that both runs made, and the largest |loss - other| / other."""
    gaps = [abs(a - b) for a, b in zip(losses, others, strict=False)]
    shares = [gap / abs(b) for gap, b in zip(gaps, others, strict=False)]
    if not gaps:
        return {"steps": 0, "mean": None, "max": None, "max_relative": None}
    worst = max if all(map(isfinite, gaps)) else (lambda values: float("nan"))  # max() may pass a NaN over
    return {"steps": len(gaps), "mean": statistics.mean(gaps), "max": worst(gaps), "max_relative": worst(shares)}


if __name__ == "__main__":
    main()
