"""What waits in the host's memory while the GPU computes: layer inputs, and gate and up of some layers.

Tensors travel on a stream of their own: out while the next layers compute, back while the layer above is in its
backward (67 MB for the input of a layer at 8192 tokens of a 7B, 363 MB for gate and up, beside 5 ms of compute in the
forward and 12 in the backward). Buffers are pinned, made once, and fixed in place, so that a captured graph may use
them. Tensors are held until their copy is done instead of being marked with `record_stream`, which would keep memory
from being reused inside a graph capture.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from typing import Any, NamedTuple

import torch


class Copied(NamedTuple):
    """A tensor on the device that is on its way from or to the host, on a stream beside the one that computes."""

    layer: int
    tensor: torch.Tensor
    done: torch.cuda.Event

    @classmethod
    def start(
        cls, stream: torch.cuda.Stream | None, layer: int, tensor: torch.Tensor, source: torch.Tensor, out: bool = False
    ) -> Copied:
        """Starts the copy of `source` into `tensor`, or of `tensor` `out` into `source`."""
        assert stream is not None
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            target, origin = (source, tensor) if out else (tensor, source)
            target.copy_(origin, non_blocking=True)
            done.record(stream)
        return cls(layer, tensor, done)

    def wait(self) -> None:
        """Lets the stream that computes wait for the copy."""
        torch.cuda.current_stream(self.tensor.device).wait_event(self.done)


class Ticket(NamedTuple):
    """What `put` returns and `take` wants: whose tensor it is, which of a layer's, of which pass, and its shape."""

    layer: int
    name: str
    number: int
    shape: torch.Size


def _release(memory: torch.Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]


def pinned(owner: object, size: int) -> torch.Tensor:
    """(size,) uint8, page-locked as long as `owner` lives.

    torch's own allocator has the driver touch page after page (8 s for the 9 GB of a 7B's batch, 16 cores), and
    rounds up to a power of two. Here all threads touch the pages, large ones, and the driver locks them then.
    """
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8).zero_()
    if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0)):  # type: ignore[no-untyped-call]
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    weakref.finalize(owner, _release, memory)
    return memory


class HostStore:
    """Pinned buffers for tensors of decoder layers, taken back in reverse order; one pass at a time."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, str], torch.Tensor] = {}
        self._outgrown: list[torch.Tensor] = []
        self._tickets: dict[int, dict[str, Ticket]] = {}
        self._stream: torch.cuda.Stream | None = None
        self._leaving: deque[Copied] = deque()
        self._arriving: dict[Ticket, Copied] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model begins with nothing."""
        return type(self), ()

    def put(self, index: int, name: str, x: torch.Tensor) -> Ticket:
        """Starts the copy of x (N, ...), the `name` of layer `index`."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
        before = self._tickets.get(index, {}).get(name)
        stale = self._arriving.pop(before, None) if before else None
        if stale is not None:  # fetched for a backward that ended above this layer
            stale.wait()
        ticket = Ticket(index, name, before.number + 1 if before else 0, x.shape)
        self._tickets.setdefault(index, {})[name] = ticket
        buffer = self._buffer(ticket, x.dtype)
        self._leaving.append(Copied.start(self._stream, index, x, buffer, out=True))
        return ticket

    def let_go(self, index: int) -> None:
        """Called at the end of every layer's forward: what layers before the last two put here is out by now, or is
        waited for, and its memory free."""
        while self._leaving and self._leaving[0].layer < index - 1:
            self._leaving.popleft().wait()

    def _buffer(self, ticket: Ticket, dtype: torch.dtype) -> torch.Tensor:
        """The first numbers of a flat buffer that has grown to the largest need so far."""
        key, size = (ticket.layer, ticket.name), ticket.shape.numel()
        flat = self._buffers.get(key)
        if flat is None or flat.dtype != dtype or len(flat) < size:
            if flat is not None:
                self._outgrown.append(flat)  # a captured graph may still copy to its address
            flat = self._buffers[key] = pinned(self, size * dtype.itemsize).view(dtype)
        return flat[:size].view(ticket.shape)

    def take(self, ticket: Ticket) -> torch.Tensor:
        """The tensor back on the GPU.

        Raises:
            RuntimeError: another pass has put its own tensor here in between.
        """
        if self._tickets[ticket.layer][ticket.name] != ticket:
            raise RuntimeError("a second forward pass came before the backward of the first: what it kept is gone")
        while self._leaving:
            self._leaving.popleft().wait()
        arrived = self._arriving.pop(ticket, None) or self._fetch(ticket)
        arrived.wait()
        return arrived.tensor

    def fetch_below(self, layer: int) -> None:
        """Starts the way back of what the layer below `layer` put here, while `layer` is in its backward."""
        while self._leaving:  # out by now; held on, they would add to the backward's peak
            self._leaving.popleft().wait()
        for below in self._tickets.get(layer - 1, {}).values():
            if below not in self._arriving:
                self._arriving[below] = self._fetch(below)

    def _fetch(self, ticket: Ticket) -> Copied:
        assert self._stream is not None
        source = self._buffers[ticket.layer, ticket.name][: ticket.shape.numel()].view(ticket.shape)
        x = torch.empty(ticket.shape, dtype=source.dtype, device=self._stream.device)
        return Copied.start(self._stream, ticket.layer, x, source)
