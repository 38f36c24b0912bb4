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

LORA = ("--rank", "64", "--alpha", "16", "--dropout", "0.05")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--geometry", default="qwen1.5-7b")
    parser.add_argument("--layers", type=int, help="a short model, for a quick look")
    parser.add_argument("--steps", type=int, nargs=2, default=(20, 10), help="of SFT and of DPO")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_7b.json")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for step in (checkpoint, sft, dpo, merge, verify, verify_without_adapter):
        found = {step.__name__: step(options)}
        write_result(options.result, ["python", "scripts/gpu_7b.py", *sys.argv[1:]], found)


def base(options: argparse.Namespace) -> Path:
    return Path(options.work) / "base"


def checkpoint(options: argparse.Namespace) -> dict[str, Any]:
    layers = ("--layers", str(options.layers)) if options.layers else ()
    made = run_script(
        ROOT / "scripts" / "make_checkpoint.py", options.geometry, base(options), "--device", options.device,
        "--tokenizer", options.tokenizer, *layers,
    )  # fmt: skip
    return {"make": made, "inspect": run_command("inspect", base(options), "--json")}


def sft(options: argparse.Namespace) -> dict[str, Any]:
    return train(options, "sft", "alpaca_en_demo", options.steps[0], LORA)


def dpo(options: argparse.Namespace) -> dict[str, Any]:
    return train(options, "dpo", "dpo_en_demo", options.steps[1], ("--adapter", options.work / "sft" / "adapter"))


def train(
    options: argparse.Namespace, task: str, name: str, steps: int, start: tuple[str | Path, ...]
) -> dict[str, Any]:
    found = run_command(
        "train", "--task", task, "--model", base(options), "--data", options.data / f"{name}.json",
        "--output", options.work / task, "--quantize", "nf4", "--max-steps", str(steps), *start, "--skip-too-long",
        "--device", options.device, "--overwrite", "--json",
    )  # fmt: skip
    lines = (options.work / task / "metrics.jsonl").read_text().splitlines()
    return found | {"losses": [json.loads(line)["loss"] for line in lines if '"loss"' in line]}


def merge(options: argparse.Namespace) -> dict[str, Any]:
    adapter = options.work / "dpo" / "adapter"
    return run_command("merge", base(options), adapter, options.work / "merged", "--overwrite", "--json")


def verify(options: argparse.Namespace) -> dict[str, Any]:
    return compare(options, "--adapter", options.work / "dpo" / "adapter")


def verify_without_adapter(options: argparse.Namespace) -> dict[str, Any]:
    """The negative control: the merged model is not its base."""
    return compare(options)


def compare(options: argparse.Namespace, *adapter: str | Path) -> dict[str, Any]:
    text = ("--data", options.data / "alpaca_en_demo.json", "--max-tokens", "2048")
    pair = (base(options), options.work / "merged")
    return run_command("verify-equivalence", *pair, *adapter, *text, "--device", options.device, "--json")


if __name__ == "__main__":
    main()
