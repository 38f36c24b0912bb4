"""What a loss costs: the model before and after on the same text, in fp32, and a card that says so.

Losing something is a choice here, and one with a price on it: how far the distribution moves (mean KL divergence from
before to after, float64), how often the likeliest token stays (same top-1), and perplexity before and after. A
perplexity alone can call a damaged model an improvement.

Layers are built and run one at a time, so that a model of any size needs its largest tensor in fp32 and the hidden
states of a thousand tokens, beside one layer. Cost: two passes over the checkpoint; a minute of one core for 0.5B.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from importlib.resources import files
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import rms_norm

from qwen2tool.checkpoint.view import AnyTensor, View, read, read_blocks
from qwen2tool.console import Advance, progress

TOKENS = 1024
LONGEST = 256
ROWS = 64
BLOCK_ELEMENTS = 1 << 18
"""Numbers that are compared at a time: 1 MB of fp32 a side."""
TINY = 1e-60
RECORDS = 100
TEXT = "the bundled instructions"
NO_TOKENIZER = "random token ids, for want of a tokenizer"


@dataclass(frozen=True, kw_only=True)
class Damage:
    """`what` in words; KL divergence in nats, same top-1 as a share, perplexities; `text` names what was read."""

    what: str
    mean_kld: float
    same_top1: float
    perplexity_before: float
    perplexity_after: float
    text: str
    tokens: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """||after - before|| / ||before|| over the tensors that changed; `exact` counts those whose numbers did not."""

    what: str
    median_relative_error: float
    worst_relative_error: float
    worst: str
    exact: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_rounding(before: View, after: View, how: str) -> Rounding | None:
    """What a packing cost each tensor, None where nothing changed; one pair in memory at a time, in fp32.

    Cost: a second pass over both checkpoints.
    """
    errors: dict[str, float] = {}
    with progress("measuring the rounding", sum(tensor.nbytes for tensor in after.tensors.values())) as advance:
        for name, tensor in after.tensors.items():
            error = _relative_error(before.tensors[name], tensor)
            if error:
                errors[name] = error
            advance(tensor.nbytes)
    if not errors:
        return None
    worst = max(errors, key=errors.__getitem__)
    return Rounding(
        what=f"{len(errors)} tensors {how}",
        median_relative_error=statistics.median(errors.values()),
        worst_relative_error=errors[worst],
        worst=worst,
        exact=len(after.tensors) - len(errors),
    )


def _relative_error(before: AnyTensor, after: AnyTensor) -> float:
    """||after - before|| / ||before||, 0.0 where every number is the same; block by block, summed in fp64."""
    error = norm = 0.0
    blocks = zip(read_blocks(before, BLOCK_ELEMENTS), read_blocks(after, BLOCK_ELEMENTS), strict=True)
    for mine, theirs in ((one.reshape(-1), other.reshape(-1)) for one, other in blocks):
        if mine.dtype == theirs.dtype and torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)):
            own = mine.float()
            norm += float(own @ own)
            continue
        own, other = mine.float(), theirs.float()
        norm += float(own @ own)
        if not torch.equal(own, other):
            difference = other - own
            error += float(difference @ difference)
    return (error / max(norm, TINY)) ** 0.5 if error else 0.0


def measure(before: View, after: View, tokenizer: Path, what: str) -> Damage:
    """Runs both models in fp32 on the CPU; a q/k/v bias that `after` lacks is zero, as transformers would have it."""
    samples, text = _samples(tokenizer, before.geometry.vocab_size)
    with progress("measuring the damage", 2 * before.geometry.num_hidden_layers) as advance:
        mine = _final_states(before, samples, advance)
        theirs = _final_states(after, samples, advance)
    divergence, same, nll_before, nll_after = _compare(mine, _head(before), theirs, _head(after), samples)
    scored = sum(len(ids) - 1 for ids in samples)
    return Damage(
        what=what,
        mean_kld=divergence / scored,
        same_top1=same / scored,
        perplexity_before=_exp(nll_before / scored),
        perplexity_after=_exp(nll_after / scored),
        text=text,
        tokens=scored,
    )


def _exp(value: float) -> float:
    return exp(min(value, 700.0))


def _samples(tokenizer: Path, vocabulary: int) -> tuple[list[list[int]], str]:
    """(sequences of token ids, what they are)."""
    if not any((tokenizer / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        generator = torch.Generator().manual_seed(0)
        shape = (TOKENS // LONGEST, LONGEST)
        return torch.randint(vocabulary, shape, generator=generator).tolist(), NO_TOKENIZER
    from transformers import AutoTokenizer

    from qwen2tool.checkpoint.load import quiet_transformers

    with quiet_transformers():
        encode = AutoTokenizer.from_pretrained(tokenizer)
    lines = (files("qwen2tool") / "assets" / "instructions.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines[:RECORDS]]
    parts = [record[key] for record in records for key in ("instruction", "input", "output") if record[key]]
    ids = [token for token in encode("\n".join(parts))["input_ids"] if token < vocabulary][:TOKENS]
    return [ids[start : start + LONGEST] for start in range(0, len(ids) - 1, LONGEST)], TEXT


@torch.no_grad()
def _final_states(view: View, samples: list[list[int]], advance: Advance) -> list[torch.Tensor]:
    """The normalised last hidden states, (T, H) in fp32 each."""
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

    config = Qwen2Config(**{key: value for key, value in view.config.items() if key not in ("dtype", "torch_dtype")})
    config._attn_implementation = "sdpa"
    table = read(view.tensors["model.embed_tokens.weight"])
    states = [table[torch.tensor(ids)].float()[None] for ids in samples]
    del table
    rope = Qwen2RotaryEmbedding(config)
    for index in range(config.num_hidden_layers):
        with torch.device("meta"):
            layer = Qwen2DecoderLayer(config, index)
        layer.load_state_dict(_layer_state(view, index, layer), assign=True)
        layer.eval()
        window = view.geometry.sliding_window if index in view.geometry.sliding_layers else None
        for n, hidden in enumerate(states):
            positions = torch.arange(hidden.shape[1])[None]
            mask = _mask(hidden.shape[1], window)
            states[n] = layer(hidden, attention_mask=mask, position_embeddings=rope(hidden, positions))
        advance()
    weight = read(view.tensors["model.norm.weight"]).float()
    return [rms_norm(h[0], weight.shape, weight, view.geometry.rms_norm_eps) for h in states]


def _layer_state(view: View, index: int, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The layer's tensors in fp32, zeros for a bias that is not there."""
    state = {}
    for name, parameter in layer.named_parameters():
        tensor = view.tensors.get(f"model.layers.{index}.{name}")
        state[name] = torch.zeros(parameter.shape) if tensor is None else read(tensor).float()
    return state


