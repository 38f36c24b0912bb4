"""Frozen 4-bit weights that wait on the host, and are on the GPU while their layer is at work.

A layer's weights (101 MB of a 7B) travel while the layer before it computes, in the forward and once more in the
backward, on a stream of their own: the bus carries them one way while what layers keep leaves the other (`host`). They
never travel back, for nothing writes to them. Where the backward begins memory is scarcest, and all but the weights of
two layers are away. Those two have fixed places, by turns: taken from the allocator and given back 60 times a pass,
they left 3 GB of a 7B's 14 in pieces. Scales stay on the device: they are a thirtieth of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qwen2tool.kernels.group import Group
from qwen2tool.kernels.nf4 import Quantised
from qwen2tool.routing.examine import LayerSpec
from qwen2tool.routing.host import Copied, pinned

ALIGNMENT = 256
"""Bytes; where one weight begins behind another."""


class HostWeights:
    """Pinned blocks, one a layer, fixed in place, so that a captured graph may read them."""

    def __init__(self) -> None:
        self._blocks: dict[int, torch.Tensor] = {}
        self._layers: dict[int, nn.Module] = {}
        self._device: torch.device | None = None
        self._stream: torch.cuda.Stream | None = None
        self._places: list[torch.Tensor] = []
        self._coming: dict[int, Copied] = {}
        self._away: set[int] = set()

    @property
    def away(self) -> frozenset[int]:
        """The layers whose weights are on the host."""
        return frozenset(self._away)

    def move(self, layers: Mapping[int, nn.Module]) -> None:
        """Puts the 4-bit weights of `layers` on the host where they are on the device."""
        for index, layer in layers.items():
            weights = [weight for weight in _quantised(layer) if weight.is_cuda]
            if not weights:
                continue
            offsets = _offsets([_size(weight) for weight in weights])
            if index not in self._blocks:
                self._blocks[index] = pinned(self, offsets[-1])
            for weight, offset in zip(weights, offsets[:-1], strict=True):
                home = self._blocks[index][offset : offset + _size(weight)].view(weight.dtype).view(weight.shape)
                home.copy_(weight.data)
                self._device, weight.data = weight.device, home
            self._layers[index] = layer
            self._away.add(index)
        largest = max((len(self._blocks[index]) for index in self._away), default=0)
        if largest > (len(self._places[0]) if self._places else 0):
            torch.cuda.empty_cache()  # what they leave would fit nothing else
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._places = [torch.empty(largest, dtype=torch.uint8, device=self._device) for _ in range(2)]

    def restore(self, index: int | None = None) -> None:
        """Puts those of layer `index`, or of all layers, back on the device."""
        for layer in self.away if index is None else self.away & {index}:
            early = self._coming.pop(layer, None)
            if early is not None:
                early.wait()
            for weight in _quantised(self._layers[layer]):
                weight.data = weight.data.to(self._device)
            self._away.remove(layer)

    def begin(self) -> None:
        """Called before a forward: what a pass that ended early has fetched is not relied on, least of all in a
        capture, which must bring all that it reads itself."""
        self._coming.clear()

    def fetch(self, index: int) -> None:
        """Starts the way of layer `index`'s weights, if they are on the host."""
        if index not in self._away or index in self._coming:
            return
        assert self._stream is not None
        for early in [other for other in self._coming if other % 2 == index % 2]:
            del self._coming[early]  # a backward that ended early left it in this place
        block = self._blocks[index]
        self._coming[index] = Copied.start(self._stream, index, self._places[index % 2][: len(block)], block)

    def bring(self, spec: LayerSpec) -> LayerSpec:
        """`spec` with its weights on the device, until those of the layer after next are fetched."""
        if spec.index not in self._away:
            return spec
        block = self._blocks[spec.index]
        self.fetch(spec.index)
        copied = self._coming.pop(spec.index)
        copied.wait()
        begin, there = block.data_ptr(), copied.tensor

        def moved(group: Group) -> Group:
            projections = []
            for projection in group.projections:
                weight = projection.weight
                if isinstance(weight, Quantised) and not weight.packed.is_cuda:
                    offset = weight.packed.data_ptr() - begin
                    weight = weight._replace(packed=there[offset : offset + weight.packed.numel()])
                projections.append(projection._replace(weight=weight))
            return replace(group, projections=tuple(projections))

        groups: dict[str, Any] = {name: moved(getattr(spec, name)) for name in ("qkv", "o", "gate_up", "down")}
        return replace(spec, **groups)


def _quantised(layer: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in layer.parameters() if getattr(weight, "quant_state", None) is not None]


def _size(weight: torch.Tensor) -> int:
    return weight.numel() * weight.element_size()


def _offsets(sizes: list[int]) -> list[int]:
    """Where each begins, and where the last one ends."""
    found = [0]
    for size in sizes:
        found.append(found[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    return found
