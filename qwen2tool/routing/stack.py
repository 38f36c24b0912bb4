"""The inner model of one instance, replaced: embedding, decoder layers and last norm over rows without padding.

`RoutedStack` stands where transformers' `Qwen2Model` stood and holds the very same sub-modules under the same names, so
parameters, state dict, PEFT, optimizers and savers see no difference. A pass that the fast path does not do exactly
(a KV cache, a 4-D mask, hidden states or attention weights asked for) is handed to the original, which is still whole.
Inside a pass, a layer that cannot be fused runs as transformers' own layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qwen2tool.errors import UserError
from qwen2tool.kernels.embed import gather_rows
from qwen2tool.kernels.rmsnorm import rms_norm
from qwen2tool.kernels.rope import key_centre
from qwen2tool.routing.attention import safe_attention
from qwen2tool.routing.examine import LayerSpec, NeedsBatch, NotFused, examine_norm, examine_stack
from qwen2tool.routing.host import HostStore
from qwen2tool.routing.layer import Keep, Place, fused_layer
from qwen2tool.routing.memory import MemoryPlan
from qwen2tool.routing.operands import Call, Handed, Unpacked, with_room
from qwen2tool.routing.sequences import Flat, flatten
from qwen2tool.routing.weights import HostWeights

PASSED_ON = ("output_hidden_states", "output_attentions", "cache_position")
"""Arguments whose presence hands the pass to the original."""


class RoutedStack(nn.Module):
    """Takes and returns what `Qwen2Model` does.

    Args:
        original: the `Qwen2Model` it stands for; kept aside, whole.
        memory: what each layer keeps for its backward; None leaves it to the model's gradient checkpointing switch.
        residual_dtype: of the stream between layers; None takes that of the products.
        reference: run every layer as transformers' own.
        left: indices of layers that run so.
    """

    def __init__(
        self,
        original: Any,
        *,
        memory: MemoryPlan | None = None,
        residual_dtype: torch.dtype | None = None,
        reference: bool = False,
        left: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__()
        # One dict, so that a child exchanged in either (modules_to_save, resized embeddings) is exchanged in both.
        self.__dict__["_modules"] = original._modules
        object.__setattr__(self, "original", original)  # not a sub-module: its parameters would be named twice
        self.memory, self.residual_dtype, self.reference, self.left = memory, residual_dtype, reference, left
        self._host, self._unpacked = HostStore(), Unpacked()
        self.host_weights = HostWeights()
        self._centres: dict[int, tuple[Any, torch.Tensor | None]] = {}
        self.train(original.training)

    def __getattr__(self, name: str) -> Any:
        """What is asked for and not ours (config, dtype, device, switches) is the original's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original" not in self.__dict__:  # half-built, as while it is copied or unpickled
                raise
            return getattr(self.__dict__["original"], name)

    def train(self, mode: bool = True) -> RoutedStack:
        """Switches the original along, whose children are ours."""
        super().train(mode)
        self.original.training = mode
        return self

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """(B, T) ids or (B, T, H) embeddings -> BaseModelOutputWithPast; slots of padding come back as zeros."""
        layers = None if self._steps_aside(attention_mask, past_key_values, use_cache, kwargs) else self._examine()
        if layers is None:
            if input_ids is not None and self._waits_on_host(input_ids):
                inputs_embeds = self.embed(input_ids)
                input_ids = None
            self.restore()
            with safe_attention():
                return self.original(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    past_key_values=past_key_values,
                    inputs_embeds=inputs_embeds,
                    use_cache=use_cache,
                    **kwargs,
                )
        from transformers.modeling_outputs import BaseModelOutputWithPast

        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        x = inputs_embeds if input_ids is None else self.embed(input_ids)
        assert x is not None
        rows, columns, hidden = x.shape
        flat = flatten(rows, columns, x.device, attention_mask, position_ids)
        slots = x.reshape(rows * columns, hidden)
        embedded = [slots if flat.slots is None else slots[flat.slots]]
        del x, slots, inputs_embeds
        y = self._run(embedded, flat, layers)
        if flat.slots is not None:
            y = y.new_zeros(rows * columns, hidden).index_copy(0, flat.slots, y)
        return BaseModelOutputWithPast(last_hidden_state=y.view(rows, columns, hidden), past_key_values=None)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) ids -> (..., H), from the table on the device or on the host."""
        if self._waits_on_host(ids):
            return gather_rows(self.embed_tokens.weight, ids)
        embedded: torch.Tensor = self.embed_tokens(ids)
        return embedded

    def settle(self) -> None:
        """Puts the weights that wait on the host there, if anything has brought them back; not for a graph capture."""
        if self.memory is not None:
            self.host_weights.move({index: self.layers[index] for index in self.memory.layers_away})

    def restore(self) -> None:
        """Puts them back on the device, where they stay until the next `settle`; see `swap.restore`."""
        self.host_weights.restore()

    def stop(self) -> None:
        """Waits for copies under way, whose memory may go then."""
        self._host.begin()
        self.host_weights.free_places()

    def __getstate__(self) -> dict[str, Any]:
        self.restore()  # a pickled weight would lie in no block either
        return self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutedStack:
        self.restore()  # a copied weight would lie in no block
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            twin.__dict__[name] = copy.deepcopy(value, memo)
        return twin

    def _waits_on_host(self, ids: torch.Tensor) -> bool:
        """Whether the table is where our memory plan put it; what others move, their hooks bring back."""
        planned = self.memory is not None and self.memory.host_embedding
        return planned and bool(self.embed_tokens.weight.device != ids.device)

    def _steps_aside(self, mask: Any, cache: Any, use_cache: bool | None, kwargs: dict[str, Any]) -> bool:
        # Unasked, a cache is left out in training, where nobody reads it.
        cached = use_cache if use_cache is not None else self.original.config.use_cache and not self.training
        return (
            cache is not None
            or bool(cached)
            or kwargs.get("return_dict") is False
            or (mask is not None and (isinstance(mask, dict) or mask.dim() != 2))
            or any(kwargs.get(name) is not None and kwargs[name] is not False for name in PASSED_ON)
            or self.original.config.output_hidden_states
            or self.original.config.output_attentions
        )

    def run(self, x: torch.Tensor, flat: Flat) -> torch.Tensor:
        """Embeddings (N, H) of the real tokens through all layers and the last norm: (N, H).

        Raises:
            UserError: a module needs the rows of the batch.
        """
        layers = self._examine()
        if layers is None:
            raise UserError("the model has parts that need whole batches, see its plan", "Train it with transformers")
        embedded = [x]
        del x
        return self._run(embedded, flat, layers)

    def _examine(self) -> list[LayerSpec | NotFused] | None:
        """What each layer is, None if the whole pass is the original's."""
        if self.reference:
            plain = self.original.config._attn_implementation == "sdpa"  # others take no mask of ours
            return [NotFused("asked for")] * len(self.layers) if plain else None
        try:
            return examine_stack(self.original, self.left)
        except NeedsBatch:
            return None

    def _run(self, embedded: list[torch.Tensor], flat: Flat, layers: list[LayerSpec | NotFused]) -> torch.Tensor:
        """`embedded` holds x (N, H) alone, and is emptied: a caller's name for x would keep it through all layers."""
        x = embedded.pop()
        dtype = _product_dtype(x)
        x = x.to(self.residual_dtype or dtype)
        positions = flat.positions[None]
        angles = self.rotary_emb(x.new_empty(0, dtype=torch.float32), positions)
        half = angles[0].shape[-1] // 2
        cos, sin = (table[0, :, :half].contiguous() for table in angles)
        seed = torch.randint(2**62, (), device=x.device) if self._draws_masks() else None
        plan = self.memory or MemoryPlan(())
        if torch.is_grad_enabled():
            self._host.begin()
        bare = Call(flat.sequences, cos, sin, dtype, seed, frugal=plan.frugal, tails=plan.tails)
        if self.host_weights.device == x.device:
            self.host_weights.begin()
            specs = [spec if isinstance(spec, LayerSpec) else None for spec in layers]
            bare = replace(bare, weights=self.host_weights, specs=specs)
        unpacked = replace(bare, unpacked=self._unpacked)
        for index, (layer, spec) in enumerate(zip(self.layers, layers, strict=True)):
            if isinstance(spec, NotFused):
                self.host_weights.restore(index)
                x = self._reference_layer(layer, index, x, flat, dtype)
                continue
            x = fused_layer(
                x,
                spec,
                unpacked if index < plan.layers_unpacked else bare,
                centre=self._centre(index, spec),
                keep=self._kept(index, layer),
                place=self._place(index, x),
            )
        try:
            weight, eps = examine_norm(self.norm)
        except NotFused:
            y: torch.Tensor = self.norm(x).to(dtype)
            return y
        return rms_norm(x, weight, eps, room=_room_for_gradient(bare.handed, layers)).to(dtype)

    def _draws_masks(self) -> bool:
        return any(
            isinstance(module, nn.Dropout) and module.p > 0 and module.training for module in self.layers.modules()
        )

    def _kept(self, index: int, layer: Any) -> Keep:
        if self.memory is not None:
            return self.memory.keep[index]
        return "input" if layer.gradient_checkpointing else "all"

    def _place(self, index: int, x: torch.Tensor) -> Place | None:
        if self.memory is None or not x.is_cuda or not torch.is_grad_enabled():
            return None
        if not self.memory.host_inputs and not self.memory.host_gate_up:
            return None
        return Place(self._host, index < self.memory.host_inputs, index in self.memory.host_gate_up)

    def _centre(self, index: int, spec: LayerSpec) -> torch.Tensor | None:
        """Made once from the bias of k, and again if that bias or the frequencies changed."""
        if spec.k_bias is None:
            return None
        frequencies = self.rotary_emb.inv_freq
        state = (spec.k_bias.data_ptr(), spec.k_bias._version, frequencies.data_ptr(), frequencies._version)
        if self._centres.get(index, (None, None))[0] != state:
            with torch.no_grad():
                centre = key_centre(
                    spec.k_bias.detach(),
                    frequencies,
                    kv_heads=spec.kv_heads,
                    scaling=float(self.rotary_emb.attention_scaling),
                )
            self._centres[index] = (state, centre)
        return self._centres[index][1]

    def _reference_layer(self, layer: Any, index: int, x: torch.Tensor, flat: Flat, dtype: torch.dtype) -> torch.Tensor:
        """transformers' own layer over the same rows: one sequence of N tokens with a mask that keeps them apart."""
        rows = x.to(dtype)[None]
        angles = self.rotary_emb(rows, flat.positions[None])
        mask = block_mask(flat, self._window(index))
        options = {"attention_mask": mask, "position_embeddings": angles, "position_ids": flat.positions[None]}

        def recomputable(rows: torch.Tensor) -> Any:
            layer.gradient_checkpointing = False  # the layer's own recomputation would run outside of this context
            try:
                with safe_attention():
                    return layer(rows, **options)
            finally:
                layer.gradient_checkpointing = True

        if layer.gradient_checkpointing and layer.training:
            y: torch.Tensor = checkpoint(recomputable, rows, use_reentrant=False)
        else:
            with safe_attention():
                y = layer(rows, **options)
        return y[0].to(x.dtype)

    def _window(self, index: int) -> int | None:
        config = self.original.config
        return config.sliding_window if config.layer_types[index] == "sliding_attention" else None


def _room_for_gradient(handed: Handed, layers: list[LayerSpec | NotFused]) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the last norm's gradient is written to: rows that the last layer may go on with."""
    last = layers[-1] if layers else None
    if not isinstance(last, LayerSpec):
        return torch.empty_like
    width = last.down.width
    return lambda x: handed.give(with_room(x, width), len(layers))


def block_mask(flat: Flat, window: int | None = None) -> torch.Tensor:
    """(1, 1, N, N) bool: a token sees itself and the earlier ones of its sequence, `window` of them at most."""
    count = flat.positions.shape[0]
    slots = torch.arange(count, device=flat.positions.device)
    owner = torch.bucketize(slots, flat.sequences.offsets[1:].long(), right=True)
    distance = slots[:, None] - slots[None]
    seen = (owner[:, None] == owner[None]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    return seen[None, None]


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else that of the embeddings."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
