"""LoRA gradients of a whole Qwen2 in 16 bit, ours and other people's, against an fp32 truth; layer by layer.

    python scripts/gradient_proof.py MODEL --data alpaca_en_demo.json                    (GPU; under two minutes a 0.5B)
    python scripts/gradient_proof.py MODEL --data FILE --device cpu --tokens 200 --peers        (ours and transformers)

One batch of about --tokens tokens, padded on the right for all but ours, which packs it. LoRA on all linears, random A
and B seeded by the name of their module, so everybody has the same; the loss is the mean cross entropy of the answers'
tokens. The truth is transformers in fp32 with plain attention. Error: ||g - truth|| / ||truth|| over A and B of one
projection, or over all adapters. fp16 runs with the largest loss scale, from 2^16 down, that leaves every gradient
finite, as a loss scaler would find it; without one the gradients count as not finite.

The second part replaces the k biases of all layers by constants of a given norm in RoPE's slowest frequencies, where
published models have theirs: a constant that all keys share cancels in softmax, so the function stays the same, and an
error of q_proj's gradient that grows with the norm is lost precision alone.

Liger and Unsloth patch what they find, so each has a process of its own; one that fails is reported with its message.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import nan
from pathlib import Path
from typing import Any

from common import environment, write_result

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE), str(HERE.parent), *(entry for entry in sys.path if entry != str(HERE))]

RANK, ALPHA = 16, 32
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
LINEARS = (*PROJECTIONS, "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = ("bfloat16", "float16")
NORMS = (0, 20, 100, 400, 1000)
"""Of all k biases of a layer together; published ones reach 393 in a 0.5B and 900 in a 7B."""
SLOWEST = 3
"""Of RoPE's frequencies: where the large biases of published models sit."""
PEERS = ("liger", "unsloth")
OWN = ("ours", "hf sdpa", "hf eager")

Gradients = dict[str, Any]
"""Key of a parameter ("3.self_attn.q_proj.lora_A") -> its gradient, fp32 on the CPU."""


