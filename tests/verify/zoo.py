"""The zoo: ways to damage a checkpoint, each with the code that its diagnosis must have.

A fault edits the tensors of a copy (written by safetensors, not by us) and keys of its config.json. `base` names the
reference that it starts from: the model itself, one with a tied head, in fp32, with YaRN, with as many k heads as q
heads, or with an adapter. `docs/zoo.md` is made of a run over all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

State = dict[str, torch.Tensor]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@dataclass(frozen=True)
class Zoo:
    """What a fault has to know of the model it damages."""

    layers: int
    heads: int
    kv_heads: int
    updates: State = field(default_factory=dict)
    """Weight name -> fp32 update of the adapter."""

    @property
    def middle(self) -> int:
        return self.layers // 2


Config = dict[str, Any]


def theta(value: float) -> Callable[[Config], Config]:
    """rope_theta in both spellings."""
    return lambda config: {
        "rope_theta": value,
        "rope_parameters": {**(config.get("rope_parameters") or {"rope_type": "default"}), "rope_theta": value},
    }


def scaling(section: Config | None) -> Callable[[Config], Config]:
    """RoPE scaling in both spellings, or none."""
    return lambda config: {
        "rope_scaling": section and {**section, "type": section["rope_type"]},
        "rope_parameters": {"rope_theta": config["rope_theta"], **(section or {"rope_type": "default"})},
    }


def vocabulary(more: int) -> Callable[[Config], Config]:
    return lambda config: {"vocab_size": config["vocab_size"] + more}


def keys(**changes: Any) -> Callable[[Config], Config]:
    return lambda config: changes


@dataclass(frozen=True)
class Fault:
    """`change` edits a state in place; `codes` must be among those of the diagnosis, the first of them named first."""

    name: str
    codes: tuple[str, ...]
    change: Callable[[State, Zoo], Any] = lambda state, zoo: None
    config: Callable[[Config], Config] = lambda config: {}
    base: str = "plain"
    real: bool = False
    """Whether the long run on a published model has it."""


def name(layer: int, projection: str, part: str) -> str:
    room = "mlp" if projection in ("gate", "up", "down") else "self_attn"
    return f"model.layers.{layer}.{room}.{projection}_proj.{part}"


def on_biases(projections: str, change: Callable[[torch.Tensor, Zoo], torch.Tensor], layers: str = "all") -> Any:
    """A change of biases: of all layers, the middle one, or the first."""

    def edit(state: State, zoo: Zoo) -> None:
        chosen = {"all": range(zoo.layers), "middle": [zoo.middle], "first": [0]}[layers]
        for layer in chosen:
            for projection in projections:
                key = name(layer, projection, "bias")
                state[key] = change(state[key], zoo).contiguous()

    return edit


def dropped(projections: str) -> Any:
    def edit(state: State, zoo: Zoo) -> None:
        for layer in range(zoo.layers):
            for projection in projections:
                del state[name(layer, projection, "bias")]

    return edit


def zero(bias: torch.Tensor, zoo: Zoo) -> torch.Tensor:
    return torch.zeros_like(bias)


def times(factor: float) -> Callable[[torch.Tensor, Zoo], torch.Tensor]:
    return lambda tensor, zoo: (tensor.double() * factor).to(tensor.dtype)


def heads_rotated(bias: torch.Tensor, zoo: Zoo) -> torch.Tensor:
    heads = zoo.heads if len(bias) % zoo.heads == 0 and zoo.heads > 1 else zoo.kv_heads
    return bias.view(heads, -1).roll(1, 0).reshape(-1)


def kv_heads_swapped(bias: torch.Tensor, zoo: Zoo) -> torch.Tensor:
    return bias.view(zoo.kv_heads, -1).flip(0).reshape(-1)


def interleaved(bias: torch.Tensor, zoo: Zoo) -> torch.Tensor:
    return bias.view(zoo.kv_heads, 2, -1).transpose(1, 2).reshape(-1)


def fresh(bias: torch.Tensor, zoo: Zoo) -> torch.Tensor:
    """As torch starts the bias of a linear layer that reads `hidden_size` = heads x head size numbers."""
    generator = torch.Generator().manual_seed(5)
    bound = (zoo.heads * (len(bias) // zoo.kv_heads)) ** -0.5
    return ((torch.rand(bias.shape, generator=generator) * 2 - 1) * bound).to(bias.dtype)


def one_entry(key: Callable[[Zoo], str], by: float = 1.0) -> Any:
    def edit(state: State, zoo: Zoo) -> None:
        tensor = state[key(zoo)].clone()
        tensor.view(-1)[len(tensor.view(-1)) // 3] += by
        state[key(zoo)] = tensor

    return edit


def exchange(pairs: Callable[[State, Zoo], list[tuple[str, str]]]) -> Any:
    def edit(state: State, zoo: Zoo) -> None:
        for one, other in pairs(state, zoo):
            state[one], state[other] = state[other], state[one]

    return edit


def of_layer(state: State, layer: int) -> list[str]:
    return [key for key in state if key.startswith(f"model.layers.{layer}.")]


def layers_swapped(state: State, zoo: Zoo) -> list[tuple[str, str]]:
    return [(key, key.replace("layers.0.", "layers.1.")) for key in of_layer(state, 0)]


def layer_doubled(state: State, zoo: Zoo) -> None:
    for key in of_layer(state, 0):
        state[key.replace("layers.0.", f"layers.{zoo.layers - 1}.")] = state[key].clone()


def projections(one: str, other: str, parts: tuple[str, ...], layer: Callable[[Zoo], int] = lambda zoo: 0) -> Any:
    return exchange(lambda s, zoo: [(name(layer(zoo), one, p), name(layer(zoo), other, p)) for p in parts])


def with_adapter(times_in: Callable[[str, Zoo], float]) -> Any:
    """base + factor x update in every adapted weight, in fp32 and rounded once."""

    def edit(state: State, zoo: Zoo) -> None:
        for key, update in zoo.updates.items():
            state[key] = (state[key].float() + times_in(key, zoo) * update).to(state[key].dtype)

    return edit


def on_matrices(change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def edit(state: State, zoo: Zoo) -> None:
        for key in [key for key in state if key.endswith("_proj.weight")]:
            state[key] = change(state[key]).contiguous()

    return edit


def everywhere(change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def edit(state: State, zoo: Zoo) -> None:
        state.update({key: change(tensor).contiguous() for key, tensor in state.items()})

    return edit


def nf4(block: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The nearest of bitsandbytes' levels in flat blocks, times the block's largest magnitude, in the weight's dtype.

    Not by its `dequantize_4bit`: on a CPU that is wrong where rows are no multiple of the block (relative error 0.25
    instead of 0.09 for 128 x 352 in blocks of 64), which the tiny models have.
    """

    def change(weight: torch.Tensor) -> torch.Tensor:
        from bitsandbytes.functional import get_4bit_type

        levels = get_4bit_type("nf4", device="cpu")
        flat = weight.float().reshape(-1)
        for part in (
            flat[: len(flat) - len(flat) % block].view(-1, block),
            flat[len(flat) - len(flat) % block :][None],
        ):
            if part.numel():
                largest = part.abs().amax(1, keepdim=True)
                part.copy_(levels[(part / largest)[..., None].sub(levels).abs().argmin(-1)] * largest)
        return flat.view(weight.shape).to(weight.dtype)

    return change


