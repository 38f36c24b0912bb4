"""TRL on the same records, in the same order, with the same settings: the peer of `qwen2tool train`, one run a process.

Everything is TRL's default except what is named below; `--cudnn off` forbids cuDNN attention, which torch otherwise
picks for a padded batch on Hopper GPUs. Prints one JSON line: losses as TRL logged them, gradient norms, seconds.
Needs trl and datasets, which the project does not depend on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from qwen2tool.data.encode import encode_conversation
from qwen2tool.data.records import read_conversations, read_preferences
from qwen2tool.training.settings import LINEARS


def main() -> None:
    options = parse()
    torch.backends.cuda.enable_cudnn_sdp(options.cudnn == "on")
    trainer = (sft if options.task == "sft" else dpo)(options)
    seconds: list[float] = []
    trainer.add_callback(Clock(seconds))
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    trainer.train()
    total = time.perf_counter() - start
    trainer.save_model(options.output)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    shown = {key: logs[-1][key] for key in logs[-1] if key.startswith("rewards/")}
    result = {
        "task": options.task,
        "cudnn_attention": options.cudnn,
        "losses": [entry["loss"] for entry in logs],
        "grad_norms": [str(entry["grad_norm"]) for entry in logs],
        "seconds": total,
        "median_step_seconds": sorted(seconds[1:])[len(seconds[1:]) // 2],
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "last_rewards": shown,
    }
    print("RESULT " + json.dumps(result))


class Clock(TrainerCallback):
    """Seconds of each optimizer step, the device waited for."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds
        self.start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        torch.cuda.synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=["sft", "dpo"], required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--cudnn", choices=["on", "off"], default="on")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--max-steps", type=int, default=-1)
    return parser.parse_args()


def common(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": options.output, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4,
        "learning_rate": options.learning_rate, "num_train_epochs": 1, "max_steps": options.max_steps,
        "max_grad_norm": 0.3, "logging_steps": 1, "save_strategy": "no", "report_to": [], "bf16": True,
        "seed": options.seed, "max_length": options.max_length, "disable_tqdm": True,
    }  # fmt: skip


def load(options: argparse.Namespace) -> Any:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": 0}
    )


def lora() -> LoraConfig:
    return LoraConfig(r=64, lora_alpha=16, lora_dropout=0.05, target_modules=list(LINEARS), task_type="CAUSAL_LM")


def sft(options: argparse.Namespace) -> SFTTrainer:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = []
    for number, conversation in enumerate(read_conversations(options.data)):
        sample = encode_conversation(tokenizer, conversation, number, options.max_length)
        labels = [token if counts else -100 for token, counts in zip(sample.ids, sample.scored, strict=True)]
        rows.append({"input_ids": list(sample.ids), "labels": labels})
    return SFTTrainer(
        model=load(options),
        args=SFTConfig(**common(options)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora(),
    )


def dpo(options: argparse.Namespace) -> DPOTrainer:
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
    return DPOTrainer(
        model=model,
        args=DPOConfig(**common(options), beta=0.1),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=None if options.adapter else lora(),
    )


if __name__ == "__main__":
    main()
