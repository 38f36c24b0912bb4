"""The whole path on a published Qwen2 checkpoint, as JSON: what is whole, what damage costs, what training gives.

    python scripts/real_model.py MODEL --data FOLDER --work FOLDER --parts damage noise      (CPU; minutes for a 0.5B)
    python scripts/real_model.py MODEL --data FOLDER --work FOLDER --parts train peers merge (GPU)

MODEL is a Qwen2 folder or Hub id; --data holds alpaca_en_demo.json and dpo_en_demo.json (LLaMA-Factory's data folder,
Apache-2.0). The last 99 instructions and the last 30 pairs are held out. Every command runs as a user would run it;
`peers` needs trl, datasets and unsloth, and keeps the error of what is not there. Speed is useful tokens a second:
those of the records, prompts included and padding not, over the seconds of training without loading or scoring.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from math import isfinite, nan
from pathlib import Path
from typing import Any

from common import ROOT, run_command, run_peer, write_result

sys.path.insert(0, str(ROOT))

HELD_OUT_INSTRUCTIONS, HELD_OUT_PAIRS = 99, 30
ANSWERS = 24
"""Answers that the damage is measured on, at most 160 tokens each."""
SETTING = ("--quantize", "nf4", "--rank", "64", "--alpha", "16", "--dropout", "0.05", "--learning-rate", "2e-4")
DPO_LENGTH = ("--max-length", "2048")
"""For both tools; at 1024 the prompt alone fills a tenth of the pairs."""
QUESTION = "Write a Python function that reverses a string."
PEERS: dict[str, tuple[str, ...]] = {
    "unsloth": ("--loader", "unsloth"),
    "cudnn off": ("--cudnn", "off"),
    "cudnn on": ("--cudnn", "on"),
}
"""Runs of benchmarks/trl_peer.py: TRL twice, and Unsloth."""

DAMAGE: dict[str, Callable[[int, str], bool]] = {
    "all biases": lambda layer, projection: True,
    "all q biases": lambda layer, projection: projection == "q",
    "all k biases": lambda layer, projection: projection == "k",
    "all v biases": lambda layer, projection: projection == "v",
    "v bias of layer 12": lambda layer, projection: (layer, projection) == (12, "v"),
    "v bias of layer 23": lambda layer, projection: (layer, projection) == (23, "v"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=["damage"])
    parser.add_argument(
        "--tasks", nargs="+", choices=("sft", "dpo"), default=["sft", "dpo"], help="of `train` and `peers`"
    )
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "real_model.json")
    parser.add_argument("--sft-budget", help="GB for our SFT, about what the peers' takes; default: what is free")
    parser.add_argument("--max-steps", type=int, help="for a quick look: the result is not the published figure")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    split_data(options)
    for part in options.parts:
        keep(options, part, PARTS[part](options))


def keep(options: argparse.Namespace, part: str, found: dict[str, Any]) -> None:
    """Under a name of its own where it is of one task alone, so that the other's, of another run, stays."""
    name = f"{part}_{options.tasks[0]}" if part in ("train", "peers") and len(options.tasks) == 1 else part
    write_result(options.result, ["python", "scripts/real_model.py", *sys.argv[1:]], {name: found})


def split_data(options: argparse.Namespace) -> None:
    """Writes training and held-out records; a prompt that leaves no room for an answer is left out for everybody."""
    for name, held_out in (("alpaca_en_demo", HELD_OUT_INSTRUCTIONS), ("dpo_en_demo", HELD_OUT_PAIRS)):
        records = json.loads((options.data / f"{name}.json").read_text())
        for part, chosen in (("train", records[:-held_out]), ("held-out", records[-held_out:])):
            kept = fitting(options, chosen) if name == "dpo_en_demo" else chosen
            (options.work / f"{name}-{part}.json").write_text(json.dumps(kept, ensure_ascii=False))
    answers = json.loads((options.data / "alpaca_en_demo.json").read_text())[:ANSWERS]
    (options.work / "answers.json").write_text(json.dumps(answers, ensure_ascii=False))


def fitting(options: argparse.Namespace, records: list[Any]) -> list[Any]:
    from qwen2tool.checkpoint.folder import resolve
    from qwen2tool.checkpoint.load import load_tokenizer
    from qwen2tool.data.encode import encode_preference
    from qwen2tool.data.records import read_preferences

    file = options.work / "pairs.json"
    file.write_text(json.dumps(records))
    tokenizer = load_tokenizer(resolve(options.model))
    length = int(DPO_LENGTH[1])
    pairs = [encode_preference(tokenizer, p, n, length) for n, p in enumerate(read_preferences(file))]
    fits = [all(any(sample.scored) for sample in pair) for pair in pairs]
    print(f"{fits.count(False)} of {len(records)} pairs do not fit into {length} tokens and are left out")
    return [record for record, fit in zip(records, fits, strict=True) if fit]


