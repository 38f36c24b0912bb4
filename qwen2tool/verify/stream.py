"""What a comparison layer by layer keeps of a text: its tokens in batches, and hidden states in memory or on disk.

All sequences stand one after the other, the shortest first, so that neighbours fit into one batch with little padding:
token t of the text is row t of every `Rows`. Behind a shorter sequence padding is harmless, since attention is causal;
before it, it needs a mask and positions, which makes another computation of the same function (see `noise`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch

from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.checkpoint.view import AnyTensor, read
from qwen2tool.data.samples import Sample

BATCH_TOKENS = 1024
MOST_PADDING = 0.15
"""Share of a batch; a tiny model is bound by calls, a large one by arithmetic, and padding costs the latter."""
MEMORY_BUDGET = 1 << 28
"""Bytes of hidden states that stay in memory: all those of 4,096 tokens of a 0.5B, none to speak of of a 72B."""

SMALL_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Consecutive sequences: `rows` in the text, their `lengths`, and on which side they are padded."""

    rows: slice
    lengths: tuple[int, ...]
    left: bool = False

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def there(self) -> torch.Tensor:
        """(B, T) where a token is, and no padding."""
        lengths, most = torch.tensor(self.lengths)[:, None], max(self.lengths)
        columns = torch.arange(most)[None]
        return columns >= most - lengths if self.left else columns < lengths

    def pad(self, rows: torch.Tensor) -> torch.Tensor:
        """(N, W) -> (B, T, W), zeros as padding."""
        if len(set(self.lengths)) == 1:
            return rows.view(len(self.lengths), -1, rows.shape[-1])
        padded = rows.new_zeros(len(self.lengths), max(self.lengths), rows.shape[-1])
        padded[self.there.to(rows.device)] = rows
        return padded

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """(B, T, W) -> (N, W)."""
        if len(set(self.lengths)) == 1:
            return padded.reshape(-1, padded.shape[-1])
        return padded[self.there.to(padded.device)]


@dataclass(frozen=True, kw_only=True)
class Text:
    """Tokenised sequences, the shortest first, with what is scored in them.

    Attributes:
        ids: one tuple of token ids a sequence.
        rows: (N,) the rows whose prediction counts.
        targets: (N,) the tokens that come next there.
    """

    ids: tuple[tuple[int, ...], ...]
    rows: torch.Tensor
    targets: torch.Tensor

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))

    def batches(self, most: int = BATCH_TOKENS, left: bool = False) -> list[Batch]:
        """Neighbours together, up to `most` tokens with their padding, and no more than `MOST_PADDING` of it."""
        found: list[Batch] = []
        lengths: list[int] = []
        start = 0
        for length in map(len, self.ids):
            size = (len(lengths) + 1) * length  # ascending: the last is the longest
            if lengths and (size > most or size - sum(lengths) - length > MOST_PADDING * size):
                found.append(_batch(start, lengths, left))
                start, lengths = found[-1].rows.stop, []
            lengths.append(length)
        return [*found, _batch(start, lengths, left)] if lengths else []


def _batch(start: int, lengths: Sequence[int], left: bool) -> Batch:
    return Batch(rows=slice(start, start + sum(lengths)), lengths=tuple(lengths), left=left)


