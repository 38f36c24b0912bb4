"""`verify_routes`: the fused layers against transformers' own on a checkpoint of one's own, gradients included.

Layer by layer, on the same input, three runs:
- the truth: transformers' layer with the weights as stored, in fp32 (fp64 where the run is meant to be fp32);
- the reference: transformers' layer with PEFT's LoRA, as it trains: 16-bit weights, fp32 adapters, autocast, and in NF4
  what bitsandbytes' layers should multiply by where they do not (`single.misread`);
- the routed: the very same modules through `RoutedStack`, the memory plan keeping least, so all of it is recomputed.

Both errors are relative to the truth; the routed one may be `NOISE_MULTIPLE` times the reference's and a floor. A
tolerance by hand would be wrong for one dtype or one layer: k biases of norm 400 cost bf16 a tenth of a gradient.

Input of a layer is the truth's output of the one before, three sequences of different lengths without padding. The
reference takes them one by one, so it needs no mask; it attends through sdpa and never eagerly, which rounds scores of
1,500 to 16 bit. Memory: one layer in fp32 and in the running dtype, whatever the model's depth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qwen2tool.checkpoint.adapter import Adapter, open_adapter, require_fit
from qwen2tool.checkpoint.folder import Checkpoint, open_checkpoint
from qwen2tool.checkpoint.load import Dtype
from qwen2tool.console import progress
from qwen2tool.data.samples import Sample
from qwen2tool.routing.attention import safe_attention
from qwen2tool.routing.examine import NotFused, examine_stack
from qwen2tool.routing.memory import MemoryPlan
from qwen2tool.routing.stack import RoutedStack
from qwen2tool.verify.gradients import relative_error
from qwen2tool.verify.route_report import WHOLE, Errors, LayerReport, RouteReport, decide_routes
from qwen2tool.verify.run import environment, first_samples, require_reference
from qwen2tool.verify.single import SEED, dequantise, embed, layer_pairs, load_layer, misread, put_lora, random_pairs

SEQUENCES = 3
Run = Callable[[torch.Tensor], torch.Tensor]
Tensors = dict[str, torch.Tensor]


class Setting(NamedTuple):
    """What holds for all layers: the dtype meant to run, the truth's, the device, NF4 or not, the lengths (S,)."""

    dtype: torch.dtype
    truth: torch.dtype
    device: str
    nf4: bool
    lengths: list[int]


def verify_routes(
    model: Path | str,
    samples: Sequence[Sample],
    *,
    adapter: Path | None = None,
    nf4: bool = False,
    device: str = "cpu",
    dtype: Dtype | None = None,
    max_tokens: int = 4096,
) -> RouteReport:
    """Compares what `train` runs for each layer of `model` with transformers' own layer.

    Args:
        samples: text to compare on, as in `verify`; the first three sequences are taken, cut to different lengths.
        adapter: LoRA to put on; None takes random ones, so that there are gradients to compare.
        nf4: as `train --quantize nf4` loads it.
        device: "cpu" or "cuda".
        dtype: meant to run in; None: what `train` picks for the device.

    Raises:
        UserError: not a whole Qwen2 in 16 or 32 bit, an adapter that is no plain LoRA for it, a token id beyond the
            vocabulary.
    """
    start = time.perf_counter()
    checkpoint = open_checkpoint(model)
    require_reference(checkpoint)
    opened = _open_adapter(adapter, checkpoint)
    sequences = ragged([list(sample.ids) for sample in first_samples(samples, max_tokens, checkpoint)])
    running = dtype or _training_dtype(device)
    wide = torch.float64 if running == "float32" else torch.float32
    setting = Setting(getattr(torch, running), wide, device, nf4, [len(sequence) for sequence in sequences])
    ids = [token for sequence in sequences for token in sequence]
    layers, wrong = _compare_layers(checkpoint, opened, ids, setting)
    verdict, reason = decide_routes(layers, running, sum(setting.lengths))
    return RouteReport(
        model=str(model),
        adapter=str(adapter) if adapter else None,
        quantize="nf4" if nf4 else "none",
        dtype=running,
        truth=str(wide).removeprefix("torch."),
        lengths=tuple(setting.lengths),
        verdict=verdict,
        reason=reason,
        layers=layers,
        notes=tuple(_notes(opened, wrong)),
        environment=environment(device),
        seconds=time.perf_counter() - start,
    )


def _open_adapter(path: Path | None, base: Checkpoint) -> Adapter | None:
    if path is None:
        return None
    adapter = open_adapter(path)
    require_fit(adapter, base)
    return adapter


def _training_dtype(device: str) -> Dtype:
    """What `train` takes for "auto"."""
    if not device.startswith("cuda"):
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def ragged(sequences: list[list[int]]) -> list[list[int]]:
    """`SEQUENCES` sequences, no two of one length: the longest is halved while there are too few, some are cut."""
    found = [list(sequence) for sequence in sequences[:SEQUENCES] if sequence]
    while found and len(found) < SEQUENCES:
        longest = max(found, key=len)
        half = len(longest) // 2
        if half == 0:
            break
        found.remove(longest)
        found += [longest[:half], longest[half:]]
    lengths: set[int] = set()
    for sequence in found:
        while len(sequence) > 1 and len(sequence) in lengths:
            sequence.pop()
        lengths.add(len(sequence))
    return found


