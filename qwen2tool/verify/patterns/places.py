"""The right numbers in the wrong place: whole layers swapped or doubled, q and k (gate and up) exchanged.

A tensor that is far from its counterpart is looked up among the reference's tensors of its shape by a few hundred
entries. A quantised copy of another layer is still nearer to that layer than to anything else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from qwen2tool.checkpoint.header import ITEM_BYTES, TensorInfo
from qwen2tool.checkpoint.view import AnyTensor, read
from qwen2tool.verify.patterns.finding import Finding, join, layer_of, noun

FAR = {"bias": 0.02, "norm": 0.02, "weight": 0.3}
"""Relative error from which on a tensor is looked up elsewhere. Norms of neighbouring layers resemble each other."""
CLOSE = 0.25
"""Relative distance of the samples that counts as found; 4-bit quantisation leaves about 0.1."""
CLOSER = 0.25
"""Of its distance from its own counterpart, which the distance from where it was found may be."""
SPOTS, RUN = 4, 64
MOST_OF_A_LAYER = 0.75


def sample(tensor: AnyTensor) -> torch.Tensor:
    """A few hundred entries in float64: of a matrix, the first of `SPOTS` rows; of a vector, all."""
    if len(tensor.shape) == 1:
        return read(tensor).double()
    height, width = tensor.shape
    rows = sorted({height * spot // SPOTS for spot in range(SPOTS)})
    if not isinstance(tensor, TensorInfo):
        return read(tensor)[rows, :RUN].double().reshape(-1)
    pieces = []
    for row in rows:
        start = tensor.start + row * width * ITEM_BYTES[tensor.dtype]
        length = min(RUN, width)
        piece = replace(tensor, shape=(length,), start=start, end=start + length * ITEM_BYTES[tensor.dtype])
        pieces.append(read(piece).double())
    return torch.cat(pieces)


@dataclass
class Places:
    """Where the candidate's tensors come from, found as they are asked for; the reference's samples are kept."""

    reference: Mapping[str, AnyTensor]
    samples: dict[str, torch.Tensor] = field(default_factory=dict)

    def source(self, name: str, candidate: AnyTensor, error: float) -> str | None:
        """The reference's tensor that `candidate`, stored as `name`, is a copy of; None if it is its own or none.

        Args:
            error: relative, of `candidate` from its counterpart.
        """
        if not error > FAR[noun(name)]:
            return None
        theirs = sample(candidate)
        if not theirs.any() or not bool(theirs.isfinite().all()):
            return None
        best, distance = None, min(CLOSE, CLOSER * error)
        for other, tensor in self.reference.items():
            if other == name or tensor.shape != candidate.shape:
                continue
            if other not in self.samples:
                self.samples[other] = sample(tensor)
            found = float((theirs - self.samples[other]).norm() / theirs.norm())
            if found < distance:
                best, distance = other, found
        return best


def find_places(sources: Mapping[str, str], differing: Iterable[str]) -> list[Finding]:
    """Findings for the tensors that were found elsewhere.

    Args:
        sources: name -> the reference's tensor that it is a copy of.
        differing: names of all tensors that differ: a layer is another one where most of its tensors are.
    """
    moved: dict[int, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    total: dict[int, int] = defaultdict(int)
    for name in differing:
        if (placed := layer_of(name)) is not None:
            total[placed[0]] += 1
    for name, source in sources.items():
        here, there = layer_of(name), layer_of(source)
        if here and there and here[1] == there[1] and here[0] != there[0]:
            moved[here[0]][there[0]].append(name)
    whole = {
        layer: origin
        for layer, origins in moved.items()
        for origin, names in origins.items()
        if len(names) >= MOST_OF_A_LAYER * total[layer] and any(noun(name) == "weight" for name in names)
        and {layer_of(name)[1].split(".")[0] for name in names if layer_of(name)} >= {"self_attn", "mlp"}  # type: ignore[index]
    }  # fmt: skip
    found = []
    for name, source in sources.items():
        here = layer_of(name)
        if here and here[0] in whole and (layer_of(source) or (None,))[0] == whole[here[0]]:
            found.append(_of_a_layer(name, here[0], whole))
        else:
            found.append(_single(name, source, sources))
    return found


def _of_a_layer(name: str, layer: int, whole: Mapping[int, int]) -> Finding:
    origin = whole[layer]
    if whole.get(origin) == layer:
        return Finding(code="layer_swapped", name=name, detail=join(sorted(map(str, {layer, origin}), key=int)))
    if all(other not in whole.values() for other in whole):
        return Finding(code="layer_duplicated", name=name, detail=f"layer {layer} holds the tensors of layer {origin}")
    moves = join([f"layer {here} holds layer {there}" for here, there in sorted(whole.items())][:4])
    return Finding(code="layer_moved", name=name, detail=moves)


def _single(name: str, source: str, sources: Mapping[str, str]) -> Finding:
    exchanged = sources.get(source) == name
    here, there = layer_of(name), layer_of(source)
    part = noun(name)
    if here and there and exchanged:
        kinds = " and ".join(sorted({_projection(here[1]), _projection(there[1])}))
        layers = join(sorted({str(here[0]), str(there[0])}, key=int))
        return Finding(code=f"{part}_swapped", name=name, detail=kinds if here[0] == there[0] else f"{kinds}|{layers}")
    return Finding(code=f"{part}_misplaced", name=name, detail=f"what the reference has as {source}")


def _projection(kind: str) -> str:
    return kind.split(".")[1].removesuffix("_proj") if "_proj" in kind else kind