def main() -> None:
    options = parse()
    if options.peer:
        work_as_peer(options)
        return
    part = measure(options)
    write_result(options.result, ["python", "scripts/gradient_proof.py", *sys.argv[1:]], {options.model.name: part})
    for dtype, found in part["errors"].items():
        for who, run in found.items():
            print(dtype, who, run.get("error") or [run[name] for name in ("all", "q_proj_all", "finite")])
    print(json.dumps(part["k_bias"]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a Qwen2 in 16 or 32 bit")
    parser.add_argument("--data", type=Path, required=True, help="instructions, JSON or JSONL")
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--peer-seconds", type=float, default=110, help="from the start; then they are stopped")
    parser.add_argument("--result", type=Path, default=HERE.parent / "benchmarks" / "results" / "gradients.json")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as plain values; the peers start first and work beside."""
    import torch

    start = time.perf_counter()
    samples = choose(options)
    batch = padded(samples, options.device)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(batch, Path(folder) / "batch.pt")
        started = {peer: start_peer(options, peer, Path(folder)) for peer in options.peers}
        model = adapted(options, "float32")
        truth, loss = true_gradients(model, batch)
        layers = model.config.num_hidden_layers
        errors, k_bias = own_errors(options, model, samples, batch, truth)
        for peer, process in started.items():
            left = options.peer_seconds - (time.perf_counter() - start)
            for dtype, found in finish_peer(options, peer, process, Path(folder), max(left, 1.0)).items():
                errors[dtype][peer] = judged(found, truth, layers)
    return {
        "model": options.model.name,
        "data": options.data.name,
        "setting": {"rank": RANK, "alpha": ALPHA, "lengths": [len(sample.ids) for sample in samples]},
        "tokens": sum(len(sample.ids) for sample in samples),
        "answer_tokens": int((batch["labels"][:, 1:] != -100).sum()),
        "loss": loss,
        "errors": errors,
        "k_bias": k_bias,
        "seconds": round(time.perf_counter() - start, 1),
    }


def own_errors(
    options: argparse.Namespace, wide: Any, samples: list[Any], batch: dict[str, Any], truth: Gradients
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """(by dtype and implementation, what can run in this process; the part on k biases)."""
    layers = wide.config.num_hidden_layers
    models = {dtype: adapted(options, dtype) for dtype in options.dtypes}
    errors = {
        dtype: {who: judged(attempt(model, samples, batch, dtype, who), truth, layers) for who in OWN}
        for dtype, model in models.items()
    }
    rows: dict[str, dict[str, list[Any]]] = {dtype: {who: [] for who in OWN[:2]} for dtype in models}
    for norm in NORMS:
        for model in (wide, *models.values()):
            set_k_biases(model, norm)
        true, _ = true_gradients(wide, batch)
        for dtype, model in models.items():
            for who, found in rows[dtype].items():
                record = judged(attempt(model, samples, batch, dtype, who), true, layers)
                layers_of = sorted(record["q_proj"]) if record.get("finite", False) else [nan]
                middle, worst = layers_of[len(layers_of) // 2], layers_of[-1]
                found.append({"q_proj": record.get("q_proj_all", nan), "median": middle, "worst": worst})
    return errors, {"norms": list(NORMS), "errors": rows}


def choose(options: argparse.Namespace) -> list[Any]:
    """The first records of the file, until they have --tokens tokens."""
    from qwen2tool.checkpoint.load import load_tokenizer
    from qwen2tool.data.encode import encode_conversation
    from qwen2tool.data.records import read_conversations

    tokenizer, found = load_tokenizer(options.model), list[Any]()
    for number, conversation in enumerate(read_conversations(options.data)):
        sample = encode_conversation(tokenizer, conversation, number, 1024)
        if found and sum(len(s.ids) for s in (*found, sample)) > options.tokens:
            break
        found.append(sample)
    return found


def padded(samples: list[Any], device: str) -> dict[str, Any]:
    """input_ids, attention_mask, labels, each (B, T), padding on the right; labels -100 where nothing is scored."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor(sample.ids) for sample in samples]
    labels = [torch.tensor(s.ids).where(torch.tensor(s.scored), torch.tensor(-100)) for s in samples]
    ones = [torch.ones_like(row) for row in ids]
    rows = {"input_ids": (ids, 0), "attention_mask": (ones, 0), "labels": (labels, -100)}
    return {name: pad_sequence(row, True, padding_value=fill).to(device) for name, (row, fill) in rows.items()}


def adapted(options: argparse.Namespace, dtype: str) -> Any:
    """transformers' model under PEFT, in training mode."""
    from peft import LoraConfig, get_peft_model

    from qwen2tool.checkpoint.folder import open_checkpoint
    from qwen2tool.checkpoint.load import load_model

    model: Any = load_model(open_checkpoint(options.model), dtype=dtype, device=options.device)  # type: ignore[arg-type]
    model.config.use_cache = False
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LINEARS), task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    fill_adapters(model)
    return model


def fill_adapters(model: Any) -> None:
    """A of size K^-1/2 and B of size 0.01, each from a seed made of its module's name.

    Raises:
        RuntimeError: the model has not seven adapters a layer.
    """
    import torch

    filled = 0
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        digest = hashlib.sha256(key_of(name).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        size = parameter.shape[1] ** -0.5 if "lora_A" in name else 0.01
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)
        filled += 1
    if filled != 2 * len(LINEARS) * model.config.num_hidden_layers:
        raise RuntimeError(f"{filled} matrices of adapters were found, not 14 a layer")


def key_of(name: str) -> str:
    """base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight -> 3.self_attn.q_proj.lora_A"""
    return name[name.index("layers.") + len("layers.") :].removesuffix(".default.weight")


def gradients_of(model: Any) -> Gradients:
    return {
        key_of(n): p.grad.detach().float().cpu()
        for n, p in model.named_parameters()
        if "lora_" in n and p.requires_grad
    }


def true_gradients(model: Any, batch: dict[str, Any]) -> tuple[Gradients, float]:
    """Of an fp32 model with plain attention; and the loss."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        found = scaled(model, "float32", lambda: model(**batch).loss)
    return found["gradients"], found["loss"]


def attempt(model: Any, samples: list[Any], batch: dict[str, Any], dtype: str, who: str) -> dict[str, Any]:
    """Gradients of `model` as it is ("hf sdpa", "hf eager") or on our routes ("ours"), or {"error": why not}."""
    from qwen2tool.routing.attention import safe_attention

    if who == "hf eager":
        model.get_base_model().set_attn_implementation("eager")
    try:
        if who == "ours":
            with routed(model, samples, dtype):
                return scaled(model, dtype, our_loss(model, samples))
        with safe_attention():
            return scaled(model, dtype, lambda: model(**batch).loss)
    except RuntimeError as error:
        return failure(error)
    finally:
        if who == "hf eager":
            model.get_base_model().set_attn_implementation("sdpa")


def failure(error: Exception) -> dict[str, Any]:
    return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:250]}"}


@contextmanager
def routed(model: Any, samples: list[Any], dtype: str) -> Iterator[None]:
    """Inside, the model runs as `qwen2tool train` runs it."""
    import torch

    from qwen2tool.routing.swap import unroute
    from qwen2tool.training.fast import put_on_fast_path

    lengths = [len(sample.ids) for sample in samples]
    plans = put_on_fast_path(
        model, tokens=sum(lengths), length=max(lengths), dtype=getattr(torch, dtype), recompute="none", graphs=False
    )
    fused = plans.routes.counts.get("fused layer", 0)
    if fused != model.config.num_hidden_layers:
        raise RuntimeError(f"{fused} layers are fused, not all: {plans}")
    try:
        yield
    finally:
        unroute(model)


def our_loss(model: Any, samples: list[Any]) -> Callable[[], Any]:
    """A function that makes the mean loss of the packed batch."""
    import torch

    from qwen2tool.training.batches import pack
    from qwen2tool.training.forward import log_probs

    packed: Any = {n: v.to(model.device) if torch.is_tensor(v) else v for n, v in pack(samples).items()}
    return lambda: -log_probs(model, packed, packed["labels"]).mean()


def scaled(model: Any, dtype: str, make_loss: Callable[[], Any]) -> dict[str, Any]:
    """Loss and unscaled gradients; in 16 bit under autocast, as every trainer runs it."""
    import torch

    scale = 2.0**16 if dtype == "float16" else 1.0
    while True:
        model.zero_grad(set_to_none=True)
        with torch.autocast(model.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
            loss = make_loss()
        (loss * scale).backward()
        found = {name: grad / scale for name, grad in gradients_of(model).items()}
        finite = all(bool(grad.isfinite().all()) for grad in found.values())
        if finite or scale <= 1.0:
            return {"loss": loss.item(), "scale": scale, "finite": finite, "gradients": found}
        scale /= 2


def judged(found: dict[str, Any], truth: Gradients, layers: int) -> dict[str, Any]:
    """Loss, scale and errors of one attempt: over all adapters, and over q_proj, k_proj and v_proj of each layer."""
    if "error" in found:
        return found
    gradients = found["gradients"]
    record = {name: found[name] for name in ("loss", "scale", "finite")}
    record["all"] = relative_error(gradients, truth, list(truth))
    for projection in PROJECTIONS:
        keys = [[f"{n}.self_attn.{projection}.lora_{part}" for part in "AB"] for n in range(layers)]
        record[projection] = [relative_error(gradients, truth, pair) for pair in keys]
        record[f"{projection}_all"] = relative_error(gradients, truth, [key for pair in keys for key in pair])
    return record


def relative_error(gradients: Gradients, truth: Gradients, keys: list[str]) -> float:
    """||g - truth|| / ||truth|| over the parameters of `keys`; NaN where a gradient is not finite."""
    distance = sum(float((gradients[key].double() - truth[key].double()).square().sum()) for key in keys)
    return float((distance / sum(float(truth[key].double().square().sum()) for key in keys)) ** 0.5)


def set_k_biases(model: Any, norm: float) -> None:
    """Replaces the k biases of each layer by a constant of `norm` in the slowest frequencies, the same each time."""
    import torch

    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name, parameter in model.named_parameters():
        if not name.endswith("k_proj.base_layer.bias"):
            continue
        generator = torch.Generator().manual_seed(parameter.numel() + int(key_of(name).split(".")[0]))
        bias = torch.zeros(config.num_key_value_heads, 2, size // 2)  # transformers pairs i with i + size / 2
        bias[..., -SLOWEST:] = torch.randn(bias[..., -SLOWEST:].shape, generator=generator)
        parameter.data.copy_((bias * norm / bias.norm()).flatten())


def start_peer(options: argparse.Namespace, peer: str, folder: Path) -> subprocess.Popen[str]:
    """The process of a peer; its gradients appear in `folder`."""
    flags = {"--data": options.data, "--peer": peer, "--batch": folder / "batch.pt", "--device": options.device}
    words = [str(word) for pair in flags.items() for word in pair]
    line = [sys.executable, str(HERE / "gradient_proof.py"), str(options.model), *words, "--dtypes", *options.dtypes]
    variables = {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_COMPILE_LOCATION": str(folder / "unsloth")}
    log = (folder / f"{peer}.log").open("w")  # closed with this process
    return subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment() | variables)


def finish_peer(
    options: argparse.Namespace, peer: str, process: subprocess.Popen[str], folder: Path, seconds: float
) -> dict[str, dict[str, Any]]:
    """What it found in each dtype, or {"error": why not}; it is stopped after `seconds`."""
    import torch

    end = ""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        end = "stopped for time; its last words: "
    lines = (folder / f"{peer}.log").read_text().strip().splitlines() or ["none"]
    files = {dtype: folder / f"{peer}-{dtype}.pt" for dtype in options.dtypes}
    missing = {"error": end + lines[-1][-250:]}
    return {d: torch.load(file, weights_only=True) if file.is_file() else missing for d, file in files.items()}


def work_as_peer(options: argparse.Namespace) -> None:
    """In the peer's process: one file of gradients or one error for each dtype, beside the batch."""
    if options.peer == "unsloth":
        import unsloth  # type: ignore[import-not-found]  # noqa: F401  # it asks to come before torch and transformers
    import torch

    batch = torch.load(options.batch, map_location=options.device, weights_only=True)
    for dtype in options.dtypes:
        try:
            found = peer_gradients(options, batch, dtype)
        except Exception as error:
            found = failure(error)
        file = options.batch.parent / f"{options.peer}-{dtype}.pt"
        torch.save(found, file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)  # whole or not there: the process may be stopped


def peer_gradients(options: argparse.Namespace, batch: dict[str, Any], dtype: str) -> dict[str, Any]:
    import torch

    if options.peer == "unsloth":
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            str(options.model), max_seq_length=batch["input_ids"].shape[1], dtype=getattr(torch, dtype),
            load_in_4bit=False, local_files_only=True,
        )  # fmt: skip
        model = FastLanguageModel.get_peft_model(
            model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, target_modules=list(LINEARS), bias="none",
            use_gradient_checkpointing=False, random_state=0,
        )  # fmt: skip
        model.train()
        fill_adapters(model)
    else:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2  # type: ignore[import-not-found]

        apply_liger_kernel_to_qwen2()
        model = adapted(options, dtype)
    return attempt(model, [], batch, dtype, "hf sdpa")


if __name__ == "__main__":
    main()
