"""What both sides answer: greedy continuations of the same prompts, token by token, by transformers' own `generate`.

Greedy decoding turns a difference of any size into another text as soon as two tokens are nearly as likely as each
other, and a right 16-bit copy diverges too. So the reference continues each prompt a second time, in the dtype it is
meant to run in: how far that run goes with the fp32 one is what a candidate can be asked for. One model is in memory at
a time, whole, unlike in the levels before: a 7B takes 30 GB in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch

from qwen2tool.checkpoint.geometry import expected_tensors, read_json
from qwen2tool.checkpoint.load import Dtype, quiet_transformers
from qwen2tool.checkpoint.view import View, read
from qwen2tool.console import progress
from qwen2tool.data.samples import Sample
from qwen2tool.errors import UserError
from qwen2tool.routing.attention import safe_attention
from qwen2tool.verify.inventory import used_tensors
from qwen2tool.verify.sides import Side, zeros_where_missing

SHOWN = 5
"""Pairs of continuations that are kept for the reader."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far greedy continuations go together.

    Attributes:
        same: share of the prompts whose continuations are the same to the end.
        agreeing: tokens before the first that differs, over all tokens of the reference's continuations.
        first: tokens before the first that differs, in the prompt where it comes soonest; None where none differs.
    """

    same: float
    agreeing: float
    first: int | None


@dataclass(frozen=True, kw_only=True)
class Generations:
    """`candidate` beside `floor`: the reference in the dtype it is meant for; both against the reference in fp32.

    `texts` are the continuations that diverge first, as token ids, or as text where a tokenizer was given.
    """

    prompts: int
    new_tokens: int
    floor_of: str
    candidate: Agreement
    floor: Agreement
    texts: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def compare_generations(
    reference: Side,
    candidate: Side,
    samples: Sequence[Sample],
    new_tokens: int,
    *,
    device: str = "cpu",
    dtype: Dtype = "bfloat16",
    tokenizer: Any = None,
) -> Generations:
    """Continues the prompt of each sample on both sides.

    Args:
        samples: the prompt is what comes before the first scored token (at least one token).
        new_tokens: most tokens of a continuation; it ends at an end-of-text token of the reference.
        dtype: of the floor. With "float32" the floor is the truth itself, and says that nothing may differ.
        tokenizer: to show texts.

    Raises:
        UserError: no prompt at all, or a candidate without all its tensors (missing biases are zeros).
    """
    prompts = [prompt_of(sample) for sample in samples]
    if not prompts:
        raise UserError("--generate: there is no prompt", "Give a text or records with --text or --data")
    ends = end_tokens(reference.view)
    runs: list[list[list[int]]] = []
    for side, precision, label in (
        (reference, "float32", "reference, float32"),
        (reference, dtype, f"reference, {dtype}"),
        (candidate, "float32", "candidate, float32"),
    ):
        if runs and side is reference and precision == "float32":
            runs.append(runs[0])
            continue
        with model_of(side, getattr(torch, precision), device) as model:
            runs.append(continue_all(model, prompts, new_tokens, ends, label))
    truth, noisy, found = runs
    return Generations(
        prompts=len(prompts),
        new_tokens=new_tokens,
        floor_of=f"{dtype} against float32",
        candidate=agreement(truth, found),
        floor=agreement(truth, noisy),
        texts=_first_texts(prompts, truth, found, tokenizer),
    )


def prompt_of(sample: Sample) -> tuple[int, ...]:
    """The tokens before the first one that is scored, the first token at least."""
    first = next((n for n, scored in enumerate(sample.scored) if scored and n), len(sample.ids))
    return sample.ids[: max(1, first)]


def end_tokens(view: View) -> list[int]:
    """The token ids that end a text, by generation_config.json where there is one, else config.json."""
    file = view.origin.folder / "generation_config.json"
    value = read_json(file).get("eos_token_id") if file.is_file() else None
    value = view.config.get("eos_token_id") if value is None else value
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)]


@contextmanager
def model_of(side: Side, dtype: torch.dtype, device: str) -> Iterator[Any]:
    """A whole `Qwen2ForCausalLM` of one side, adapters added in fp32; its memory is let go behind the block.

    Raises:
        UserError: a tensor is missing that is no bias, or has another shape than config.json asks for.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    shapes = expected_tensors(side.view.geometry)
    tensors = used_tensors(side.view) | zeros_where_missing(side.view, shapes)
    with quiet_transformers():
        config = Qwen2Config.from_dict(dict(side.view.config))
        config._attn_implementation = "sdpa"
        config.tie_word_embeddings = False  # `used_tensors` has named the head already
        with torch.device("meta"):
            model: Any = Qwen2ForCausalLM(config)
        for name, parameter in model.named_parameters():
            tensor = tensors.get(name)
            if tensor is None or tensor.shape != tuple(parameter.shape):
                what = "is missing" if tensor is None else f"is {list(tensor.shape)}, not {list(parameter.shape)}"
                raise UserError(f"{side.view.path}: {name} {what}", "Continuations need a whole model")
            values = read(tensor).to(device)
            update = side.update(name)
            values = values if update is None else values.float() + update.to(device)
            _set(model, name, values.to(dtype))
        with torch.device(device):
            model.model.rotary_emb = Qwen2RotaryEmbedding(config)
    model.eval()
    yield model
    for parameter in model.parameters():
        parameter.data = torch.empty(0)


def _set(model: Any, name: str, values: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(values, requires_grad=False))


def continue_all(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, ends: list[int], label: str
) -> list[list[int]]:
    """The greedy continuation of each prompt, one at a time: a batch would pad, and padding is another computation."""
    device = next(model.parameters()).device
    found = []
    with torch.no_grad(), safe_attention(), quiet_transformers(), progress(label, len(prompts)) as advance:
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=device)
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                eos_token_id=ends or None,
                pad_token_id=ends[0] if ends else 0,
            )
            found.append(output[0, len(prompt) :].tolist())
            advance(1)
    return found


def agreement(truth: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> Agreement:
    """How far `found` goes with `truth`, continuation by continuation."""
    common = [common_length(*pair) for pair in zip(truth, found, strict=True)]
    differ = [n for n, one, other in zip(common, truth, found, strict=True) if list(one) != list(other)]
    total = sum(map(len, truth))
    return Agreement(
        same=fmean(list(one) == list(other) for one, other in zip(truth, found, strict=True)),
        agreeing=sum(common) / total if total else 1.0,
        first=min(differ, default=None),
    )


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first that differs, or before the shorter ends."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _first_texts(
    prompts: Sequence[Sequence[int]], truth: Sequence[Sequence[int]], found: Sequence[Sequence[int]], tokenizer: Any
) -> list[dict[str, Any]]:
    """Those that diverge, the soonest first."""

    def shown(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids)) if tokenizer is not None else " ".join(map(str, ids))

    order = sorted(range(len(prompts)), key=lambda n: common_length(truth[n], found[n]))
    chosen = [n for n in order if list(truth[n]) != list(found[n])][:SHOWN]
    return [
        {
            "prompt": n,
            "agrees for": common_length(truth[n], found[n]),
            "reference": shown(truth[n]),
            "candidate": shown(found[n]),
        }
        for n in chosen
    ]
