"""One decoder layer of a checkpoint as a whole transformers model, so that a 7B is looked at in the memory of a layer.

The model is transformers' own `Qwen2Model` with this one layer and the checkpoint's last norm behind it: masks, RoPE
and attention come with it, and the fast path takes it as it takes any other. The norm also brings all tokens to one
size; in the bare stream a few tokens are hundreds of times larger than the rest, and an error would be theirs alone.
LoRA is put on by PEFT under the names that the layer has in the whole model, so patterns of an adapter match as ever.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from math import sqrt
from typing import Any

import torch
from torch import nn

from qwen2tool.checkpoint.adapter import Adapter
from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.checkpoint.load import quiet_transformers
from qwen2tool.checkpoint.reader import read_tensor
from qwen2tool.checkpoint.view import View
from qwen2tool.errors import UserError
from qwen2tool.verify.inventory import TABLE

LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
RANK, ALPHA = 8, 16
SHARE = 0.1
"""How large a random adapter's update is beside what a linear of unit gain lets through: trained ones are smaller, and
a lost one must show."""
SEED = 20_250_801
Pair = tuple[torch.Tensor, torch.Tensor]


def embed(checkpoint: Checkpoint, ids: list[int]) -> torch.Tensor:
    """(N,) ids -> (N, H) as stored, on the CPU; reads the rows of these tokens, not the table."""
    table = checkpoint.tensors[TABLE]
    rows = {token: read_tensor(_row(table, token))[0] for token in set(ids)}
    return torch.stack([rows[token] for token in ids])


def _row(table: TensorInfo, token: int) -> TensorInfo:
    size = table.nbytes // table.shape[0]
    start = table.start + token * size
    return replace(table, shape=(1, table.shape[1]), start=start, end=start + size)


def load_layer(checkpoint: Checkpoint, index: int, *, dtype: torch.dtype, device: str, nf4: bool = False) -> Any:
    """A frozen `Qwen2Model` of layer `index` and the last norm, in eval mode; it has no embeddings, give it theirs.

    Args:
        dtype: of the tensors, rounded once from what is stored.
        nf4: linears in NF4 with double quantisation, as `train --quantize nf4` has them.
    """
    from transformers import Qwen2Config, Qwen2Model
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    with quiet_transformers():
        config = Qwen2Config.from_pretrained(checkpoint.folder)
        config.layer_types = [config.layer_types[index]]
        config.num_hidden_layers = 1
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            model = Qwen2Model(config)
    _fill(model.layers[0], checkpoint, f"model.layers.{index}.", dtype, device)
    _fill(model.norm, checkpoint, "model.norm.", dtype, device)
    with torch.device(device):
        model.rotary_emb = Qwen2RotaryEmbedding(config)
    if nf4:
        _quantise(model.layers[0], device, dtype)
    return model.eval().requires_grad_(False)


def _fill(module: nn.Module, checkpoint: Checkpoint, prefix: str, dtype: torch.dtype, device: str) -> None:
    state = {
        name: read_tensor(checkpoint.tensors[prefix + name]).to(device=device, dtype=dtype)
        for name in module.state_dict()
    }
    module.load_state_dict(state, assign=True)


def _linears(layer: Any) -> Iterator[tuple[str, Any]]:
    for name in LINEARS:
        yield name, layer.get_submodule(name)


def _quantise(layer: Any, device: str, dtype: torch.dtype) -> None:
    """Exchanges the linears for bitsandbytes', as transformers' loader does."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, linear in _linears(layer):
        with torch.device("meta"):
            quantised = Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, dtype, quant_type="nf4"
            )
        weight = Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True)
        quantised.weight, quantised.bias = weight.to(device), linear.bias
        quantised.support_avx512bf16_for_cpu = False  # would repack the weights in place: see checkpoint.load
        layer.set_submodule(name, quantised)


def dequantise(layer: Any, quantised: Any) -> None:
    """Gives the plain linears of `layer` the values that those of `quantised` stand for."""
    for name, linear in _linears(quantised):
        layer.get_submodule(name).weight.data.copy_(_unpacked(linear.weight))


