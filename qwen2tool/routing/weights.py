"""Frozen 4-bit weights that wait on the host, and are on the GPU while their layer is at work.

A layer's weights (101 MB of a 7B) travel while the layer before it computes, in the forward and once more in the
backward, on a stream of their own: the bus carries them one way while what layers keep leaves the other (`host`). They
never travel back, for nothing writes to them. Where the backward begins memory is scarcest, and of all layers but the
first and the last it then holds the weights of two. These have fixed places, by turns: taken from the allocator and
given back 60 times a pass, they would leave it in pieces. Scales stay on the device: they are a thirtieth of it.

What a pass brings is decided by where the weights of its own layers lie, not by what was moved last: a backward goes on
after somebody has put them back in between. In a graph capture nothing is moved, and all that a pass fetches it waits
for, as a capture that ends with a copy under way is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qwen2tool.kernels.group import Group
from qwen2tool.kernels.nf4 import Quantised
from qwen2tool.routing.examine import LayerSpec
from qwen2tool.routing.host import Copied, Homes


class HostWeights:
    """Pinned blocks, one a layer, fixed in place and always with the same weights: captured graphs may read them."""

    def __init__(self) -> None:
        self._homes: dict[int, Homes] = {}
        self._weights: dict[int, list[nn.Parameter]] = {}
        self.device: torch.device | None = None
        """Where weights came from; None: nothing was ever moved."""
        self._stream: torch.cuda.Stream | None = None
        self._places: list[torch.Tensor] = []
        self._coming: dict[int, Copied] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy begins with nothing: `RoutedStack` puts weights back before one is made or pickled."""
        return type(self), ()

    def move(self, layers: Mapping[int, nn.Module]) -> None:
        """Puts the 4-bit weights of `layers` on the host where they are on the device."""
        for index, layer in layers.items():
            if index not in self._weights:
                self._weights[index] = _quantised(layer)
            weights = self._weights[index]
            if not any(map(_on_device, weights)):
                continue
            if index not in self._homes:
                self._homes[index] = Homes.of(weights)
            for weight, place in zip(weights, self._homes[index].places, strict=True):
                if _on_device(weight) and not self._waits(index, weight):
                    place.copy_(weight.data)
                    self.device, weight.data = weight.device, place

    def restore(self, index: int | None = None) -> None:
        """Puts those of layer `index`, or of all layers, back where their scales are."""
        for layer in self._weights if index is None else {index} & set(self._weights):
            for weight in self._weights[layer]:
                if self._waits(layer, weight):
                    state: Any = weight.quant_state  # type: ignore[attr-defined]
                    weight.data = weight.data.to(state.absmax.device, copy=True)

    def make_places(self) -> None:
        """Takes the memory of two layers' weights for good; the first fetch does so where nobody has before."""
        largest = max((len(home.block) for home in self._homes.values()), default=0)
        if largest > (len(self._places[0]) if self._places else 0):
            self._places = [torch.empty(largest, dtype=torch.uint8, device=self.device) for _ in range(2)]

    def free_places(self) -> None:
        """Gives that memory back. Captured graphs would go on writing to it."""
        for copied in self._coming.values():
            copied.wait()
        self._places, self._coming = [], {}

    def begin(self) -> None:
        """Called before a forward: what a pass that ended early has fetched is not relied on, least of all in a
        capture, which must bring all that it reads itself."""
        self._coming.clear()

    def fetch(self, spec: LayerSpec) -> None:
        """Starts the way of a layer's weights, if they are on the host; `bring` has to follow."""
        index = spec.index
        if index in self._coming or not any(self._waits(index, weight.packed) for weight in _packed(spec)):
            return
        self.make_places()
        if self._stream is None and self._places[0].is_cuda:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        for early in [other for other in self._coming if other % 2 == index % 2]:
            del self._coming[early]  # a backward that ended early left it in this place
        block = self._homes[index].block
        self._coming[index] = Copied.start(self._stream, index, self._places[index % 2][: len(block)], block)

    def bring(self, spec: LayerSpec) -> LayerSpec:
        """`spec` with its weights on the device, until those of the layer after next are fetched."""
        self.fetch(spec)
        copied = self._coming.pop(spec.index, None)
        if copied is None:
            return spec
        copied.wait()
        begin, there = self._homes[spec.index].block.data_ptr(), copied.tensor

        def moved(group: Group) -> Group:
            projections = []
            for projection in group.projections:
                weight = projection.weight
                if isinstance(weight, Quantised) and self._waits(spec.index, weight.packed):
                    offset = weight.packed.data_ptr() - begin
                    weight = weight._replace(packed=there[offset : offset + weight.packed.numel()])
                projections.append(projection._replace(weight=weight))
            return replace(group, projections=tuple(projections))

        qkv, o, gate_up, down = map(moved, spec.groups)
        return replace(spec, qkv=qkv, o=o, gate_up=gate_up, down=down)

    def _waits(self, index: int, weight: torch.Tensor) -> bool:
        """Whether `weight` lies in the block of layer `index`."""
        home = self._homes.get(index)
        return home is not None and 0 <= weight.data_ptr() - home.block.data_ptr() < len(home.block)


def _packed(spec: LayerSpec) -> Iterator[Quantised]:
    for group in spec.groups:
        for projection in group.projections:
            if isinstance(projection.weight, Quantised):
                yield projection.weight


def _quantised(layer: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in layer.parameters() if getattr(weight, "quant_state", None) is not None]


def _on_device(weight: torch.Tensor) -> bool:
    return weight.is_cuda