def _compare_layers(
    checkpoint: Checkpoint, adapter: Adapter | None, ids: list[int], setting: Setting
) -> tuple[tuple[LayerReport, ...], list[str]]:
    """(one layer after the other, linears that bitsandbytes misreads); the truth's output is the next one's input."""
    if not ids:
        return (), []
    found = []
    wrong: dict[str, None] = {}
    count = checkpoint.geometry.num_hidden_layers
    x = embed(checkpoint, ids).to(setting.device, setting.truth)
    with progress("comparing layers", count) as advance:
        for index in range(count):
            report, x, misreads = _compare_layer(checkpoint, adapter, index, x, setting)
            found.append(report)
            wrong |= dict.fromkeys(misreads)
            advance()
    return tuple(found), list(wrong)


def _compare_layer(
    checkpoint: Checkpoint, adapter: Adapter | None, index: int, x: torch.Tensor, setting: Setting
) -> tuple[LayerReport, torch.Tensor, list[str]]:
    """The figures of one layer, its output (N, H) in the truth, and the linears that bitsandbytes misreads."""
    pairs = random_pairs(checkpoint, index) if adapter is None else layer_pairs(adapter, index)
    running = load_layer(checkpoint, index, dtype=setting.dtype, device=setting.device, nf4=setting.nf4)
    truth = load_layer(checkpoint, index, dtype=setting.truth, device=setting.device)
    peer = running
    wrong = misread(running.layers[0]) if setting.nf4 else []
    if setting.nf4:
        dequantise(truth.layers[0], running.layers[0])
    if wrong:
        peer = load_layer(checkpoint, index, dtype=setting.dtype, device=setting.device)
        dequantise(peer.layers[0], running.layers[0])
    exact = put_lora(truth.layers[0], index, pairs, adapter, dtype=setting.truth)
    trained = put_lora(running.layers[0], index, pairs, adapter, dtype=torch.float32, nf4=setting.nf4)
    theirs = put_lora(peer.layers[0], index, pairs, adapter, dtype=torch.float32) if wrong else trained
    start = x.to(setting.dtype)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(SEED + index)).to(start)
    outputs: list[torch.Tensor] = []
    truth.norm.register_forward_pre_hook(lambda module, inputs: outputs.append(inputs[0].detach()[0]))
    wanted = _pass(_stock(truth, setting), start.to(setting.truth), exact, dy)
    stock = _pass(_stock(peer, setting), start, theirs, dy)
    routed = _pass(_routed(running, setting), start, trained, dy)
    report = LayerReport(
        index=index,
        not_fused=_why_not(running),
        finite=all(bool(tensor.isfinite().all()) for tensor in wanted.values()),
        errors={n: Errors(relative_error(stock[n], t), relative_error(routed[n], t)) for n, t in wanted.items()},
    )
    return report, torch.cat(outputs), wrong


def _why_not(model: Any) -> str | None:
    """Why the layer takes the reference path, None where it is fused: what the plan says."""
    try:
        found = examine_stack(model)[0]
    except NotFused as why:
        return str(why)
    return str(found) if isinstance(found, NotFused) else None


def _stock(model: Any, setting: Setting) -> Run:
    """transformers' own pass over each sequence by itself, (N, H) -> (N, H)."""

    def run(x: torch.Tensor) -> torch.Tensor:
        parts = [model(inputs_embeds=part[None], use_cache=False)[0][0] for part in torch.split(x, setting.lengths)]
        return torch.cat(parts)

    return run


def _routed(model: Any, setting: Setting) -> Run:
    """The fast path over all sequences at once, packed; fp16 holds the stream in fp32, as in training."""
    residual = torch.float32 if setting.dtype == torch.float16 else None
    stack = RoutedStack(model, memory=MemoryPlan(("input",)), residual_dtype=residual).eval()
    positions = torch.cat([torch.arange(length, device=setting.device) for length in setting.lengths])[None]

    def run(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = stack(inputs_embeds=x[None], position_ids=positions, use_cache=False)[0][0]
        return y

    return run


def _pass(run: Run, x: torch.Tensor, parameters: Mapping[str, torch.Tensor], dy: torch.Tensor) -> Tensors:
    """Output and gradients of `run` by name; a gradient that does not arrive is zero. 16-bit passes are autocast."""
    x = x.detach().requires_grad_()
    half = x.dtype in (torch.bfloat16, torch.float16)
    with safe_attention():
        with torch.autocast(x.device.type, x.dtype if half else torch.bfloat16, enabled=half):
            y = run(x)
        leaves = [x, *parameters.values()]
        found = torch.autograd.grad(y, leaves, dy.to(y.dtype), allow_unused=True)
    gradients = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
    return dict(zip((*WHOLE, *parameters), [y.detach(), *gradients], strict=True))


def _notes(adapter: Adapter | None, wrong: Sequence[str]) -> Iterator[str]:
    if wrong:
        yield (
            f"bitsandbytes unpacks {', '.join(wrong)} wrongly on this device (rows that are no multiple of its block): "
            "transformers' own layer was run with the right numbers"
        )
    if adapter is None:
        yield "LoRA is random, on all seven linears: name --adapter to compare with your own"
    elif outside := [module for module in adapter.pairs if not module.startswith("model.layers.")]:
        yield f"{', '.join(outside)}: outside the layers, not compared"