def int8_rows(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return ((weight.float() / scale).round() * scale).to(weight.dtype)


def int4_blocks(weight: torch.Tensor) -> torch.Tensor:
    """GGUF's Q4_0: blocks of 32, the entry of the largest magnitude is -8 times the scale."""
    flat = weight.float().reshape(-1)
    blocks = flat[: len(flat) - len(flat) % 32].view(-1, 32)
    scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
    blocks.copy_((blocks / torch.where(scale == 0, 1, scale)).round().clamp(-8, 7) * scale)
    return flat.view(weight.shape).to(weight.dtype)


def at(key: Callable[[Zoo], str], change: Callable[[torch.Tensor, Zoo], torch.Tensor]) -> Any:
    """A change of one tensor."""

    def edit(state: State, zoo: Zoo) -> None:
        state[key(zoo)] = change(state[key(zoo)].clone(), zoo).contiguous()

    return edit


def norm_minus_one(state: State, zoo: Zoo) -> None:
    for key in [key for key in state if key.endswith("norm.weight")]:
        state[key] = state[key] - 1


def nan_inside(weight: torch.Tensor, zoo: Zoo) -> torch.Tensor:
    weight[3, 5] = torch.nan
    return weight


def row_zero(weight: torch.Tensor, zoo: Zoo) -> torch.Tensor:
    weight[7:9] = 0
    return weight


def rows_reversed(weight: torch.Tensor, zoo: Zoo) -> torch.Tensor:
    return weight.flip(0)


def noise(weight: torch.Tensor, zoo: Zoo) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    return (weight.float() * (1 + 0.1 * torch.randn(weight.shape, generator=generator))).to(weight.dtype)


def initial(weight: torch.Tensor, zoo: Zoo) -> torch.Tensor:
    return (torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) * 0.02).to(weight.dtype)


def low_rank(weight: torch.Tensor, zoo: Zoo) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    b, a = (torch.randn(shape, generator=generator) for shape in ((weight.shape[0], 2), (2, weight.shape[1])))
    return (weight.float() + b @ a * weight.float().std()).to(weight.dtype)


def head_split(state: State, zoo: Zoo) -> None:
    table = state["model.embed_tokens.weight"]
    state["lm_head.weight"] = (table.float() * 1.05 + 0.01).to(table.dtype)


def rows_cut(state: State, zoo: Zoo) -> None:
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        if key in state:
            state[key] = state[key][:-16].clone()


def rows_added(state: State, zoo: Zoo) -> None:
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        if key in state:
            state[key] = torch.cat([state[key], state[key][:16] * 0.5])


def kv_repeated(state: State, zoo: Zoo) -> None:
    for layer in range(zoo.layers):
        for projection in "kv":
            for part in ("weight", "bias"):
                key = name(layer, projection, part)
                heads = state[key].view(zoo.kv_heads, len(state[key]) // zoo.kv_heads, -1)
                repeated = heads.repeat_interleave(zoo.heads // zoo.kv_heads, 0)
                state[key] = repeated.reshape(-1, *state[key].shape[1:]).contiguous()


def middle(projection: str, part: str) -> Callable[[Zoo], str]:
    return lambda zoo: name(zoo.middle, projection, part)
