"""Forward and backward of one batch, eagerly or replayed from a CUDA graph; gradients add up in the parameters.

A small step is bound by launches (4,000 of them at 7B): captured once, they are replayed in one. A graph fits one set
of shapes and reads its inputs from fixed tensors, so batches are filled up to few shapes (`batches.fill_up`); a shape
is captured when it comes a second time. Nothing inside reads the host: dropout's seed is drawn on the device, and the
number that the loss is divided by is a tensor. The eager path runs the same kernels in the same order: the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from qwen2tool.routing.attention import safe_attention

Batch = Mapping[str, Any]
Outcome = dict[str, torch.Tensor]
"""What a pass reports, among it "loss", a scalar; all detached."""

Loss = Callable[[Batch], Outcome]
"""From a batch on the device to its outcome, "loss" with a gradient."""


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, torch.Tensor]
    outcome: Outcome


class Passes:
    """Runs `loss` forward and backward.

    Args:
        loss: see Loss; it is called under `context`.
        parameters: those that get gradients. With graphs they keep one gradient tensor each from the start.
        context: makes the context manager of the forward (autocast).
        graphs: capture on CUDA.
        scale: what is done to the loss before its backward (fp16's loss scaling).
    """

    def __init__(
        self,
        loss: Loss,
        parameters: list[torch.nn.Parameter],
        context: Callable[[], Any],
        *,
        graphs: bool,
        scale: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
    ) -> None:
        self._loss, self._parameters, self._context, self._graphs = loss, parameters, context, graphs
        self._scale = scale
        self._seen: set[tuple[Any, ...]] = set()
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._gradients: list[torch.Tensor] = []

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return len(self._captured)

    def __call__(self, batch: Batch) -> Outcome:
        """One pass; the outcome is the caller's."""
        if not self._graphs:
            return self._run(batch)
        self._fix_gradients()
        shape = tuple((n, v.shape, v.dtype) if torch.is_tensor(v) else (n, v) for n, v in sorted(batch.items()))
        if shape not in self._seen:
            outcome = self._warm_up(batch)
            self._seen.add(shape)
            return outcome
        captured = self._captured.get(shape) or self._capture(shape, batch)
        for name, tensor in captured.inputs.items():
            tensor.copy_(batch[name], non_blocking=True)
        captured.graph.replay()
        return {name: value.clone() for name, value in captured.outcome.items()}

    def _fix_gradients(self) -> None:
        """Gradients stay in the tensors that graphs write to; one that was set to None starts again from zero."""
        if not self._gradients:
            self._gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
        pairs = zip(self._parameters, self._gradients, strict=True)
        stale = [(parameter, gradient) for parameter, gradient in pairs if parameter.grad is not gradient]
        if stale:
            torch._foreach_zero_([gradient for _, gradient in stale])
        for parameter, gradient in stale:
            parameter.grad = gradient

    def _run(self, batch: Batch) -> Outcome:
        with safe_attention():
            with self._context():
                outcome = self._loss(batch)
            self._scale(outcome["loss"]).backward()  # type: ignore[no-untyped-call]
        return {name: value.detach() for name, value in outcome.items()}

    def _warm_up(self, batch: Batch) -> Outcome:
        """On a side stream, as capture wants it: libraries set up their workspaces here."""
        stream = self._side_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outcome = self._run(batch)
        torch.cuda.current_stream().wait_stream(stream)
        return outcome

    def _side_stream(self) -> torch.cuda.Stream:
        """One for all: what the allocator holds for a stream serves no other."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        return self._stream

    def _capture(self, shape: tuple[Any, ...], batch: Batch) -> _Captured:
        """Records a pass without running it; all graphs share one pool of memory, since they never run at once."""
        inputs = {name: value.clone() for name, value in batch.items() if torch.is_tensor(value)}
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side_stream()):
            outcome = self._run({**batch, **inputs})
        self._pool = self._pool or graph.pool()
        self._captured[shape] = _Captured(graph, inputs, outcome)
        return self._captured[shape]
