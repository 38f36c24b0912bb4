"""Third level: the two sides layer by layer, one layer of one side in memory at a time.

Four kinds of passes share one reading of each layer's tensors:
- the truth: the reference in fp32 on its own hidden states;
- the noise: the reference in the dtype it is meant for, on its own hidden states, in more than one way (`noise`);
- accumulated: the candidate in fp32 on its own hidden states: how far the difference has grown;
- own: the candidate's layer in fp32 on the reference's hidden states: what this layer alone does differently.

Where the candidate's hidden states are the reference's to the last bit, the last two are one pass; where a layer's
tensors are identical, its own error is 0 and no pass. The reference's layer is let go before the candidate's is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import Any

import torch

from qwen2tool.checkpoint.load import Dtype
from qwen2tool.console import Advance
from qwen2tool.verify.gradients import GradientInput, Gradients, gradient_errors, layer_gradients
from qwen2tool.verify.inventory import TABLE
from qwen2tool.verify.layer_figures import LayerFigures
from qwen2tool.verify.noise import NoiseRun, first_tokens, noise_runs
from qwen2tool.verify.one_layer import OneLayer, Outputs
from qwen2tool.verify.sides import Side
from qwen2tool.verify.stream import Batch, Matrix, Rows, Store, Text

TRUTH, CANDIDATE = "truth", "candidate"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What holds for the whole comparison.

    Attributes:
        dtype: what the model is meant to run in.
        identical: layers whose tensors and configuration are the same on both sides, byte for byte.
        gradients: whether to compare those.
    """

    device: str
    dtype: Dtype
    identical: frozenset[int] = frozenset()
    gradients: bool = False

    @property
    def noise(self) -> tuple[NoiseRun, ...]:
        return noise_runs(self.dtype)


@dataclass
class Stream:
    """Hidden states of one run: `now` is the input of the layer that comes; `turn` names which of two buffers it is."""

    name: str
    width: int
    dtype: torch.dtype
    store: Store
    tokens: int
    turn: int = 0

    @property
    def now(self) -> Rows:
        return self._buffer(self.turn)

    @property
    def next(self) -> Rows:
        return self._buffer(1 - self.turn)

    def _buffer(self, turn: int) -> Rows:
        return self.store.rows(f"{self.name}.{turn}", self.tokens, self.width, self.dtype)


class Tally:
    """Errors of one kind of pass by part: the root mean square over tokens of ||found - truth|| / ||truth||.

    Every token counts alike: in the stream of a real model a few are hundreds of times larger than the rest, and a norm
    over all would be theirs alone.
    """

    def __init__(self) -> None:
        self._squares: dict[str, float] = defaultdict(float)
        self._rows: dict[str, int] = defaultdict(int)

    def add(self, part: str, found: torch.Tensor, truth: torch.Tensor) -> bool:
        """Adds rows (n, width) of a part; returns whether they are the truth's to the last bit."""
        self._rows[part] += len(found)
        if found.shape != truth.shape:
            self._squares[part] = inf
            return False
        truth = truth.to(found.device)
        error = found.float() - truth
        size, off = torch.linalg.vector_norm(truth, dim=-1), torch.linalg.vector_norm(error, dim=-1)
        ratio = torch.where(off == 0, 0.0, off.double() / size.double())
        self._squares[part] += ratio.square().sum().item()
        return not error.any()

    @property
    def errors(self) -> dict[str, float]:
        """By part; infinite where a number is not finite."""
        means = {part: square / max(self._rows[part], 1) for part, square in self._squares.items()}
        return {part: mean**0.5 if mean == mean else inf for part, mean in means.items()}