def damage(options: argparse.Namespace) -> dict[str, Any]:
    """inspect --values, the model against itself, and verify-equivalence of damaged copies."""
    from qwen2tool.checkpoint.folder import resolve
    from qwen2tool.demo.damage import damaged_copy

    model = resolve(options.model)
    found: dict[str, Any] = {"inspect": run_command("inspect", model, "--values", "--json")}
    compare = answers(options)
    found["itself"] = run_command("verify-equivalence", model, model, *compare)
    found["damaged"] = {}
    for name, lost in DAMAGE.items():
        copy = options.work / "damaged"
        damaged_copy(model, copy, lost, "zero", overwrite=True)
        found["damaged"][name] = run_command("verify-equivalence", model, copy, *compare)
        shutil.rmtree(copy)
    damaged_copy(model, options.work / "damaged", DAMAGE["all biases"], "drop", overwrite=True)
    found["dropped: inspect"] = run_command("inspect", options.work / "damaged", "--json")
    shutil.rmtree(options.work / "damaged")
    return found


def noise(options: argparse.Namespace) -> dict[str, Any]:
    """The model against itself in other arithmetic: eager against sdpa in fp32 (bf16 against fp32 is in `damage`)."""
    pair = (options.model, options.model)
    return {"eager against sdpa": run_command("verify-equivalence", *pair, *answers(options), "--dtype", "float32")}


def answers(options: argparse.Namespace) -> tuple[str | Path, ...]:
    return "--data", options.work / "answers.json", "--max-length", "160", "--json"


def train(options: argparse.Namespace) -> dict[str, Any]:
    """QLoRA SFT, then DPO from its adapter, each scored on held-out records before and after."""
    steps = ("--max-steps", str(options.max_steps)) if options.max_steps else ()
    common = ("--model", options.model, "--overwrite", "--json", *steps)
    budget = ("--memory-budget", options.sft_budget) if options.sft_budget else ()
    flags = {
        "sft": (*SETTING, *budget, *files(options, "alpaca_en_demo")),
        "dpo": (
            *files(options, "dpo_en_demo"), "--task", "dpo", "--quantize", "nf4", "--learning-rate", "5e-5",
            *DPO_LENGTH, "--adapter", options.work / "sft" / "adapter",
        ),
    }  # fmt: skip
    found = {}
    for task in filter(options.tasks.__contains__, flags):
        run = run_command("train", *common, *flags[task], "--output", options.work / task)
        found[task] = run | speed(run.get("report", {})) | {"metrics": metrics(options.work / task)}
    return found


def speed(report: dict[str, Any]) -> dict[str, Any]:
    """Under the names of benchmarks/trl_peer.py; empty of a run that failed."""
    if "tokens" not in report:
        return {}
    return {"useful_tokens": report["tokens"], "useful_tokens_per_s": report["tokens"] / report["train_seconds"]}


def files(options: argparse.Namespace, name: str) -> tuple[str | Path, ...]:
    return "--data", options.work / f"{name}-train.json", "--eval-data", options.work / f"{name}-held-out.json"


