"""bitsandbytes' packed checkpoints as a Qwen2 in 16 or 32 bit, and a Qwen2 as such a checkpoint.

Packed 4-bit weights (NF4, FP4, plain or double quantised) come back as the very numbers that bitsandbytes computes
with, in the dtype of their quant_state; LLM.int8() weights in fp32, which is what bitsandbytes makes of them. Biases
and norms are not packed, and stay the bytes they are. What no conversion brings back are the weights before they were
rounded to 4 bits: `View.lossy` says so.

The other way, `pack` gives the tensors that transformers saves for the same settings. NF4 -> 16-bit -> NF4 gives every
nibble back (of FP4's two zeros one), and the scales where they are plain. Double quantised scales are not: a scale is
its block's largest weight, which 16 bit rounds, and they are quantised around another mean. On a published 0.5B 1.1 %
of them move (at most 3 % of a tensor's, by at most 3 of 256 steps), and with them the weights by 0.2 %: a seventieth
of what packing did to them.

Cost: one weight at a time; see `nf4_codec` for speed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, BinaryIO

import torch

from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.geometry import Config, expected_tensors, geometry
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.checkpoint.raw import copy_tensor
from qwen2tool.checkpoint.reader import read_tensor, write_tensor
from qwen2tool.checkpoint.view import AnyTensor, Derived, View, read
from qwen2tool.checkpoint.writer import Slot
from qwen2tool.convert.nf4_codec import (
    BLOCK_SIZES,
    CODES,
    Packed,
    Packing,
    code_of,
    dequantise,
    dequantise_rows,
    parts_of,
    quantise,
    stored,
)
from qwen2tool.errors import EXIT_FINDING, UserError

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DTYPE_OF = {name: short for short, name in FLOATS.items()}
SCALES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
MOST_STATE_BYTES = 4096
MOST_OFFSET = 1e30
"""Beyond any mean of scales; NaN is not below it either."""
SAME_UPLOAD = "Download the checkpoint again: its parts do not belong together"


def view_of_packed(checkpoint: Checkpoint) -> View:
    """The model in a checkpoint that bitsandbytes packed; weights that it left in 16 bit stay stored tensors.

    The view holds what the files hold: whether a bias is missing is for the inventory to say. The architecture stays
    what config.json says (qwen2, or a llama with biases), without its quantization_config. Its dtype becomes float32
    where no 16-bit one holds every weight exactly.

    Raises:
        UserError: packed by something else, or parts of a packed weight are missing or do not fit each other.
    """
    method = _method(checkpoint)
    if method != "bitsandbytes":
        raise UserError(
            f"{checkpoint.path}: is quantised by {ascii(method)[:40]}, which is not dequantised here",
            "Use the 16-bit checkpoint that it was made from, or a bitsandbytes or GGUF copy",
        )
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    opened = {name: _open(checkpoint, name, _kind(checkpoint, name)) for name in checkpoint.tensors}
    packed = {name: tensor for name, tensor in opened.items() if isinstance(tensor, Derived)}
    parts = {part for name in packed for part in _part_names(name)}
    order = dict.fromkeys([*expected_tensors(geometry(config)), *opened])  # the layers' order, then what is left over
    kinds = " and ".join(sorted({_kind(checkpoint, name) for name in packed}))
    config = _with_dtype(config, list(packed.values()))
    return View(
        origin=checkpoint,
        config=config,
        geometry=geometry(config),
        tensors={name: opened[name] for name in order if name in opened and name not in parts},
        kind=f"bitsandbytes {kinds}" if kinds else "qwen2",
        lossy=f"the weights before they were rounded to {kinds} do not come back" if kinds else "",
    )


def _method(checkpoint: Checkpoint) -> object:
    """The quant_method of config.json; where it names none, as early savers did, what the tensors say."""
    config = checkpoint.geometry.quantization
    if config is None or config.get("quant_method") is not None:
        return "bitsandbytes" if config is None else config["quant_method"]
    return "bitsandbytes" if any(_kind(checkpoint, name) for name in checkpoint.tensors) else None


def _part_names(name: str) -> list[str]:
    """What bitsandbytes may store beside the packed weight `name`."""
    stem = name.removesuffix(".weight")
    states = [f"{name}.quant_state.bitsandbytes__{kind}" for kind in CODES]
    return [*states, *(name + suffix for suffix in SCALES), f"{stem}.SCB", f"{stem}.weight_format"]


def _kind(checkpoint: Checkpoint, name: str) -> str:
    """ "nf4", "fp4" or "int8" for a packed weight, "" for another tensor."""
    for quant_type in CODES:
        if f"{name}.quant_state.bitsandbytes__{quant_type}" in checkpoint.tensors:
            return quant_type
    return "int8" if name.endswith(".weight") and f"{name[:-7]}.SCB" in checkpoint.tensors else ""


def _open(checkpoint: Checkpoint, name: str, kind: str) -> AnyTensor:
    if not kind:
        return checkpoint.tensors[name]
    return (_eight_bit if kind == "int8" else _four_bit)(checkpoint, checkpoint.tensors[name], kind)


def _eight_bit(checkpoint: Checkpoint, info: TensorInfo, kind: str) -> Derived:
    stem, shape = info.name.removesuffix(".weight"), info.shape
    _require(checkpoint, info.name, info.dtype == "I8" and len(shape) == 2, f"is {info.dtype}, with the SCB of {kind}")
    row_max = _part(checkpoint, f"{stem}.SCB", tuple(FLOATS), shape[:1])
    layout = checkpoint.tensors.get(f"{stem}.weight_format")
    if layout is not None and (layout.nbytes != 1 or read_tensor(layout).item() != 0):
        raise UserError(f"{checkpoint.path}: {info.name} is stored in a GPU's own order", "Save it again by rows")
    return Derived(
        name=info.name,
        dtype="F32",
        shape=shape,
        sources=(info, row_max),
        compute=lambda: dequantise_rows(read_tensor(info), read_tensor(row_max)),
    )


def _four_bit(checkpoint: Checkpoint, info: TensorInfo, kind: str) -> Derived:
    how, offset = _packing(checkpoint, checkpoint.tensors[f"{info.name}.quant_state.bitsandbytes__{kind}"])
    _require(checkpoint, info.name, how.quant_type == kind, "has another type in its quant_state")
    size = (how.numel + 1) // 2
    _require(checkpoint, info.name, info.nbytes == size, f"has {info.nbytes} bytes, its quant_state asks for {size}")
    parts = [_part(checkpoint, f"{info.name}.absmax", ("U8",) if how.double else tuple(FLOATS), (how.blocks,))]
    parts.append(_part(checkpoint, f"{info.name}.quant_map", ("F32",), (16,)))
    if how.double:
        parts.append(_part(checkpoint, f"{info.name}.nested_absmax", ("F32",), (how.nested_blocks,)))
        parts.append(_part(checkpoint, f"{info.name}.nested_quant_map", ("F32",), (256,)))
    return Derived(
        name=info.name,
        dtype=DTYPE_OF[how.dtype],
        shape=how.shape,
        sources=(info, *parts),
        compute=lambda: dequantise(_read_packed(info, parts, how, offset)),
    )


def _read_packed(info: TensorInfo, parts: list[TensorInfo], how: Packing, offset: float | None) -> Packed:
    nibbles = read_tensor(info).reshape(-1).view(torch.uint8)
    absmax, code, *nested = map(read_tensor, parts)
    if not torch.equal(code, code_of(how.quant_type)):
        raise UserError(
            f"{info.file}: {info.name}.quant_map is not that of {how.quant_type}: readers would disagree", SAME_UPLOAD
        )
    packed = Packed(packing=how, nibbles=nibbles, absmax=absmax)
    return replace(packed, nested_absmax=nested[0], nested_code=nested[1], offset=offset) if nested else packed


def _packing(checkpoint: Checkpoint, info: TensorInfo) -> tuple[Packing, float | None]:
    """The quant_state in `info`, checked, and the offset of its scales."""
    _require(checkpoint, info.name, info.dtype == "U8" and info.nbytes <= MOST_STATE_BYTES, "is no text")
    try:
        state = json.loads(bytes(read_tensor(info).tolist()))
    except (ValueError, RecursionError):
        state = None
    state = state if isinstance(state, dict) else {}
    _require(checkpoint, info.name, _is_state(state), "is no quant_state that bitsandbytes could have written")
    packing = Packing(
        quant_type=state["quant_type"],
        blocksize=state["blocksize"],
        dtype=state["dtype"],
        shape=tuple(state["shape"]),
        double="nested_offset" in state,
        nested_blocksize=state.get("nested_blocksize", 256),
    )
    return packing, float(state["nested_offset"]) if packing.double else None


def _is_state(state: dict[str, Any]) -> bool:
    nested, offset = state.get("nested_blocksize", 256), state.get("nested_offset", 0)
    texts = [state.get("dtype"), state.get("quant_type"), state.get("nested_dtype", "float32")]
    valid = all(isinstance(text, str) for text in texts) and type(state.get("blocksize")) is int
    valid = valid and type(nested) is int and 0 < nested < 1 << 31 and type(offset) in (int, float)
    valid = valid and texts[0] in DTYPE_OF and texts[1] in CODES and texts[2] == "float32"
    shape = state.get("shape")
    valid = (
        valid
        and isinstance(shape, list)
        and len(shape) == 2
        and all(type(size) is int and 0 < size < 1 << 31 for size in shape)
    )
    return valid and state["blocksize"] in BLOCK_SIZES and abs(offset) < MOST_OFFSET


def _part(checkpoint: Checkpoint, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> TensorInfo:
    info = checkpoint.tensors.get(name)
    if info is None:
        raise UserError(f"{checkpoint.path}: {name} is missing beside its packed weight", SAME_UPLOAD, EXIT_FINDING)
    right = info.dtype in dtypes and info.shape == shape
    _require(checkpoint, name, right, f"is {info.dtype} {list(info.shape)}, not {dtypes[0]} {list(shape)}")
    return info


def _require(checkpoint: Checkpoint, name: str, condition: bool, wrong: str) -> None:
    if not condition:
        raise UserError(f"{checkpoint.path}: {name} {wrong}", SAME_UPLOAD, EXIT_FINDING)


def _with_dtype(config: Config, packed: list[Derived]) -> Config:
    computed = {FLOATS[tensor.dtype] for tensor in packed}
    named = config.get("dtype") or config.get("torch_dtype")
    if not computed or computed == {named}:
        return config
    dtype = computed.pop() if len(computed) == 1 and named is None else "float32"
    return {**config, "dtype": dtype, "torch_dtype": dtype}


def _is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def _require_choice(quant_type: str, blocksize: int) -> None:
    if quant_type not in CODES or blocksize not in BLOCK_SIZES:
        raise UserError(
            f"{quant_type} in blocks of {blocksize}: not what bitsandbytes offers",
            f"Choose nf4 or fp4, in blocks of {', '.join(map(str, BLOCK_SIZES))}",
        )


def _require_float(tensor: AnyTensor) -> str:
    if tensor.dtype not in FLOATS:
        raise UserError(
            f"{tensor.name}: is {tensor.dtype}, which is not packed", "Convert it to F32, F16 or BF16 first"
        )
    return FLOATS[tensor.dtype]


def through_nf4(view: View, blocksize: int = 64, double: bool = True) -> View:
    """`view` with every linear of its layers quantised to NF4 and back, each in its own dtype: QLoRA's base.

    Raises:
        UserError: a block size that bitsandbytes does not have, or linears that are not 16 or 32 bit.
    """
    _require_choice("nf4", blocksize)

    def derived(tensor: AnyTensor) -> Derived:
        packing = Packing(
            quant_type="nf4", blocksize=blocksize, dtype=_require_float(tensor), shape=tensor.shape, double=double
        )
        sources = tensor.sources if isinstance(tensor, Derived) else (tensor,)
        compute = partial(_there_and_back, tensor, packing)
        return Derived(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, sources=sources, compute=compute)

    tensors = {name: derived(tensor) if _is_linear(name) else tensor for name, tensor in view.tensors.items()}
    return replace(view, tensors=tensors, kind=f"{view.kind}, linears through NF4")


def _there_and_back(tensor: AnyTensor, packing: Packing) -> torch.Tensor:
    return dequantise(quantise(read(tensor), packing))


def pack(
    view: View, *, quant_type: str = "nf4", blocksize: int = 64, double: bool = True, compute_dtype: str | None = None
) -> tuple[list[Slot], Callable[[Slot, BinaryIO], None], Config]:
    """What to write for `view` with every linear of its layers packed: slots, their writer, and config.json.

    The writer quantises a weight when its first slot comes and keeps it until another one's comes, so slots go in
    order, and a run that goes on after a kill may begin at any of them. Everything else is copied byte for byte.
    The packed tensors are those that transformers saves after `load_in_4bit`, except for blanks at the end of the
    quant_state of double quantised ones. `compute_dtype` (torch's name) is for the reader, else the config's dtype.

    Raises:
        UserError: a choice that bitsandbytes does not have, or linears that are not 16 or 32 bit.
    """
    _require_choice(quant_type, blocksize)
    slots: list[Slot] = []
    owners: dict[str, tuple[str, str]] = {}
    packings: dict[str, Packing] = {}
    for name, tensor in view.tensors.items():
        if not _is_linear(name):
            slots.append(Slot(name=name, dtype=tensor.dtype, shape=tensor.shape))
            continue
        how = Packing(
            quant_type=quant_type, blocksize=blocksize, dtype=_require_float(tensor), shape=tensor.shape, double=double
        )
        packings[name] = how
        for suffix, dtype, shape in parts_of(how):
            owners[name + suffix] = (name, suffix)
            slots.append(Slot(name=name + suffix, dtype=dtype, shape=shape))
    settings = _settings(view.config, quant_type, double, compute_dtype)
    return slots, _Packer(view, owners, packings).write, {**view.config, "quantization_config": settings}


class _Packer:
    """Writes slots; holds the parts of one packed weight."""

    def __init__(self, view: View, owners: dict[str, tuple[str, str]], packings: dict[str, Packing]) -> None:
        self._view, self._owners, self._packings = view, owners, packings
        self._name = ""
        self._parts: dict[str, torch.Tensor] = {}

    def write(self, slot: Slot, handle: BinaryIO) -> None:
        if slot.name not in self._owners:
            tensor = self._view.tensors[slot.name]
            copy_tensor(tensor, handle) if isinstance(tensor, TensorInfo) else write_tensor(read(tensor), handle)
            return
        name, suffix = self._owners[slot.name]
        if name != self._name:
            self._parts = {}
            self._parts = stored(quantise(read(self._view.tensors[name]), self._packings[name]))
            self._name = name
        write_tensor(self._parts[suffix], handle)


def _settings(config: Config, quant_type: str, double: bool, compute_dtype: str | None) -> dict[str, Any]:
    """quantization_config as transformers 5 writes it; a reader needs the `load_in_4bit` and `bnb_4bit_` keys."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute_dtype or config.get("dtype") or config.get("torch_dtype") or "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
