"""QLoRA on a 7B geometry, end to end on one GPU: make the checkpoint, SFT, DPO, merge, verify; figures as JSON.

    python scripts/gpu_7b.py --data FOLDER --tokenizer FOLDER --work FOLDER

Random weights of Qwen1.5-7B's published shape (order-1 biases) with a real tokenizer, rank 64 on all seven projections,
20 optimizer steps of SFT on alpaca_en_demo.json and 10 of DPO on dpo_en_demo.json. Needs a GPU of about 48 GB (the
comparison at the end runs in fp32), 40 GB of disk and bitsandbytes. What random weights can show is that every step
works, what it costs, and that the merged model is the function that was trained; not that anything was learned.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common import ROOT, run_command, run_script, write_result

STEPS = {"sft": 20, "dpo": 10}
LORA = ("--rank", "64", "--alpha", "16", "--dropout", "0.05")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--geometry", default="qwen1.5-7b")
    parser.add_argument("--layers", type=int, help="a short model, for a quick look")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_7b.json")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for name, step in (("checkpoint", checkpoint), ("train", train), ("merge", merge)):
        write_result(options.result, ["python", "scripts/gpu_7b.py", *sys.argv[1:]], {name: step(options)})


def base(options: argparse.Namespace) -> Path:
    return Path(options.work) / "base"


def checkpoint(options: argparse.Namespace) -> dict[str, Any]:
    layers = ("--layers", str(options.layers)) if options.layers else ()
    made = run_script(
        ROOT / "scripts" / "make_checkpoint.py", options.geometry, base(options), "--device", options.device,
        "--tokenizer", options.tokenizer, *layers,
    )  # fmt: skip
    return {"make": made, "inspect": run_command("inspect", base(options), "--json")}


def train(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for task, name in (("sft", "alpaca_en_demo"), ("dpo", "dpo_en_demo")):
        start = LORA if task == "sft" else ("--adapter", options.work / "sft" / "adapter")
        found[task] = run_command(
            "train", "--task", task, "--model", base(options), "--data", options.data / f"{name}.json",
            "--output", options.work / task, "--quantize", "nf4", "--max-steps", str(STEPS[task]), *start,
            "--device", options.device, "--overwrite", "--json",
        )  # fmt: skip
        lines = (options.work / task / "metrics.jsonl").read_text().splitlines()
        found[task]["losses"] = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    return found


def merge(options: argparse.Namespace) -> dict[str, Any]:
    adapter, merged = options.work / "dpo" / "adapter", options.work / "merged"
    found = {"merge": run_command("merge", base(options), adapter, merged, "--overwrite", "--json")}
    compare = (
        "--data",
        options.data / "alpaca_en_demo.json",
        "--max-tokens",
        "2048",
        "--device",
        options.device,
        "--json",
    )
    found["verify"] = run_command("verify-equivalence", base(options), merged, "--adapter", adapter, *compare)
    found["verify, adapter left out"] = run_command("verify-equivalence", base(options), merged, *compare)
    return found


if __name__ == "__main__":
    main()