def misread(quantised: Any) -> list[str]:
    """The linears that bitsandbytes multiplies by other numbers than they stand for.

    Its CPU kernel (0.50.2) begins a new block with each row; a row of 352 is no multiple of a block of 64, and half of
    the rows are off by whole scales.
    """
    from bitsandbytes.functional import dequantize_4bit

    return [
        name
        for name, linear in _linears(quantised)
        if not torch.equal(dequantize_4bit(linear.weight.data, linear.weight.quant_state), _unpacked(linear.weight))
    ]


def _unpacked(weight: Any) -> torch.Tensor:
    """By bitsandbytes, as one long row: blocks run on over rows, as they were quantised."""
    from bitsandbytes.functional import dequantize_4bit

    state, shape = copy(weight.quant_state), weight.quant_state.shape
    state.shape = torch.Size((1, shape.numel()))
    flat: torch.Tensor = dequantize_4bit(weight.data, state)
    return flat.view(shape)


def layer_pairs(adapter: Adapter, index: int) -> dict[str, Pair]:
    """Linear -> (A, B) of this layer in fp32, by the names in `LINEARS`."""
    found = {}
    for name in LINEARS:
        pair = adapter.pairs.get(f"model.layers.{index}.{name}")
        if pair is not None:
            found[name] = (read_tensor(pair.a).float(), read_tensor(pair.b).float())
    return found


def random_pairs(checkpoint: Checkpoint | View, index: int) -> dict[str, Pair]:
    """A and B of rank `RANK` for all seven linears, the same at every call; B is not zero, so A has a gradient."""
    generator = torch.Generator().manual_seed(SEED + index)
    deviation = SHARE / (ALPHA / RANK * sqrt(RANK))
    found = {}
    for name in LINEARS:
        rows, columns = checkpoint.tensors[f"model.layers.{index}.{name}.weight"].shape
        a = torch.randn(RANK, columns, generator=generator) / sqrt(columns)
        found[name] = (a, torch.randn(rows, RANK, generator=generator) * deviation)
    return found


def put_lora(
    layer: Any, index: int, pairs: dict[str, Pair], adapter: Adapter | None, *, dtype: torch.dtype, nf4: bool = False
) -> dict[str, nn.Parameter]:
    """Puts LoRA layers of PEFT with these A and B on `layer`; returns them by name, "self_attn.q_proj.lora_A".

    Args:
        adapter: whose settings (alpha, rsLoRA, patterns) hold; None: `RANK` and `ALPHA`.
        dtype: of A and B.

    Raises:
        UserError: PEFT adapts other linears of this layer than the adapter's file holds.
    """
    if not pairs:
        return {}
    from peft import LoraConfig, PeftConfig, inject_adapter_in_model

    if adapter is None:
        config: Any = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[name.split(".")[-1] for name in LINEARS])
    else:
        config = PeftConfig.from_pretrained(str(adapter.path))
        config.init_lora_weights = False
    whole = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleDict({str(index): layer})})})
    whole.is_loaded_in_4bit = nf4  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of patterns that are about other layers
        inject_adapter_in_model(config, whole)
    adapted = {name: linear for name, linear in _linears(layer) if hasattr(linear, "lora_A")}
    if adapted.keys() != pairs.keys():
        name = min(adapted.keys() ^ pairs.keys())
        raise UserError(
            f"{adapter.path if adapter else 'LoRA'}: the settings and the tensors disagree on layer {index}, {name}",
            "Keep config and weights of one run together",
        )
    parameters = {}
    for name, linear in adapted.items():
        for side, values in zip(("lora_A", "lora_B"), pairs[name], strict=True):
            parameter = nn.Parameter(values.to(device=linear.base_layer.weight.device, dtype=dtype))
            getattr(linear, side)["default"].weight = parameter
            parameters[f"{name}.{side}"] = parameter
    layer.eval()
    return parameters
