"""One trainer, one process: LoRA or QLoRA steps on a local Qwen2 checkpoint, timed; prints RESULT and one JSON object.

    python benchmarks/train_peer.py --peer unsloth --model FOLDER --batch 4 --length 2048 --dropout 0.05
    python benchmarks/train_peer.py --peer unsloth --wait

Peers: `ours` and `ours_eager` (without graph capture); `hf` (transformers, PEFT, bitsandbytes), `hf_kbit` (the same
after PEFT's `prepare_model_for_kbit_training`, which casts norms, embedding and head to fp32), `hf_fp32` (hf without 16
bit, no rival: its losses tell rounding from mistakes), `liger` (hf on Liger's kernels), `unsloth`. All get the same
token ids, the same A by module name with B zero, clipping at 0.3, fused AdamW in fp32 without weight decay. The peers
run under bf16 autocast, as in their own trainers, and without a padding mask, the fastest way to call them. Four
batches go round. A step is timed by CUDA events, the host waiting after each; the first `warmup` steps (compilation,
capture, autotuning) are not counted. Ours makes one more pass after them, eagerly: torch counts what a replay works in
only while it is captured, which may be before the optimizer has its state. The clock of `first_step_s`, the end of the
first step, starts before torch and the trainer are imported and leaves out the seeding of A, which is this script's
own; `imported_s` is when all that the peer builds on was imported, a matter of the disk more than of the peer.

With --wait the imports come first, then a line READY, then a job is read from stdin: one line, the fields of `Job` in
JSON. The time that this takes is in no figure: the clock stands still from the end of the imports to the job's arrival.

An exception ends up in the RESULT as `error`; the traceback is on stderr.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

STARTED = time.perf_counter()
HERE = Path(__file__).resolve().parent
# The script's folder leaves the path: its kernels.py is not the `kernels` that transformers and bitsandbytes look for.
sys.path[:] = [str(HERE.parent), *(entry for entry in sys.path if entry not in (str(HERE), str(HERE.parent)))]

PEERS = ("ours", "ours_eager", "hf", "hf_kbit", "hf_fp32", "liger", "unsloth")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PACKAGES = (
    "torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "liger-kernel", "unsloth", "unsloth_zoo",
    "trl", "xformers",
)  # fmt: skip
BATCHES = 4
LEARNING_RATE = 2e-4
MAX_GRAD_NORM = 0.3


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an optimizer step is made of.

    Attributes:
        batch, length: sequences a micro-batch and tokens a sequence, all of them scored.
        rank, alpha, dropout: of LoRA on all seven linears.
        quantize: "nf4" (double quantised) or "none" (bf16).
        recompute: "all" or "none": gradient checkpointing on or off; "auto", for ours alone, is its memory plan.
        budget_gb: what ours may use, in 10^9 bytes; 0 is no budget.
        accumulation: micro-batches an optimizer step.
        reference_pass: 1: every micro-batch is scored with the adapter off before, without gradients, as DPO does.
    """

    batch: int = 4
    length: int = 2048
    rank: int = 64
    alpha: int = 16
    dropout: float = 0.0
    quantize: str = "nf4"
    recompute: str = "all"
    budget_gb: float = 0.0
    accumulation: int = 1
    reference_pass: int = 0


@dataclass(frozen=True, kw_only=True)
class Job(Work):
    """What one process runs; each field is a flag.

    Attributes:
        peer: one of PEERS.
        model: folder of the checkpoint.
        steps, warmup: optimizer steps run, and those of them not counted.
        device: "cuda" or "cpu" (for a smoke test).
    """

    peer: str
    model: str
    steps: int = 20
    warmup: int = 4
    device: str = "cuda"


