"""One decoder layer at a time as transformers' own code: a skeleton on no device, filled from a view layer by layer.

The skeleton is a `Qwen2Model` of one layer whose last norm is passed over, so masks, RoPE and attention are
transformers'. Memory: the layer in fp32 (72B: 3.5 GB) and the tensor that is being read; `cast` turns it to 16 bit
tensor by tensor, so that a second precision costs no second reading.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qwen2tool.checkpoint.geometry import expected_tensors
from qwen2tool.checkpoint.load import quiet_transformers
from qwen2tool.checkpoint.view import read
from qwen2tool.routing.attention import safe_attention
from qwen2tool.verify.noise import Attention
from qwen2tool.verify.sides import LowRank, Side, zeros_where_missing
from qwen2tool.verify.single import LINEARS
from qwen2tool.verify.stream import Batch

HOOKS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "attention": "self_attn", "mlp": "mlp",
}  # fmt: skip
Outputs = dict[str, torch.Tensor]


class OneLayer:
    """A layer of one side; `fill` it before it is run."""

    def __init__(self, side: Side, device: str) -> None:
        self.side, self.device = side, device
        self.low_rank: dict[str, list[LowRank]] = {}
        shapes = expected_tensors(side.view.geometry)
        self._tensors = zeros_where_missing(side.view, shapes)
        self._models: dict[str, Any] = {}
        self._kinds: list[str] | None = None
        self._model: Any = None
        self._seen: Outputs = {}

    def fill(self, index: int, dtype: torch.dtype = torch.float32) -> None:
        """Reads layer `index`; what was in it before is let go first."""
        self.free()
        self._model = self._skeleton(index)
        layer, prefix = self._model.layers[0], f"model.layers.{index}."
        for name in list(layer.state_dict()):
            values = read(self._tensors[prefix + name]).to(self.device, dtype)
            parent, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, nn.Parameter(values, requires_grad=False))
        found = {name: self.side.low_rank(prefix + name, self.device) for name in LINEARS}
        self.low_rank = {name: parts for name, parts in found.items() if parts}

    def cast(self, dtype: torch.dtype) -> None:
        """Rounds the layer to `dtype` in place; adapters stay in fp32, as PEFT keeps them."""
        for parameter in self._model.layers[0].parameters():
            parameter.data = parameter.data.to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer's own tensors."""
        dtype: torch.dtype = next(self._model.layers[0].parameters()).dtype
        return dtype

    @contextmanager
    def trained(self, pairs: dict[str, tuple[torch.Tensor, torch.Tensor, float]]) -> Iterator[None]:
        """Inside, these adapters (A, B, scaling) stand beside the linears too, with gradients of their own."""
        before = self.low_rank
        more = {name: [LowRank(a=a, b=b, scaling=scaling)] for name, (a, b, scaling) in pairs.items()}
        self.low_rank = {name: before.get(name, []) + more.get(name, []) for name in before | more}
        yield
        self.low_rank = before

    def free(self) -> None:
        """Lets the layer's memory go."""
        self.low_rank, self._seen = {}, {}
        if self._model is not None:
            for parameter in self._model.layers[0].parameters():
                parameter.data = torch.empty(0)

    def run(self, batch: Batch, rows: torch.Tensor, attention: Attention = "sdpa") -> Outputs:
        """One pass: (N, H) hidden states of the batch's tokens -> (N, width) for each of `PARTS`."""
        model, x = self._model, batch.pad(rows.to(self.device))
        model.config._attn_implementation = attention
        options: dict[str, Any] = {"use_cache": False}
        if batch.left:
            there = batch.there.to(self.device)
            positions = there.long().cumsum(-1).sub_(1).clamp_(min=0)
            options |= {"attention_mask": there.long(), "position_ids": positions}
        with safe_attention():
            y = model(inputs_embeds=x, **options)[0]
        found = {part: batch.unpad(values) for part, values in self._seen.items()}
        self._seen = {}
        return found | {"output": batch.unpad(y)}

    def _skeleton(self, index: int) -> Any:
        from transformers import Qwen2Config, Qwen2Model
        from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

        with quiet_transformers():
            if self._kinds is None:
                self._kinds = list(Qwen2Config.from_dict(dict(self.side.view.config)).layer_types)
            kind = self._kinds[index]
            if kind in self._models:
                return self._models[kind]
            config = Qwen2Config.from_dict(dict(self.side.view.config))
            config.layer_types, config.num_hidden_layers = [kind], 1
            config._attn_implementation = "sdpa"
            with torch.device("meta"):
                model = Qwen2Model(config)
        model.norm, model.embed_tokens = nn.Identity(), None
        with torch.device(self.device):
            model.rotary_emb = Qwen2RotaryEmbedding(config)
        self._hook(model.layers[0])
        self._models[kind] = model.eval().requires_grad_(False)
        return model

    def _hook(self, layer: Any) -> None:
        for name in LINEARS:
            layer.get_submodule(name).register_forward_hook(self._adapt(name))
        for part, name in HOOKS.items():
            layer.get_submodule(name).register_forward_hook(self._keep(part))

    def _adapt(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            added = output
            for part in self.low_rank.get(name, ()):
                added = added + part(inputs[0])
            return added.to(output.dtype)

        return hook

    def _keep(self, part: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._seen[part] = output[0] if isinstance(output, tuple) else output

        return hook
