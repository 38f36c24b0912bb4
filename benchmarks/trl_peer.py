"""TRL on the same records, in the same order, with the same settings: the peer of `qwen2tool train`, one run a process.

    python benchmarks/trl_peer.py --task sft --model FOLDER --data FILE --output FOLDER [--loader unsloth]

Everything is TRL's default except what `common` names. `--cudnn off` forbids cuDNN attention, which torch otherwise
picks for a padded batch on Hopper GPUs. `--loader unsloth` (SFT alone) takes the model from Unsloth's FastLanguageModel
with its own gradient checkpointing, and TRL's trainer as Unsloth patches it: what it makes of padding is its default.

Prints one JSON line: losses as TRL logged them, gradient norms, seconds of `train()` without loading, and how many
useful tokens that is a second: those of the records, prompts included, without padding. Needs trl and datasets, and
unsloth for its loader, which the project does not depend on.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA, DROPOUT = 64, 16, 0.05


def main() -> None:
    options = parse()
    if options.loader == "unsloth":  # before torch, transformers and trl, as it asks for
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(options.output).resolve().parent / "unsloth"))
        importlib.import_module("unsloth")
    import torch

    torch.backends.cuda.enable_cudnn_sdp(options.cudnn == "on")
    trainer, tokens = (sft if options.task == "sft" else dpo)(options)
    seconds: list[float] = []
    trainer.add_callback(clock(seconds))
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    trainer.train()
    total = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated()
    print("RESULT " + json.dumps(result(options, trainer, tokens, total, seconds) | {"peak_memory_bytes": peak}))
    trainer.save_model(options.output)


def result(
    options: argparse.Namespace, trainer: Any, tokens: int, total: float, seconds: list[float]
) -> dict[str, Any]:
    """What is printed; `tokens` an epoch, in proportion where --max-steps ends it early."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    useful = round(tokens * trainer.state.epoch)
    counted = sorted(seconds[1:] or seconds)
    return {
        "task": options.task,
        "loader": options.loader,
        "cudnn_attention": options.cudnn,
        "losses": [entry["loss"] for entry in logs],
        "grad_norms": [str(entry["grad_norm"]) for entry in logs],
        "seconds": total,
        "median_step_seconds": counted[len(counted) // 2],
        "useful_tokens": useful,
        "useful_tokens_per_s": useful / total,
        "last_rewards": {key: logs[-1][key] for key in logs[-1] if key.startswith("rewards/")},
    }


def clock(seconds: list[float]) -> Any:
    """A callback that adds the seconds of each optimizer step, the device waited for."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        start = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.start)

    return Clock()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["sft", "dpo"], required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--loader", choices=["transformers", "unsloth"], default="transformers")
    parser.add_argument("--cudnn", choices=["on", "off"], default="on")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--max-steps", type=int, default=-1)
    options = parser.parse_args()
    if options.loader == "unsloth" and options.task != "sft":
        parser.error("--loader unsloth is for --task sft")
    return options


def common(options: argparse.Namespace) -> dict[str, Any]:
    """Of the trainer's configuration. Optimizer, decay and schedule are TRL's defaults, named because Unsloth has its
    own."""
    return {
        "output_dir": options.output, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4,
        "learning_rate": options.learning_rate, "num_train_epochs": 1, "max_steps": options.max_steps,
        "max_grad_norm": 0.3, "logging_steps": 1, "save_strategy": "no", "report_to": [], "bf16": True,
        "seed": options.seed, "max_length": options.max_length, "disable_tqdm": True, "weight_decay": 0.0,
        "optim": "adamw_torch_fused", "lr_scheduler_type": "linear", "warmup_steps": 0,
    }  # fmt: skip


def load(options: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": 0}
    )


def load_unsloth(options: argparse.Namespace) -> tuple[Any, Any]:
    """(model with a fresh adapter, tokenizer)."""
    import torch
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(options.model), max_seq_length=options.max_length, dtype=torch.bfloat16, load_in_4bit=True,
        local_files_only=True,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=list(TARGETS), bias="none",
        use_gradient_checkpointing="unsloth", random_state=options.seed,
    )  # fmt: skip
    return model, tokenizer


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )


def sft_rows(options: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Token ids and labels of each record, as `qwen2tool train` makes them."""
    from transformers import AutoTokenizer

    from qwen2tool.data.encode import encode_conversation
    from qwen2tool.data.records import read_conversations

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = []
    for number, conversation in enumerate(read_conversations(options.data)):
        sample = encode_conversation(tokenizer, conversation, number, options.max_length)
        labels = [token if counts else -100 for token, counts in zip(sample.ids, sample.scored, strict=True)]
        rows.append({"input_ids": list(sample.ids), "labels": labels})
    return rows


def sft(options: argparse.Namespace) -> tuple[Any, int]:
    """(the trainer, useful tokens of an epoch)."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = sft_rows(options)
    keywords: dict[str, Any] = {}
    if options.loader == "unsloth":
        model, tokenizer = load_unsloth(options)
    else:
        model, tokenizer = load(options), AutoTokenizer.from_pretrained(options.model)
        keywords["peft_config"] = lora()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**common(options)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **keywords,
    )
    return trainer, sum(len(row["input_ids"]) for row in rows)


def dpo(options: argparse.Namespace) -> tuple[Any, int]:
    """(the trainer, useful tokens of an epoch: prompt and answer of either side)."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from qwen2tool.data.records import read_preferences

    rows = [
        {
            "prompt": list(preference.prompt),
            "chosen": [{"role": "assistant", "content": preference.chosen}],
            "rejected": [{"role": "assistant", "content": preference.rejected}],
        }
        for preference in read_preferences(options.data)
    ]
    model = load(options)
    if options.adapter:
        model = PeftModel.from_pretrained(model, options.adapter, is_trainable=True)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**common(options), beta=0.1),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=None if options.adapter else lora(),
    )
    sides = [(row, row[f"{side}_ids"]) for row in trainer.train_dataset for side in ("chosen", "rejected")]
    return trainer, sum(min(len(row["prompt_ids"]) + len(answer), options.max_length) for row, answer in sides)


if __name__ == "__main__":
    main()
