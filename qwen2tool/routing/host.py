"""What waits in the host's memory while the GPU computes: layer inputs, and gate and up of some layers.

Tensors travel on a stream of their own: out while the next layers compute, back while the layer above (for gate and up
the two above) is in its backward (67 MB for the input of a layer at 8192 tokens of a 7B, 363 MB for gate and up, beside
5 ms of compute in the forward and 12 in the backward). Buffers are pinned, made once, and fixed in place, so that a
captured graph may use them. Tensors are held until their copy is done instead of being marked with `record_stream`,
which would keep memory from being reused inside a graph capture.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

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


MADV_HUGEPAGE, MADV_WIPEONFORK = 14, 18
"""Linux's; Python names them where it was built with them."""


class _Pages(mmap.mmap):
    """Anonymous memory; what the driver has locked of it is let go before it goes, by the process that locked it.

    What the driver does not let go of is kept: it would go on copying to those pages, whoever is given their address.
    """

    unlock: Callable[[], int] | None = None
    owner: int = 0
    kept: ClassVar[list[_Pages]] = []

    def __del__(self, getpid: Callable[[], int] = os.getpid) -> None:
        if self.unlock is not None and self.owner == getpid() and int(self.unlock()):
            self.kept.append(self)


def pinned(size: int) -> torch.Tensor:
    """(size,) uint8, page-locked as long as it lives.

    torch's own allocator has the driver touch page after page and rounds up to a power of two. Here all threads touch
    the pages, and the driver locks them then. Large pages need memory that is private to the process, and a fork must
    not come between it and the device: a child gets the place with none of the pages, and reads zeros there.
    """
    pages = _Pages(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in (MADV_HUGEPAGE, MADV_WIPEONFORK):
        with suppress(OSError):  # a kernel without it
            pages.madvise(advice)
    memory = torch.frombuffer(pages, dtype=torch.uint8).zero_()
    driver = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(driver.cudaHostRegister(memory.data_ptr(), size, 0)):
        with suppress(RuntimeError):  # the refusal is reported once more, by the next launch
            torch.zeros(1, device="cuda")
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    # Bound now: as the interpreter ends, the last memory goes after the names of modules.
    pages.unlock, pages.owner = partial(driver.cudaHostUnregister, memory.data_ptr()), os.getpid()
    return memory


ALIGNMENT = 256
"""Bytes; where one tensor begins behind another."""


class Homes(NamedTuple):
    """Pinned places for tensors, side by side in one block."""

    block: torch.Tensor
    places: list[torch.Tensor]
    """Each of its tensor's dtype and shape, contiguous."""

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> Homes:
        """Places as large as `tensors`; nothing is copied."""
        begins = list(accumulate((-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors), initial=0))
        block = pinned(begins[-1])
        parts = [block[begin : begin + t.nbytes] for begin, t in zip(begins[:-1], tensors, strict=True)]
        return cls(block, [part.view(t.dtype).view(t.shape) for part, t in zip(parts, tensors, strict=True)])


LAG = 3
"""Layers whose copies to the host may be under way when a forward goes on to the next: gate and up of a GQA model take
the bus as long as two to three layers take. `memory.peak` counts them."""
FETCHED_EARLY = frozenset({"gate_up"})
"""What comes back from two layers below, by name."""


class HostStore:
    """Pinned buffers for tensors of decoder layers, taken back in reverse order; one pass at a time."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, str], torch.Tensor] = {}
        self._outgrown: list[torch.Tensor] = []
        self._tickets: dict[int, dict[str, Ticket]] = {}
        self._stream: torch.cuda.Stream | None = None
        self._leaving: deque[Copied] = deque()
        self._arriving: dict[Ticket, Copied] = {}
        self._pass = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model begins with nothing."""
        return type(self), ()

    def begin(self) -> None:
        """Called before a forward. What a pass that ended early left under way is not relied on: a capture may not wait
        for what began outside of it, and begins with nothing under way."""
        if (self._leaving or self._arriving) and not torch.cuda.is_current_stream_capturing():
            assert self._stream is not None
            self._stream.synchronize()
        self._leaving.clear()
        self._arriving.clear()
        self._pass += 1

    def put(self, index: int, name: str, x: torch.Tensor) -> Ticket:
        """Starts the copy of x (N, ...), the `name` of layer `index`."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
        ticket = Ticket(index, name, self._pass, x.shape)
        self._tickets.setdefault(index, {})[name] = ticket
        buffer = self._buffer(ticket, x.dtype)
        self._leaving.append(Copied.start(self._stream, index, x, buffer, out=True))
        return ticket

    def let_go(self, index: int) -> None:
        """Called at the end of every layer's forward: what layers before the last LAG put here is out by now, or is
        waited for, and its memory free."""
        while self._leaving and self._leaving[0].layer <= index - LAG:
            self._leaving.popleft().wait()

    def _buffer(self, ticket: Ticket, dtype: torch.dtype) -> torch.Tensor:
        """The first numbers of a flat buffer that has grown to the largest need so far."""
        key, size = (ticket.layer, ticket.name), ticket.shape.numel()
        flat = self._buffers.get(key)
        if flat is None or flat.dtype != dtype or len(flat) < size:
            if flat is not None:
                self._outgrown.append(flat)  # a captured graph may still copy to its address
            flat = self._buffers[key] = pinned(size * dtype.itemsize).view(dtype)
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
        """Starts the way back of what the layer below `layer` put here, while `layer` is in its backward, and then of
        what is large and two layers below: it may take the bus longer than one layer takes."""
        while self._leaving:  # out by now; held on, they would add to the backward's peak
            self._leaving.popleft().wait()
        below, further = (self._tickets.get(layer - distance, {}) for distance in (1, 2))
        for ticket in (*below.values(), *(ticket for name, ticket in further.items() if name in FETCHED_EARLY)):
            if ticket.number == self._pass and ticket not in self._arriving:
                self._arriving[ticket] = self._fetch(ticket)

    def _fetch(self, ticket: Ticket) -> Copied:
        assert self._stream is not None
        source = self._buffers[ticket.layer, ticket.name][: ticket.shape.numel()].view(ticket.shape)
        x = torch.empty(ticket.shape, dtype=source.dtype, device=self._stream.device)
        return Copied.start(self._stream, ticket.layer, x, source)