def parse(arguments: Sequence[str]) -> tuple[Job, bool]:
    """The job, and whether to wait for another one, of which only the peer is known now."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wait", action="store_true", help="import for --peer, then read the job from stdin")
    choices = {"peer": PEERS, "quantize": ("nf4", "none"), "recompute": ("all", "none", "auto")}
    for name, kind in get_type_hints(Job).items():
        default = "" if name == "model" and "--wait" in arguments else getattr(Job, name, None)
        parser.add_argument(
            f"--{name}", type=kind, default=default, required=default is None, choices=choices.get(name)
        )
    found = vars(parser.parse_args(arguments))
    waits = found.pop("wait")
    return Job(**found), waits


class Trainer(NamedTuple):
    """A loaded model with what trains it: `step(micro-batches on the host)` gives the step's mean loss, ().

    Where steps are replayed, the next one after `forget_graphs` is not: a replay allocates nothing that torch counts.
    """

    model: Any
    step: Callable[[list[Any]], Any]
    describe: Callable[[], dict[str, Any]]
    forget_graphs: Callable[[], None] | None = None


def import_all(peer: str) -> float:
    """Imports what the peer builds on; the seconds since the process began."""
    # Unsloth asks to come first, and brings the others along.
    own = {"unsloth": ("unsloth",), "liger": ("liger_kernel.transformers",)}
    stepper = ("qwen2tool.training.stepper",) if peer.startswith("ours") else ()
    for name in (*own.get(peer, stepper), "torch", "bitsandbytes", "peft", "transformers.models.qwen2"):
        importlib.import_module(name)
    return time.perf_counter() - STARTED


def load(job: Job) -> tuple[Trainer, float]:
    """The peer, ready for its first step, and the seconds that seeding its adapter took."""
    if job.peer.startswith("ours"):
        trainer = load_ours(job)
        return trainer, seed_adapter(trainer.model, job.rank)
    model = load_unsloth(job) if job.peer == "unsloth" else load_hf(job)
    model.train()
    seconds = seed_adapter(model, job.rank)
    return Trainer(model, autocast_step(model, job), dict), seconds


def load_ours(job: Job) -> Trainer:
    from qwen2tool.training.stepper import StepOptions, Stepper

    options = StepOptions(
        rank=job.rank, alpha=job.alpha, dropout=job.dropout, quantize=job.quantize, recompute=job.recompute,
        memory_budget_gb=job.budget_gb or None, graphs=job.peer == "ours" and job.device == "cuda",
        accumulation=job.accumulation, reference_pass=bool(job.reference_pass), learning_rate=LEARNING_RATE,
        max_grad_norm=MAX_GRAD_NORM, seed=0, device=job.device,
    )  # fmt: skip
    stepper = Stepper.from_checkpoint(Path(job.model), options)
    return Trainer(stepper.model, stepper.step, stepper.describe, stepper.forget_graphs)


def load_unsloth(job: Job) -> Any:
    import unsloth  # noqa: F401, I001  # it asks to come before torch and transformers
    from unsloth import FastLanguageModel
    import torch

    model, _ = FastLanguageModel.from_pretrained(
        job.model, max_seq_length=job.length, dtype=torch.bfloat16, load_in_4bit=job.quantize == "nf4",
        local_files_only=True,
    )  # fmt: skip
    return FastLanguageModel.get_peft_model(
        model, r=job.rank, lora_alpha=job.alpha, lora_dropout=job.dropout, target_modules=list(TARGETS), bias="none",
        use_gradient_checkpointing=False if job.recompute == "none" else "unsloth", random_state=0,
    )  # fmt: skip


def load_hf(job: Job) -> Any:
    """transformers and PEFT, with Liger's kernels or PEFT's preparation where the peer's name says so."""
    if job.peer == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2()
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.float32 if job.peer == "hf_fp32" else torch.bfloat16
    keywords: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    if job.quantize == "nf4":
        keywords["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
    if job.device == "cuda":
        keywords["device_map"] = {"": 0}
    model = AutoModelForCausalLM.from_pretrained(job.model, **keywords)
    model.config.use_cache = False
    checkpointing = job.recompute != "none"
    options = {"use_reentrant": False}
    if job.peer == "hf_kbit":
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=options
        )
    elif checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
    lora = LoraConfig(
        r=job.rank, lora_alpha=job.alpha, lora_dropout=job.dropout, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora)