def metrics(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    kept = ("step", "loss", "grad_norm", "rewards/margins", "rewards/accuracies")
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [{key: round(line[key], 5) for key in kept if key in line} for line in lines if "loss" in line]


def peers(options: argparse.Namespace) -> dict[str, Any]:
    """TRL with torch's choice of attention and with cuDNN forbidden, and Unsloth (SFT alone); all judged by our own
    held-out scores. The result file is written after each of them."""
    found: dict[str, Any] = {}
    for name, flags in PEERS.items():
        folder = options.work / f"peer-{name.replace(' ', '-')}"
        if "sft" in options.tasks:
            found[f"sft, {name}"] = peer(options, "sft", folder, *flags)
            keep(options, "peers", found)
            if not isfinite(found[f"sft, {name}"]["held_out"].get("sft", {}).get("nll", nan)):
                continue  # what DPO would start from is NaN already, or not there
        if "dpo" in options.tasks and name != "unsloth":
            start = ("--adapter", folder / "sft", "--learning-rate", "5e-5", *DPO_LENGTH)
            found[f"dpo, {name}"] = peer(options, "dpo", folder, *flags, *start)
            keep(options, "peers", found)
    return found


def peer(options: argparse.Namespace, task: str, folder: Path, *flags: str | Path) -> dict[str, Any]:
    """One run of benchmarks/trl_peer.py into a folder of `folder`; DPO is scored against what SFT left there."""
    from qwen2tool.checkpoint.folder import resolve

    data = options.work / f"{'alpaca' if task == 'sft' else 'dpo'}_en_demo-train.json"
    steps = ("--max-steps", str(options.max_steps)) if options.max_steps else ()
    common = ("--model", resolve(options.model).absolute(), "--data", data, "--output", folder / task, *steps)
    shutil.rmtree(folder / task, ignore_errors=True)  # what an earlier run saved would be scored for one that fails
    run = run_peer(ROOT / "benchmarks" / "trl_peer.py", "--task", task, *common, *flags)
    try:
        held_out = score(options, folder / task, folder / "sft" if task == "dpo" else None)
    except Exception as error:  # an adapter that cannot be loaded is a finding about this peer alone
        held_out = {"error": f"{type(error).__name__}: {error}"}
    return run | {"held_out": held_out}


def score(options: argparse.Namespace, adapter: Path, reference: Path | None) -> dict[str, Any]:
    """Held-out NLL of an adapter on the NF4 base, and its rewards against `reference`; both as `train` reports them."""
    from dataclasses import asdict

    from peft import PeftModel

    from qwen2tool.checkpoint.folder import open_checkpoint
    from qwen2tool.checkpoint.load import load_model, load_tokenizer
    from qwen2tool.routing.swap import route
    from qwen2tool.training.dataset import read_records
    from qwen2tool.training.evaluate import dpo_score, pair_log_probs, sft_score
    from qwen2tool.training.model import place
    from qwen2tool.training.settings import load_settings

    if not (adapter / "adapter_config.json").is_file():
        return {"error": "no adapter was saved"}
    names = {"model": options.model, "data": "-", "output": "-"}
    settings = [load_settings(None, names | {"task": task, "max_length": 2048}) for task in ("sft", "dpo")]
    placement, checkpoint = place(settings[0]), open_checkpoint(options.model)
    tokenizer = load_tokenizer(checkpoint.path)
    instructions = read_records(tokenizer, options.work / "alpaca_en_demo-held-out.json", settings[0]).items
    pairs = read_records(tokenizer, options.work / "dpo_en_demo-held-out.json", settings[1]).items

    def loaded(path: Path) -> Any:
        model = load_model(checkpoint, dtype=placement.dtype, device=placement.device, nf4=True)
        model = PeftModel.from_pretrained(model, path)
        route(model)
        return model

    model = loaded(adapter)
    found: dict[str, Any] = {"sft": asdict(sft_score(model, instructions, placement, 4))}
    if reference:
        policy = pair_log_probs(model, pairs, placement, 4)
        found["dpo"] = asdict(dpo_score(policy, pair_log_probs(loaded(reference), pairs, placement, 4), pairs, 0.1))
    return found


def merge(options: argparse.Namespace) -> dict[str, Any]:
    """Merge, verify against base + adapter on either base, one greedy answer before and after, push --dry-run."""
    adapter, merged = options.work / "dpo" / "adapter", options.work / "merged"
    found = {"merge": run_command("merge", options.model, adapter, merged, "--overwrite", "--json")}
    compare = ("--adapter", adapter, "--data", options.work / "alpaca_en_demo-held-out.json", "--json")
    for base in ("16bit", "nf4"):
        found[f"verify, adapter on {base}"] = run_command(
            "verify-equivalence", options.model, merged, *compare, "--adapter-on", base
        )
    found["answer before"] = {"text": greedy_answer(options.model)}
    found["answer after"] = {"text": greedy_answer(str(merged))}
    found["push --dry-run"] = run_command("push", merged, "your-name/merged", "--dry-run")
    return found


def greedy_answer(name: str) -> str:
    import torch

    from qwen2tool.checkpoint.folder import open_checkpoint
    from qwen2tool.checkpoint.load import load_model, load_tokenizer

    checkpoint = open_checkpoint(name)
    tokenizer = load_tokenizer(checkpoint.path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(checkpoint, dtype="float32", device=device)
    chat = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(device)
    output = model.generate(**inputs, max_new_tokens=160, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


PARTS = {"damage": damage, "noise": noise, "train": train, "peers": peers, "merge": merge}

if __name__ == "__main__":
    main()
