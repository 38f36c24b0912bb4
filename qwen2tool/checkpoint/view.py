"""The Qwen2 that a checkpoint holds, whatever it is stored as: names, shapes and dtypes now, numbers when asked.

A `Checkpoint` is files. A `View` is the model in them under transformers' Qwen2 names: read from Llama's layout, from
packed 4-bit weights, from GGUF, or from a base and its adapters. Nothing is computed before a tensor is read, one at a
time, so a view of a 72B costs its headers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.geometry import Config, Geometry
from qwen2tool.checkpoint.header import ITEM_BYTES, TensorInfo

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Derived:
    """A tensor that is computed from stored ones: dequantised, split, permuted, or a sum.

    `dtype` (safetensors' name) and `shape` are those of what `compute` returns: a contiguous CPU tensor. `sources` are
    the stored tensors that it reads. `rows` computes only those rows (a slice with both ends), where that can be.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[TensorInfo, ...]
    compute: Callable[[], torch.Tensor]
    rows: Callable[[slice], torch.Tensor] | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, not on disk."""
        return self.numel * ITEM_BYTES[self.dtype]


AnyTensor = TensorInfo | Derived


@dataclass(frozen=True, kw_only=True)
class View:
    """A model under Qwen2's names, in the order of its layers.

    `config` and `geometry` are those of the Qwen2 (model_type "qwen2", no quantization_config), both spellings in
    place. `kind` says in a few words what it is read from; `lossy` says in a sentence what reading it cannot bring
    back, or is empty.
    """

    origin: Checkpoint
    config: Config
    geometry: Geometry
    tensors: Mapping[str, AnyTensor]
    kind: str
    lossy: str = ""

    @property
    def path(self) -> Path:
        return self.origin.path

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read(tensor: AnyTensor) -> torch.Tensor:
    """The numbers of a stored or derived tensor, on the CPU, contiguous, in memory of their own.

    Raises:
        UserError: a file that ends early, or a dtype that torch does not have.
    """
    if isinstance(tensor, Derived):
        return tensor.compute()
    from qwen2tool.checkpoint.reader import read_tensor

    return read_tensor(tensor)


def read_blocks(tensor: AnyTensor, max_elements: int) -> Iterator[torch.Tensor]:
    """The numbers of a tensor, block by block as `reader.row_slices` cuts it: one block of it in memory at a time.

    Of what can only be computed whole, all is.
    """
    from qwen2tool.checkpoint.reader import read_tensor, row_slices, rows_of

    slices = row_slices(tensor.shape, max_elements)
    if isinstance(tensor, TensorInfo):
        yield from (read_tensor(rows_of(tensor, rows)) for rows in slices)
    elif tensor.rows is None or len(slices) == 1:
        whole = read(tensor)
        yield from (whole[rows] for rows in slices)
    else:
        yield from map(tensor.rows, slices)


def plain_view(checkpoint: Checkpoint) -> View:
    """The view of a checkpoint that is stored as a Qwen2 already: its own tensors, its own config."""
    return View(
        origin=checkpoint,
        config=checkpoint.config,
        geometry=checkpoint.geometry,
        tensors=checkpoint.tensors,
        kind="qwen2",
    )