def seed_adapter(model: Any, rank: int) -> float:
    """A of size 1/sqrt(K) from a seed made of its module's name, B zero; returns the seconds that took.

    Raises:
        RuntimeError: the model has not seven adapters of `rank` a layer.
    """
    import torch

    start = time.perf_counter()
    seeded = 0
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
        elif "lora_A" in name:
            digest = hashlib.sha256(name[name.index("layers.") :].encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            noise = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
            parameter.data.copy_(noise)
            seeded += parameter.shape[0] == rank
    expected = len(TARGETS) * model.config.num_hidden_layers
    if seeded != expected:
        raise RuntimeError(f"{seeded} adapters of rank {rank} were found, not {expected}")
    return time.perf_counter() - start


def autocast_step(model: Any, job: Job) -> Callable[[list[Any]], Any]:
    """A peer's optimizer step, as its trainer does it."""
    import torch

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(batches: list[Any]) -> Any:
        total = torch.zeros((), device=job.device)
        for batch in batches:
            ids = batch.to(job.device, non_blocking=True)
            with torch.autocast(job.device, torch.bfloat16, enabled=job.peer != "hf_fp32"):
                if job.reference_pass:
                    with torch.no_grad(), model.disable_adapter():
                        model(input_ids=ids, labels=ids)
                loss = model(input_ids=ids, labels=ids).loss / len(batches)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trainable, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def token_batches(job: Job, vocabulary: int) -> list[Any]:
    """BATCHES times (batch, length) token ids on the host, pinned for CUDA; special tokens, at the end, left out."""
    import torch

    generator = torch.Generator().manual_seed(1)
    batches = [
        torch.randint(0, vocabulary * 9 // 10, (job.batch, job.length), generator=generator) for _ in range(BATCHES)
    ]
    return [batch.pin_memory() for batch in batches] if job.device == "cuda" else batches


def timed(step: Callable[[], Any], cuda: bool) -> tuple[float, float]:
    """Milliseconds of one step, and its loss."""
    import torch

    if not cuda:
        start = time.perf_counter()
        loss = float(step().detach())
        return 1e3 * (time.perf_counter() - start), loss
    events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    events[0].record()
    loss = step()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]), float(loss.detach())


def read_job() -> Job | None:
    """The job on stdin, or None at its end: whoever would have sent one has no use for it, or is gone."""
    line = sys.stdin.readline()
    return Job(**json.loads(line)) if line.strip() else None


def run(job: Job, imported: float | None = None) -> dict[str, Any]:
    """Loads, trains and measures, after the imports unless these took `imported` seconds; see the module docstring."""
    imported = import_all(job.peer) if imported is None else imported
    origin = time.perf_counter() - imported
    trainer, seeding = load(job)
    import torch

    cuda = job.device == "cuda"
    memory = {"loaded": torch.cuda.memory_allocated(), "load_peak": torch.cuda.max_memory_allocated()} if cuda else {}
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    ready = time.perf_counter() - origin - seeding
    batches = token_batches(job, trainer.model.config.vocab_size)
    times, losses, first = [], [], 0.0
    for number in range(job.steps):
        start = number * job.accumulation
        micro = [batches[(start + index) % BATCHES] for index in range(job.accumulation)]
        milliseconds, loss = timed(lambda micro=micro: trainer.step(micro), cuda)
        times.append(milliseconds)
        losses.append(round(loss, 5))
        first = first or time.perf_counter() - origin - seeding
    plan = trainer.describe()
    if cuda:
        free, total = torch.cuda.mem_get_info()
        memory |= {"device_used": total - free, "peak_reserved": torch.cuda.max_memory_reserved()}
        if trainer.forget_graphs:
            trainer.forget_graphs()
            trainer.step(micro[:1])
        memory["peak_allocated"] = torch.cuda.max_memory_allocated()
    return {
        **figures(times[job.warmup :], job),
        "step_ms": [round(milliseconds, 2) for milliseconds in times],
        "losses": losses,
        "imported_s": round(imported, 1),
        "ready_s": round(ready, 1),
        "first_step_s": round(first, 1),
        "memory_gb": {name: round(count / 1e9, 3) for name, count in memory.items()},
        "trainable": sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
        "versions": versions(),
        "plan": plan,
    }


def figures(times: list[float], job: Job) -> dict[str, float]:
    """Median and fastest step, a micro-batch's share of the median, and tokens a second."""
    median = statistics.median(times)
    return {
        "ms": round(median, 2),
        "min_ms": round(min(times), 2),
        "micro_batch_ms": round(median / job.accumulation, 2),
        "tokens_per_s": round(1e3 * job.batch * job.length * job.accumulation / median),
        "steps_counted": len(times),
    }


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> int:
    job, waits = parse(sys.argv[1:])
    if job.steps <= job.warmup:
        raise SystemExit(f"--steps {job.steps} leaves nothing to count after --warmup {job.warmup}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    imported = None
    try:
        if waits:
            imported = import_all(job.peer)
            print(f"READY {job.peer} after {imported:.1f} s", flush=True)
            sent = read_job()
            if sent is None:
                return 0
            job = sent
        result = run(job, imported)
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        result = {"error": f"{type(error).__name__}: {lines[-1]}"}
    print("RESULT " + json.dumps(result, default=str), flush=True)
    return int("error" in result)


if __name__ == "__main__":
    sys.exit(main())