class LayerComparison:
    """The streams of all runs, and one layer after the other through them."""

    def __init__(self, reference: Side, candidate: Side, text: Text, setting: Setting, store: Store) -> None:
        self.reference, self.candidate, self.text, self.setting, self.store = reference, candidate, text, setting, store
        self.batches = text.batches()
        self.together = True
        """Whether the candidate's hidden states are the truth's so far, bit for bit."""
        widths = [side.view.geometry.hidden_size for side in (reference, candidate)]
        wide = torch.float32
        self.truth = Stream(TRUTH, widths[0], wide, store, text.tokens)
        self.noise = [Stream(f"noise-{n}", widths[0], r.dtype, store, text.tokens) for n, r in enumerate(setting.noise)]
        self.other = Stream(CANDIDATE, widths[1], wide, store, text.tokens)
        self._mine, self._theirs = OneLayer(reference, setting.device), OneLayer(candidate, setting.device)

    @property
    def streams(self) -> list[Stream]:
        return [self.truth, *self.noise, self.other]

    @property
    def depth(self) -> int:
        return max(self.reference.layers, self.candidate.layers)

    @property
    def passes(self) -> float:
        """Units of work: tokens times passes over all layers, for the progress bar."""
        runs = 3 + len(self.noise) + (2 if self.setting.gradients else 0)
        return float(runs * self.text.tokens * self.depth)

    @property
    def state(self) -> dict[str, Any]:
        """What, beside the files of the streams, has to be known to go on."""
        return {"together": self.together, "turns": [stream.turn for stream in self.streams]}

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self.together = state["together"]
        for stream, turn in zip(self.streams, state["turns"], strict=True):
            stream.turn = turn

    def embed(self) -> None:
        """The input of layer 0, on all sides."""
        ids = [token for sequence in self.text.ids for token in sequence]
        tables = [Matrix(side.view.tensors[TABLE]) for side in (self.reference, self.candidate)]
        for batch in self.batches:
            rows, tokens = batch.rows, ids[batch.rows]
            mine, theirs = (table.pick(tokens).float() for table in tables)
            for stream in (self.truth, *self.noise):
                stream.now.write(rows, mine)
            self.other.now.write(rows, theirs)
            self.together &= torch.equal(mine, theirs)

    @torch.no_grad()
    def step(self, index: int, advance: Advance) -> LayerFigures:
        """Takes all streams through layer `index`."""
        noise: dict[str, dict[str, float]] = {}
        own_noise: dict[str, float] = {}
        own: dict[str, float] = {}
        accumulated: dict[str, float] = {}
        gradients: tuple[Gradients, ...] = ()
        both = index < min(self.reference.layers, self.candidate.layers)
        if index < self.reference.layers:
            self._mine.fill(index)
            self._run_truth(advance)
            if both:
                gradients += self._gradients(self._mine, index, advance)
            self._mine.cast(getattr(torch, self.setting.dtype))
            noise, own_noise = self._run_noise(advance)
            if both:
                gradients += self._gradients(self._mine, index, advance)
            self._mine.free()
        if index < self.candidate.layers:
            self._theirs.fill(index)
            own, accumulated = self._run_candidate(index, both, advance)
            if both:
                gradients += self._gradients(self._theirs, index, advance)
            self._theirs.free()
        self._turn(index)
        truth, rounded, found = gradients if gradients else ({}, {}, {})
        return LayerFigures(
            index=index,
            own=own,
            accumulated=accumulated,
            own_noise=own_noise,
            noise=noise,
            gradients=gradient_errors(found, truth),
            gradient_noise=gradient_errors(rounded, truth),
        )

    def _turn(self, index: int) -> None:
        """A side that has no such layer keeps its hidden states."""
        if index < self.reference.layers:
            for stream in (self.truth, *self.noise):
                stream.turn = 1 - stream.turn
        if index < self.candidate.layers:
            self.other.turn = 1 - self.other.turn

    def _run_truth(self, advance: Advance) -> None:
        for batch in self.batches:
            for part, values in self._mine.run(batch, self.truth.now.read(batch.rows)).items():
                self._truth_rows(part).write(batch.rows, values)
            advance(batch.tokens)

    def _truth_rows(self, part: str) -> Rows:
        """Where the truth's output of one part is kept until the other runs have been compared with it."""
        if part == "output":
            return self.truth.next
        shape = self.reference.view.geometry
        heads = {"q": shape.num_attention_heads, "k": shape.num_key_value_heads, "v": shape.num_key_value_heads}
        width = shape.head_dim * heads[part] if part in heads else self.truth.width
        return self.store.rows(f"seen-{part}", self.text.tokens, width, torch.float32)

    def _compare(self, tally: Tally, batch: Batch, found: Outputs) -> bool:
        """Adds a batch's errors; returns whether there are none."""
        same = [tally.add(part, values, self._truth_rows(part).read(batch.rows)) for part, values in found.items()]
        return all(same)

    def _run_noise(self, advance: Advance) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        """(accumulated noise by run, noise of this layer alone)."""
        found = {}
        for stream, run in zip(self.noise, self.setting.noise, strict=True):
            tally = Tally()
            for batch in run.batches(self.text):
                outputs = self._mine.run(batch, stream.now.read(batch.rows), run.attention)
                self._compare(tally, batch, outputs)
                stream.next.write(batch.rows, outputs["output"])
                advance(batch.tokens)
            found[run.name] = tally.errors
        first, tally = self.setting.noise[0], Tally()
        for batch in first_tokens(self.batches):
            x = self.truth.now.read(batch.rows).to(first.dtype)
            self._compare(tally, batch, self._mine.run(batch, x, first.attention))
        return found, tally.errors

    def _run_candidate(self, index: int, both: bool, advance: Advance) -> tuple[dict[str, float], dict[str, float]]:
        """(own errors, accumulated errors)."""
        together, same = self.together and both, True
        accumulated, own = Tally(), Tally()
        alone = both and not together and index not in self.setting.identical
        for batch in self.batches:
            outputs = self._theirs.run(batch, self.other.now.read(batch.rows))
            if both:
                same &= self._compare(accumulated, batch, outputs)
            self.other.next.write(batch.rows, outputs["output"])
            if alone:
                self._compare(own, batch, self._theirs.run(batch, self.truth.now.read(batch.rows)))
            advance(2 * batch.tokens)
        grown = accumulated.errors
        self.together = together and same
        if not both:
            return {}, {}
        if together:
            return grown, grown
        return (own.errors if alone else dict.fromkeys(grown, 0.0)), grown

    def _gradients(self, layer: OneLayer, index: int, advance: Advance) -> tuple[Gradients, ...]:
        if not self.setting.gradients:
            return ()
        chosen = first_tokens(self.batches, GradientInput.TOKENS)
        inputs = GradientInput(index, [(batch, self.truth.now.read(batch.rows)) for batch in chosen])
        found = layer_gradients(layer, inputs)
        advance(2 * self.text.tokens / 3)
        return (found,)


def same_layers(names: Iterable[str], identical: Iterable[str]) -> frozenset[int]:
    """Layers all of whose tensors (of the `names` there are) are among the `identical`."""
    same, left = set(identical), set()
    layers = set()
    for name in names:
        if name.startswith("model.layers."):
            index = int(name.split(".")[2])
            layers.add(index)
            if name not in same:
                left.add(index)
    return frozenset(layers - left)