def text_of(samples: Sequence[Sample]) -> Text:
    """The samples in order of length."""
    ordered = sorted(samples, key=lambda sample: len(sample.ids))
    rows: list[int] = []
    targets: list[int] = []
    start = 0
    for sample in ordered:
        scored = [t for t, counts in enumerate(sample.scored[1:]) if counts]
        rows += [start + t for t in scored]
        targets += [sample.ids[t + 1] for t in scored]
        start += len(sample.ids)
    return Text(
        ids=tuple(sample.ids for sample in ordered),
        rows=torch.tensor(rows, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
    )


class Rows:
    """(count, width) numbers: in memory, or in a file that is read and written in slices.

    A file is read, not mapped: pages of a mapping would count as this process's memory.
    """

    def __init__(self, count: int, width: int, dtype: torch.dtype, handle: IO[bytes] | None = None) -> None:
        self.count, self.width, self.dtype = count, width, dtype
        self._handle = handle
        self._values = torch.empty(count, width, dtype=dtype) if handle is None else torch.empty(0)

    @property
    def _row_bytes(self) -> int:
        return int(self.width * self.dtype.itemsize)

    def write(self, rows: slice, values: torch.Tensor) -> None:
        """Sets consecutive rows; `values` is (n, width) on any device, and is cast."""
        if self._handle is None:
            self._values[rows] = values.to(self.dtype).cpu()
            return
        data = values.detach().to("cpu", self.dtype).contiguous().view(-1).view(torch.uint8).numpy().data
        written = os.pwrite(self._handle.fileno(), data, rows.start * self._row_bytes)
        if written != len(data):
            raise OSError(f"{self._handle.name}: {written} of {len(data)} bytes were written")

    def read(self, rows: slice) -> torch.Tensor:
        """Consecutive rows, (n, width) on the CPU."""
        if self._handle is None:
            return self._values[rows]
        size = (rows.stop - rows.start) * self._row_bytes
        data = bytearray(os.pread(self._handle.fileno(), size, rows.start * self._row_bytes))
        return torch.frombuffer(data, dtype=self.dtype).view(-1, self.width)

    def pick(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, width): single rows."""
        if self._handle is None:
            return self._values[rows]
        return torch.cat([self.read(slice(row, row + 1)) for row in rows.tolist()])


class Store:
    """Hands out `Rows` by name: in memory until `budget` is spent, in files from then on (always in `folder`, if any).

    A name keeps its numbers between calls, and in `folder` between processes.
    """

    def __init__(self, folder: Path | None = None, budget: int = MEMORY_BUDGET) -> None:
        self.folder, self._left = folder, budget
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._known: dict[str, Rows] = {}

    def rows(self, name: str, count: int, width: int, dtype: torch.dtype) -> Rows:
        """The rows of that name, made (or made anew) where there are none of this size."""
        known = self._known.get(name)
        if known is None or (known.count, known.width, known.dtype) != (count, width, dtype):
            self._known[name] = known = Rows(count, width, dtype, self._file(name, count * width * dtype.itemsize))
        return known

    def _file(self, name: str, size: int) -> IO[bytes] | None:
        if self.folder is None and size <= self._left:
            self._left -= size
            return None
        folder = self.folder or self._scratch()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.rows"
        handle = file.open("r+b" if file.is_file() else "w+b")
        handle.truncate(size)
        return handle

    def _scratch(self) -> Path:
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="qwen2tool-verify-")
        return Path(self._temporary.name)

    def close(self) -> None:
        """Closes the files; those outside `folder` are deleted."""
        for rows in self._known.values():
            if rows._handle is not None:
                rows._handle.close()
        if self._temporary is not None:
            self._temporary.cleanup()


class Matrix:
    """An embedding or a head, read in rows; one that is small, or computed, is read once and kept."""

    def __init__(self, tensor: AnyTensor) -> None:
        self._tensor = tensor
        stays = isinstance(tensor, TensorInfo) and tensor.nbytes > SMALL_BYTES
        self._whole = None if stays else read(tensor)

    @property
    def height(self) -> int:
        return self._tensor.shape[0]

    def block(self, rows: slice) -> torch.Tensor:
        """Consecutive rows, (n, W) as stored, on the CPU."""
        if not isinstance(self._tensor, TensorInfo) or self._whole is not None:
            assert self._whole is not None  # what is computed is kept
            return self._whole[rows]
        size = self._tensor.nbytes // self.height
        start = self._tensor.start + rows.start * size
        stop = self._tensor.start + min(rows.stop, self.height) * size
        height = (stop - start) // size
        return read(replace(self._tensor, shape=(height, *self._tensor.shape[1:]), start=start, end=stop))

    def pick(self, ids: Sequence[int]) -> torch.Tensor:
        """(n, W): a row an id; each row is read once."""
        distinct = sorted(set(ids))
        place = {token: number for number, token in enumerate(distinct)}
        rows = torch.cat([self.block(run) for run in _runs(distinct)])
        return rows[torch.tensor([place[token] for token in ids])]


def _runs(numbers: Sequence[int]) -> Iterator[slice]:
    """Ascending numbers as slices of neighbours."""
    start = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
            yield slice(numbers[start], numbers[end - 1] + 1)
            start = end