def _mask(length: int, window: int | None) -> torch.Tensor:
    """(1, 1, T, T), true where a query sees a key."""
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    return seen[None, None]


def _head(view: View) -> torch.Tensor:
    name = "lm_head.weight"
    return read(view.tensors[name if name in view.tensors else "model.embed_tokens.weight"])


def _compare(
    mine: list[torch.Tensor], my_head: torch.Tensor, theirs: list[torch.Tensor], their_head: torch.Tensor,
    samples: list[list[int]],
) -> tuple[float, int, float, float]:  # fmt: skip
    """Sums over all scored tokens: (KL divergence, same top-1, NLL before, NLL after)."""
    my_head, their_head = my_head.float(), their_head.float()
    divergence = nll_before = nll_after = 0.0
    same = 0
    for mine_here, theirs_here, ids in zip(mine, theirs, samples, strict=True):
        targets = torch.tensor(ids[1:])
        for start in range(0, len(targets), ROWS):
            rows = slice(start, min(start + ROWS, len(targets)))
            before = torch.log_softmax((mine_here[rows] @ my_head.T).double(), -1)
            after = torch.log_softmax((theirs_here[rows] @ their_head.T).double(), -1)
            divergence += float((before.exp() * (before - after)).sum())
            same += int((before.argmax(-1) == after.argmax(-1)).sum())
            nll_before -= float(before.gather(1, targets[rows, None]).sum())
            nll_after -= float(after.gather(1, targets[rows, None]).sum())
    return divergence, same, nll_before, nll_after


def model_card(name: str, source: str, damage: Damage) -> str:
    """README.md of an output that lost something."""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [qwen2tool, lossy]
---

# {name}

Made from {source} by `qwen2tool convert --allow-lossy`. **Something was lost on the way: {damage.what}.**
Use {source} itself where you can. Measured in fp32 on {damage.tokens:,} tokens of {damage.text}:

| | before | after |
| --- | --- | --- |
| perplexity | {damage.perplexity_before:,.4g} | {damage.perplexity_after:,.4g} |
| same top-1 token | | {damage.same_top1:.2%} |
| mean KL divergence | | {damage.mean_kld:.3g} nats |

`qwen2tool-convert.json` says for every tensor where it came from.
"""
