"""Forward and backward of one batch, eagerly or replayed from a CUDA graph; gradients add up in the parameters.

A small step is bound by launches (4,000 of them at 7B): captured once, they are replayed in one. A graph fits one set
of shapes and reads its inputs from fixed tensors, so batches are filled up to few shapes (`batches.fill_up`). A shape
is captured when it comes a second time. Its first time is its warm-up: loading a kernel is refused inside a capture,
and a capture that broke off leaves torch's allocator and generator stuck in it. Nothing inside reads the host:
dropout's seed is drawn on the device, and the number that the loss is divided by is a tensor. The eager path runs the
same kernels in the same order: the same bits.

Memory: warm-ups and captures run on one stream and from one pool, never at once, so all of them together hold what the
largest of them needs, and not that of a warm-up beside that of the graphs. What a pool was given it keeps, and what is
free in it is written to by the next replay: an outcome is copied out, and where a warm-up left something there that
lives on (weights kept unpacked, say), the graphs that were captured before it go. Python's cyclic collector waits while
memory comes from a pool: an earlier trainer that it found then would take its own graphs and pool with it, which a
capture refuses and torch's allocator answers by ending the process.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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


class _Workshop(NamedTuple):
    stream: torch.cuda.Stream
    pool: torch.cuda.MemPool


@contextmanager
def _collector_waits() -> Iterator[None]:
    """No automatic garbage collection inside; afterwards as before."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Passes:
    """Runs `loss` forward and backward.

    Args:
        loss: see Loss; it is called under `context`.
        parameters: those that get gradients. With graphs they keep one gradient tensor each from the start.
        context: makes the context manager of the forward (autocast).
        graphs: capture on CUDA.
        scale: what is done to the loss before its backward (fp16's loss scaling).
        ready: whether passes may be captured yet. A replay allocates nothing that torch counts: a capture that comes
            after all that stays (the optimizer's state, say) leaves a peak that holds both.
        reserve: bytes that the pool takes in one piece before the first pass. Blocks of one shape seldom fit another,
            so that a pool left to itself grows with every larger shape; pieces cut from one block grow together again.
    """

    def __init__(
        self,
        loss: Loss,
        parameters: list[torch.nn.Parameter],
        context: Callable[[], Any],
        *,
        graphs: bool,
        scale: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
        ready: Callable[[], bool] = lambda: True,
        reserve: int = 0,
    ) -> None:
        self._loss, self._parameters, self._context, self._graphs = loss, parameters, context, graphs
        self._scale, self._ready, self._reserve = scale, ready, reserve
        self._seen: set[tuple[Any, ...]] = set()
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        self._workshop: _Workshop | None = None
        self._gradients: list[torch.Tensor] = []

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return len(self._captured)

    def forget(self) -> None:
        """Every shape comes for the first time again."""
        self._seen.clear()
        self._captured.clear()

    def __call__(self, batch: Batch) -> Outcome:
        """One pass; the outcome is the caller's."""
        if not self._graphs:
            return self._run(batch)
        self._fix_gradients()
        shape = tuple((n, v.shape, v.dtype) if torch.is_tensor(v) else (n, v) for n, v in sorted(batch.items()))
        if shape not in self._seen or not self._ready():
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
        # In this thread: a pool serves the thread that asked for it, and another one would launch through a cuBLAS
        # handle of its own, with 34 MB of workspace.
        with safe_attention(), torch.autograd.set_multithreading_enabled(False):
            with self._context():
                outcome = self._loss(batch)
            self._scale(outcome["loss"]).backward()  # type: ignore[no-untyped-call]
        return {name: value.detach() for name, value in outcome.items()}

    @_collector_waits()
    def _warm_up(self, batch: Batch) -> Outcome:
        """A shape's first pass, eagerly: kernels are compiled and loaded, libraries set up their workspaces."""
        torch.cuda.empty_cache()  # while a pool is in use the allocator does not, not even for want of memory
        stream, pool = self._workshop or self._set_up(batch)
        before = _held(pool)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.cuda.use_mem_pool(pool):
            outcome = self._run(batch)
        torch.cuda.current_stream().wait_stream(stream)
        copied = {name: value.clone() for name, value in outcome.items()}
        del outcome
        if _held(pool) > before:
            self._captured.clear()
        return copied

    def _set_up(self, batch: Batch) -> _Workshop:
        """One stream for all: what the allocator holds for a stream serves no other."""
        stream, pool = torch.cuda.Stream(), torch.cuda.MemPool()  # type: ignore[no-untyped-call]
        if self._reserve:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # What is made once and lives on (cuBLAS's workspace, weights kept unpacked) is made out here: inside
                # the one block it would hold all of it beyond the last pass.
                devices = [torch.cuda.current_device()]
                with torch.random.fork_rng(devices), torch.no_grad(), safe_attention(), self._context():
                    self._loss(batch)
                torch.cuda.empty_cache()
                with torch.cuda.use_mem_pool(pool):
                    torch.empty(self._reserve, dtype=torch.uint8, device="cuda")
            torch.cuda.current_stream().wait_stream(stream)
        self._workshop = _Workshop(stream, pool)
        return self._workshop

    @_collector_waits()
    def _capture(self, shape: tuple[Any, ...], batch: Batch) -> _Captured:
        """Records a pass without running it."""
        assert self._workshop is not None, "a warm-up comes first"
        stream, pool = self._workshop
        inputs = {name: value.clone() for name, value in batch.items() if torch.is_tensor(value)}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool.id, stream=stream):  # type: ignore[arg-type]
            outcome = self._run({**batch, **inputs})
        self._captured[shape] = _Captured(graph, inputs, outcome)
        return self._captured[shape]


def _held(pool: torch.cuda.MemPool) -> int:
    """Bytes of a pool that something lives in."""
    return sum(segment["allocated_size"] for segment in pool.snapshot())  # type: ignore[no-untyped-call]
