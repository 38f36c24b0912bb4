"""The numbers of a checkpoint's biases, read with numpy: 0.4 MB for a 7B, a few milliseconds, no torch.

Names and shapes cannot tell a trained bias from the zeros that a reader filled in and a writer saved, so the biases of
every checkpoint that is on this machine are read, also where nobody asked for values. Of one on the Hub only the
headers are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.geometry import Geometry
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.checkpoint.inventory import BIAS_NAME
from qwen2tool.checkpoint.values import Stats
from qwen2tool.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vector = npt.NDArray[np.float64]
    Vectors = dict[int, dict[str, Vector]]
"""Layer -> projection ("q", "k", "v", "o", ...) -> its bias."""

BIAS_DTYPES = ("F16", "BF16", "F32", "F64")
"""What every reader can add; quantised formats keep biases so."""
MOST_NUMBERS = 1 << 24
"""A bias is a vector of a layer's width; what claims to be larger is no bias."""


def read_biases(checkpoint: Checkpoint) -> Vectors | None:
    """Every bias of a layer's projections in float64; None where only headers are known.

    Left out are those that are no plain vector of floating-point numbers: the inventory speaks of them.

    Raises:
        UserError: a file ends inside a bias.
    """
    if checkpoint.commit is not None:
        return None
    found: Vectors = {}
    for name, info in checkpoint.tensors.items():
        match = BIAS_NAME.fullmatch(name)
        if match and info.dtype in BIAS_DTYPES and len(info.shape) == 1 and info.numel <= MOST_NUMBERS:
            found.setdefault(int(match[1]), {})[match[2]] = read_vector(info)
    if checkpoint.format == "gguf" and checkpoint.geometry.model_type == "llama":
        for row in found.values():
            _unpermute(row, checkpoint.geometry)
    return dict(sorted(found.items()))


def _unpermute(row: dict[str, Vector], shape: Geometry) -> None:
    """llama.cpp stores a llama's q and k with the two halves of a pair next to each other; back to halves of a head."""
    for projection, heads in (("q", shape.num_attention_heads), ("k", shape.num_key_value_heads)):
        vector = row.get(projection)
        if vector is not None and vector.size == heads * shape.head_dim and shape.head_dim % 2 == 0:
            row[projection] = vector.reshape(heads, shape.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def read_vector(info: TensorInfo) -> Vector:
    """The numbers at `info`, one of `BIAS_DTYPES`, flat and in float64.

    Raises:
        UserError: the file ends inside it.
    """
    import numpy as np

    with info.file.open("rb") as handle:
        handle.seek(info.start)
        data = handle.read(info.nbytes)
    if len(data) != info.nbytes:
        raise UserError(f"{info.file}: ends inside tensor {info.name}", "Copy the file again: it is damaged")
    if info.dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    kind = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[info.dtype]
    return np.frombuffer(data, kind).astype(np.float64)


def stats_of(vector: Vector) -> Stats:
    """The statistics of one bias, as `values.measure_tensor` has them of any tensor."""
    import numpy as np

    finite = vector[np.isfinite(vector)]
    largest = float(np.abs(finite).max(initial=0.0))
    scale = largest or 1.0
    return Stats(
        numel=vector.size,
        l2=scale * float(np.linalg.norm(finite / scale)),
        max_abs=largest,
        zeros=int((vector == 0).sum()),
        nan=int(np.isnan(vector).sum()),
        inf=int(np.isinf(vector).sum()),
    )


def bias_name(layer: int, projection: str) -> str:
    room = "self_attn" if projection in ("q", "k", "v", "o") else "mlp"
    return f"model.layers.{layer}.{room}.{projection}_proj.bias"


def stats_by_layer(vectors: Mapping[int, Mapping[str, Vector]]) -> dict[int, dict[str, Stats]]:
    return {layer: {p: stats_of(vector) for p, vector in row.items()} for layer, row in vectors.items()}
