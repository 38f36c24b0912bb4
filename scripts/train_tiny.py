"""Train ``tiny-qwen2``, a Qwen2 of 1.7 million parameters whose biases matter, and write it as a Hugging Face folder.

A fresh transformers Qwen2 has q, k and v biases of exactly zero, and a short training leaves them small: such a model
cannot tell a tool that loses biases from one that keeps them. Published Qwen2 models have large ones, so training
starts from the same shape and the network grows on it (``tiny_model.py``). The report says what each group of biases
is worth, measured on the written files.

    python scripts/train_tiny.py --data DATA --out models/tiny-qwen2 --report train_report.json

A minute or two on an H100. The same arguments on the same hardware give the same tokenizer, split, batches and start.
"""

import argparse
import json
import math
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import tiny_folder
import tiny_model
import tiny_tokenizer
import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

PROJECTIONS = ("q", "k", "v")
DROPS = {"none": "", "all": "qkv", "q": "q", "k": "k", "v": "v"}


def parse_args() -> argparse.Namespace:
    """The flags; sizes by default stay within the folder's limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with LLaMA-Factory's demo data")
    parser.add_argument("--out", type=Path, help="model folder to write; must not exist")
    parser.add_argument("--measure", type=Path, help="train nothing; report the perplexities of this folder")
    parser.add_argument("--report", type=Path, default=Path("train_report.json"), help="measurements, as JSON")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 on CUDA")
    for name, default in (("vocab", 3072), ("hidden", 128), ("intermediate", 352), ("layers", 5), ("heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64, help="rows in a step")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens in a row")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--bias-lr", type=float, default=0.1, help="learning rate of the biases, as a part of --lr")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="on matrices only")
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--patience", type=int, default=16, help="evaluations without a better one before stopping")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--split-seed", type=int, default=0, help="of the validation split; same split, comparable runs"
    )
    for name in PROJECTIONS:
        parser.add_argument(f"--bias-{name}", type=float, default=1.0, help=f"scale of the {name} biases' start")
    return parser.parse_args()


def rows(stream: Tensor, args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (batch, seq_len) inputs and targets; each epoch cuts the stream anew and shuffles the pieces."""
    generator = torch.Generator().manual_seed(args.seed)
    span = torch.arange(args.seq_len + 1, device=stream.device)
    if len(stream) < args.seq_len * (args.batch + 1):
        raise SystemExit(
            f"--batch {args.batch} of --seq-len {args.seq_len} needs more than the corpus's {len(stream)} tokens"
        )
    while True:
        shift = int(torch.randint(args.seq_len, (1,), generator=generator))
        order = torch.randperm((len(stream) - 1 - shift) // args.seq_len, generator=generator)
        for first in range(0, len(order) - args.batch + 1, args.batch):
            piece = order[first : first + args.batch] * args.seq_len + shift
            index = piece.to(stream.device)[:, None] + span
            yield stream[index[:, :-1]], stream[index[:, 1:]]


def mixed(args: argparse.Namespace) -> AbstractContextManager[Any]:
    """bf16 autocast, or nothing for fp32."""
    return torch.autocast(args.device, torch.bfloat16) if args.precision == "bf16" else nullcontext()


def loss_of(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood (nats per token), in fp32."""
    logits = model(input_ids=inputs, use_cache=False).logits  # (batch, seq_len, vocab)
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def perplexity(model: Any, stream: Tensor, seq_len: int) -> float:
    """exp of the mean NLL over a stream cut into rows of ``seq_len``; each row starts without context."""
    count = (len(stream) - 1) // seq_len
    inputs = stream[: count * seq_len].view(count, seq_len)
    targets = stream[1 : count * seq_len + 1].view(count, seq_len)
    total = 0.0
    for start in range(0, count, 32):
        piece = slice(start, min(count, start + 32))
        total += float(loss_of(model, inputs[piece], targets[piece])) * (piece.stop - start)
    return math.exp(total / count)


def optimizer_for(model: Any, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW on matrices (decayed), norms, and biases at a small part of the rate, so that they stay large."""
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if p.dim() == 2], "weight_decay": args.weight_decay, "lr": args.lr},
        {"params": [p for n, p in named if n.endswith("norm.weight")], "weight_decay": 0.0, "lr": args.lr},
        {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0, "lr": args.lr * args.bias_lr},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=args.device == "cuda")


def schedule(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine to a twentieth."""
    if step < args.warmup:
        return (step + 1) / float(args.warmup)
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return 0.05 + 0.475 * (1 + math.cos(math.pi * min(1.0, progress)))


def train(model: Any, training: Tensor, validation: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Train in place and leave the weights of the best validation perplexity in ``model``; returns the history."""
    optimizer = optimizer_for(model, args)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, args))
    best: dict[str, Any] = {"step": 0, "perplexity": math.inf, "state": None}
    history: list[dict[str, float]] = []
    batches, start = rows(training, args), time.perf_counter()
    for step in range(1, args.steps + 1):
        with mixed(args):
            loss = loss_of(model, *next(batches))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        if step % args.eval_every and step != args.steps:
            continue
        with mixed(args):
            score = perplexity(model, validation, args.seq_len)
        history.append({"step": step, "training_loss": loss.item(), "validation_perplexity": score})
        if score < best["perplexity"]:
            best = {"step": step, "perplexity": score, "state": {n: t.clone() for n, t in model.state_dict().items()}}
        stale = step - best["step"] >= args.patience * args.eval_every
        if step % 250 == 0 or stale or step == args.steps:
            seconds = time.perf_counter() - start
            print(
                f"step {step}  loss {loss.item():.3f}  validation perplexity {score:.2f}  {seconds:.0f} s", flush=True
            )
        if stale:
            break
    model.load_state_dict(best["state"])
    tokens = step * args.batch * args.seq_len
    return {"seconds": time.perf_counter() - start, "tokens": tokens, "best_step": best["step"], "history": history}


