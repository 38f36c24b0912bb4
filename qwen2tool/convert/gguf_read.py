"""The Qwen2 in a GGUF file, dequantised as it is read.

F32, F16 and BF16 tensors are plain: GGUF lists dimensions innermost first, so its bytes are row-major already. A block
type is fp32 after reading: each block is a scale (and for some an offset) times small integers, which the `gguf`
package multiplies out (Q8_0 is done here, to the same bits and faster); done for a few rows at a time, one tensor costs
its own fp32 size. What quantisation rounded away stays away, so such a view is `lossy`; biases and norms are F32 in
every file that llama.cpp writes, and exact.

Architecture "llama": llama.cpp turns neighbouring pairs (2i, 2i + 1) of a head in RoPE where transformers turns (i, i +
d/2), so its converter reorders the rows of q and k, weights and biases alike. The view has them back in transformers'
order; a reader that forgets the biases gets a model that looks whole and is not.

A tied head is no tensor. A quantiser may store the one table twice, in two types (`output.weight` in more bits): read
as it is, that is an untied model, the function that llama.cpp computes. `tie_head` makes it one table again.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.geometry import expected_tensors, geometry
from qwen2tool.checkpoint.header import DAMAGED, ITEM_BYTES, TensorInfo
from qwen2tool.checkpoint.view import AnyTensor, Derived, View, read
from qwen2tool.convert.gguf_pack import unpack_q8_0
from qwen2tool.errors import UserError

if TYPE_CHECKING:
    import torch

BLOCK_ELEMENTS = 1 << 18
"""Numbers that are dequantised at a time: 1 MB of fp32, which stays in the cache of a core."""
ROPE_ROWS = re.compile(r"model\.layers\.\d+\.self_attn\.([qk])_proj\.(?:weight|bias)")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SAMPLED_ROWS = 256
ONE_TABLE = 0.12
"""Two roundings of one table differ by less, relative to its norm (5 bits: 4 to 5 %, 4 bits: 7 to 9 %); an embedding
and a head that were trained apart differ by 140 %."""


def view_of_gguf(checkpoint: Checkpoint, *, tie_head: bool = False) -> View:
    """The model in a checkpoint that `open_gguf` opened, in the order of its layers; nothing is read before it is used.

    For `general.architecture` "llama" the view is in Llama's layout (config and names), rows in transformers' order.

    Args:
        tie_head: take `token_embd.weight` and `output.weight` for two roundings of one table and use the one in more
            bits for both; a few rows of each are read to make sure.

    Raises:
        UserError: metadata that is no text, a block type that the `gguf` package does not dequantise, a tensor that
            changes RoPE, or, with `tie_head`, two tables that are not one.
    """
    shape, tensors = checkpoint.geometry, dict(checkpoint.tensors)
    for key, why in checkpoint.damaged.items():
        raise UserError(f"{checkpoint.path}: {key}: {why.partition('; ')[0]}", DAMAGED)
    if "rope_freqs.weight" in tensors:
        raise UserError(
            f"{checkpoint.path}: rope_freqs.weight scales RoPE by frequency (Llama 3), which Qwen2 cannot say",
            "Use a GGUF file of a Qwen2 model",
        )
    config = checkpoint.config
    if tie_head and HEAD in tensors:
        tensors = _tied(checkpoint)
        config = config | {"tie_word_embeddings": True}
    heads = {"q": shape.num_attention_heads, "k": shape.num_key_value_heads}
    views: dict[str, AnyTensor] = {}
    order = [*filter(tensors.__contains__, expected_tensors(shape)), *tensors]
    for name in dict.fromkeys(order):
        views[name] = _plain(tensors[name])
        rope = ROPE_ROWS.fullmatch(name)
        if rope and shape.model_type == "llama":
            views[name] = _unpermuted(views[name], heads[rope[1]])
    kinds = _block_types(tensors)
    return View(
        origin=checkpoint,
        config=config,
        geometry=geometry(config),
        tensors=views,
        kind=f"GGUF ({', '.join(kinds or sorted({info.dtype for info in tensors.values()}))})",
        lossy=_lossy(kinds, tensors),
    )


def _block_types(tensors: dict[str, TensorInfo]) -> list[str]:
    return sorted({info.dtype for info in tensors.values() if info.dtype not in ITEM_BYTES})


def _lossy(kinds: list[str], tensors: dict[str, TensorInfo]) -> str:
    if not kinds:
        return ""
    rounded = sum(info.dtype in kinds for info in tensors.values())
    text = f"{rounded} of {len(tensors)} tensors were rounded to {', '.join(kinds)} when the GGUF file was made"
    biases = [info for name, info in tensors.items() if name.endswith(".bias")]
    exact = "; the biases are exact" if biases and all(info.dtype == "F32" for info in biases) else ""
    twice = (
        "; token_embd.weight and output.weight are separate tensors, the head is untied"
        if {EMBEDDING, HEAD} <= tensors.keys() and tensors[EMBEDDING].dtype != tensors[HEAD].dtype
        else ""
    )
    return text + exact + twice


def _plain(info: TensorInfo) -> AnyTensor:
    if info.dtype in ITEM_BYTES:
        return info
    _require_dequantiser(info)
    return Derived(
        name=info.name, dtype="F32", shape=info.shape, sources=(info,), compute=lambda: dequantised(info),
        rows=lambda rows: _rows(info, rows.start, rows.stop),
    )  # fmt: skip


def _require_dequantiser(info: TensorInfo) -> None:
    """One block of zeros through the package says whether it knows the type."""
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[info.dtype]
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        raise UserError(
            f"{info.file}: tensor {info.name} is {info.dtype}, which the installed gguf package does not dequantise",
            "Update the gguf package (pip install -U gguf), or use a file in another quantisation",
        ) from None


def dequantised(info: TensorInfo) -> torch.Tensor:
    """The numbers of a quantised tensor, fp32, a few rows at a time.

    Raises:
        UserError: the file ends early.
    """
    import torch

    out = torch.empty(info.shape, dtype=torch.float32)
    rows = out.view(-1, info.shape[-1])
    step = max(1, BLOCK_ELEMENTS // info.shape[-1])
    for first in range(0, len(rows), step):
        last = min(first + step, len(rows))
        rows[first:last] = _rows(info, first, last)
    return out


def _rows(info: TensorInfo, first: int, last: int) -> torch.Tensor:
    """Rows [first, last) of a tensor of a block type, as fp32."""
    import gguf
    import numpy as np
    import torch

    row_bytes = info.nbytes * info.shape[-1] // info.numel
    raw = np.empty((last - first, row_bytes), dtype=np.uint8)
    with info.file.open("rb") as handle:
        handle.seek(info.start + first * row_bytes)
        if handle.readinto(raw.data) != raw.nbytes:
            raise UserError(f"{info.file}: ends inside tensor {info.name}", "Copy the file again: it is damaged")
    if info.dtype == "Q8_0":
        return unpack_q8_0(torch.from_numpy(raw)).view(last - first, -1)
    numbers: Any = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[info.dtype])
    return torch.from_numpy(numbers)


def _unpermuted(tensor: AnyTensor, heads: int) -> Derived:
    """Rows of q or k (weight or bias) in transformers' order: row 2i + s of a head becomes row s d/2 + i."""
    if tensor.shape[0] % (2 * heads):
        raise UserError(
            f"tensor {tensor.name} has {tensor.shape[0]} rows, which {heads} heads do not share evenly",
            "Get the file again: its metadata do not belong to its tensors",
        )

    def compute() -> torch.Tensor:
        stored = read(tensor)
        pairs = stored.view(heads, -1, 2, *stored.shape[1:])
        return pairs.transpose(1, 2).reshape(stored.shape)

    sources = tensor.sources if isinstance(tensor, Derived) else (tensor,)
    return Derived(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, sources=sources, compute=compute)


def _tied(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """The tensors without a head: the embedding is the copy of the one table that has more bits."""
    import torch

    tensors = dict(checkpoint.tensors)
    table, head = tensors[EMBEDDING], tensors.pop(HEAD)
    few, other = _sample(table), _sample(head)
    if table.shape != head.shape or torch.dist(few, other) > ONE_TABLE * other.norm():
        raise UserError(
            f"{checkpoint.path}: token_embd.weight and output.weight are not one table in two roundings",
            "Leave the head untied",
        )
    tensors[EMBEDDING] = replace(max(table, head, key=lambda info: info.nbytes), name=EMBEDDING)
    return tensors


def _sample(info: TensorInfo) -> torch.Tensor:
    """Rows from all over a matrix, as fp32."""
    import torch

    height, wanted = info.shape[0], min(info.shape[0], SAMPLED_ROWS)
    row_bytes = info.nbytes // height
    found = []
    for i in range(wanted):
        row = i * height // wanted
        start = info.start + row * row_bytes
        part = replace(info, shape=(1, *info.shape[1:]), start=start, end=start + row_bytes)
        found.append(read(_plain(part)).float())
    return torch.cat(found)