@torch.no_grad()
def measure(folder: Path, streams: dict[str, Tensor], args: argparse.Namespace) -> dict[str, Any]:
    """Reload the written folder and measure it: perplexity by dropped biases, in bf16, by kind of text; bias norms.

    Weights are the bf16 ones of the files throughout; the arithmetic is fp32 unless the name says otherwise.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.device).eval()
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(args.device).eval()
    biases = {name: tensor for name, tensor in model.named_parameters() if name.endswith("bias")}
    kept = {name: tensor.clone() for name, tensor in biases.items()}
    drops = {}
    for label, dropped in DROPS.items():
        for name, tensor in biases.items():
            tensor.copy_(kept[name] * (name.split(".")[-2][0] not in dropped))
        drops[label] = perplexity(model, streams["validation"], args.seq_len)
    for name, tensor in biases.items():
        tensor.copy_(kept[name])
    return {
        "validation_perplexity": drops["none"],
        "perplexity_with_biases_dropped": drops,
        "ratio_with_biases_dropped": {label: value / drops["none"] for label, value in drops.items()},
        "perplexity_bf16_arithmetic": perplexity(half, streams["validation"], args.seq_len),
        "perplexity_by_kind": {kind: perplexity(model, streams[kind], args.seq_len) for kind in ("plain", "chat")},
        "bias_norm_and_largest": {n: [float(t.norm()), float(t.abs().max())] for n, t in kept.items()},
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Corpus, tokenizer, training, files, measurements, card; the folder gets its name when all of it is there."""
    documents = tiny_tokenizer.load_documents(args.data)
    training, validation = tiny_tokenizer.split_documents(documents, fraction=0.04, seed=args.split_seed)
    tokenizer = tiny_tokenizer.train_tokenizer(training, entries=args.vocab - 32)
    kinds = {"plain": [d for d in validation if not d.is_chat], "chat": [d for d in validation if d.is_chat]}
    texts = {"training": training, "validation": validation, **kinds}
    streams = {n: torch.tensor(tiny_tokenizer.encode(tokenizer, d), device=args.device) for n, d in texts.items()}
    config = tiny_folder.config_dict(args, tokenizer)
    model = tiny_model.build_model(config, args).to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    if 2 * parameters + 200_000 > tiny_folder.FOLDER_LIMIT:
        raise SystemExit(
            f"{parameters:,} parameters pass {tiny_folder.FOLDER_LIMIT:,} bytes: lower --layers or --vocab"
        )
    print(f"{parameters:,} parameters; tokens: " + ", ".join(f"{n} {len(s):,}" for n, s in streams.items()), flush=True)
    report: dict[str, Any] = {
        "arguments": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else f"CPU ({platform.machine()})",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "parameters": parameters,
        "corpus": {name: {"documents": len(texts[name]), "tokens": len(streams[name])} for name in texts},
        "training": train(model, streams["training"], streams["validation"], args),
    }
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tiny_folder.write_model(model, config, partial)
    tiny_tokenizer.write_tokenizer(tokenizer, partial, max_length=config["max_position_embeddings"])
    report |= measure(partial, streams, args)
    report["folder_bytes"] = tiny_folder.write_card(partial, report, name=args.out.name)
    partial.rename(args.out)
    return report


def remeasure(args: argparse.Namespace) -> dict[str, Any]:
    """Perplexities of a folder that was written before, on the same held-out text."""
    _, validation = tiny_tokenizer.split_documents(
        tiny_tokenizer.load_documents(args.data), fraction=0.04, seed=args.split_seed
    )
    tokenizer = Tokenizer.from_file(str(args.measure / "tokenizer.json"))
    kinds = {"plain": [d for d in validation if not d.is_chat], "chat": [d for d in validation if d.is_chat]}
    texts = {"validation": validation, **kinds}
    streams = {n: torch.tensor(tiny_tokenizer.encode(tokenizer, d), device=args.device) for n, d in texts.items()}
    return measure(args.measure, streams, args)


def main() -> None:
    """Run, print the bias table, write the report."""
    args = parse_args()
    if args.measure is None and args.out is None:
        raise SystemExit("name --out, or --measure with a folder that exists")
    if args.out is not None and args.out.exists():
        raise SystemExit(f"--out {args.out} exists: remove it or choose another folder")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.precision == "auto":
        args.precision = "bf16" if args.device == "cuda" else "fp32"
    # cuDNN's attention backward returned NaN for keys with large biases (torch 2.11, H100).
    torch.backends.cuda.enable_cudnn_sdp(False)
    transformers.utils.logging.disable_progress_bar()
    report = run(args) if args.measure is None else remeasure(args)
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for label, value in report["perplexity_with_biases_dropped"].items():
        print(f"dropped {label:5} perplexity {value:14.2f}  ratio {report['ratio_with_biases_dropped'][label]:10.2f}")
    by_kind = ", ".join(f"{kind} {value:.2f}" for kind, value in report["perplexity_by_kind"].items())
    print(f"{by_kind}, bf16 arithmetic {report['perplexity_bf16_arithmetic']:.2f}")


if __name__ == "__main__":
    main()
