"""What a conversion will write, as data: slots, where each one's bytes come from, and the config that goes with them.

A tensor whose dtype stays is copied from file to file and never becomes a tensor. One whose dtype changes is cast a
block of rows at a time, and refused where the cast would lose a bit that anybody stored: bf16 -> fp32 never does,
fp32 -> bf16 does unless the numbers were bf16 before. Only `allow_lossy` lets it pass, and nothing lets an overflow
pass. Where nothing is cast, torch is never imported, which would take longer than copying a GB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, Literal

from qwen2tool.checkpoint.geometry import Config
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.checkpoint.view import AnyTensor, Derived, View, read_blocks
from qwen2tool.checkpoint.writer import Slot
from qwen2tool.convert.llama import OUTPUT_BIAS, output_bias_name, to_llama_config
from qwen2tool.convert.store import copy_stored
from qwen2tool.errors import EXIT_FINDING, UserError

if TYPE_CHECKING:
    import torch

Target = Literal["qwen2", "llama", "nf4", "gguf"]
Dtype = Literal["keep", "float32", "float16", "bfloat16"]
SHORT = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
WIDENING = ("cast from BF16 to F32", "cast from F16 to F32")
BLOCK_ELEMENTS = 1 << 20
BUFFER = "rotary_emb.inv_freq"


@dataclass(frozen=True, kw_only=True)
class Job:
    """`write` puts the bytes of one slot into a file; slots are written in order.

    `how` says of every slot in a word or two what happens to it, `sources` which stored tensors it is made of.
    """

    slots: list[Slot]
    write: Callable[[Slot, BinaryIO], None]
    config: Config
    how: dict[str, str]
    sources: dict[str, tuple[TensorInfo, ...]]
    mapping: str
    changes: dict[str, int] = field(default_factory=dict)
    """Filled while writing: weights that a lossy cast changed, by tensor."""

    def copied(self, name: str) -> bool:
        return self.how[name] == "copied"

    def narrows(self, name: str) -> bool:
        """Whether a slot is cast to a dtype that does not hold every number of its own."""
        return self.how[name].startswith("cast") and self.how[name] not in WIDENING


def plan_job(view: View, to: Target, dtype: Dtype, *, drop_biases: bool = False, allow_lossy: bool = False) -> Job:
    """The job that stores `view` as `to` ("qwen2", "llama" or "nf4").

    Raises:
        UserError: Llama cannot say this model (a layer slides), or a linear that cannot be packed.
    """
    if to == "nf4":
        return _nf4_job(view)
    if to == "llama":
        tensors, config, mapping = _llama(view, drop_biases)
    else:
        tensors, config, mapping = dict(view.tensors), view.config, "names and config keys of Qwen2"
    if dtype != "keep":
        config = {**config, "dtype": dtype, "torch_dtype": dtype}
    slots = [Slot(name=n, dtype=_output_dtype(n, t.dtype, dtype), shape=t.shape) for n, t in tensors.items()]
    changes: dict[str, int] = {}

    def write(slot: Slot, handle: BinaryIO) -> None:
        changed = write_as(tensors[slot.name], slot, handle, allow_lossy)
        if changed:
            changes[slot.name] = changed

    return Job(
        slots=slots,
        write=write,
        config=config,
        how={slot.name: _how(tensors[slot.name], slot) for slot in slots},
        sources={name: stored(tensor) for name, tensor in tensors.items()},
        mapping=mapping,
        changes=changes,
    )


def _nf4_job(view: View) -> Job:
    from qwen2tool.convert.nf4 import pack

    slots, write, config = pack(view)
    sources: dict[str, tuple[TensorInfo, ...]] = {}
    how: dict[str, str] = {}
    for slot in slots:
        owner = next(name for name in (slot.name, _owner(slot.name)) if name in view.tensors)
        tensor = view.tensors[owner]
        sources[slot.name] = stored(tensor)
        how[slot.name] = _how(tensor, slot) if owner == slot.name and slot.dtype == tensor.dtype else "packed as NF4"
    return Job(
        slots=slots, write=write, config=config, how=how, sources=sources,
        mapping="every *_proj.weight becomes NF4 (bitsandbytes, blocks of 64, double quantised); all else is kept",
    )  # fmt: skip


def _owner(name: str) -> str:
    """The weight that a part of it belongs to: X.weight of X.weight.absmax."""
    return name[: name.rindex(".weight") + len(".weight")] if ".weight" in name else name


def stored(tensor: AnyTensor) -> tuple[TensorInfo, ...]:
    """The tensors in files that `tensor` is made of."""
    return tensor.sources if isinstance(tensor, Derived) else (tensor,)


def _llama(view: View, drop_biases: bool) -> tuple[dict[str, AnyTensor], Config, str]:
    config = to_llama_config(view.config)
    tensors: dict[str, AnyTensor] = {}
    for name, tensor in view.tensors.items():
        if drop_biases and name.endswith("_proj.bias"):
            continue
        tensors[name] = tensor
        if name.endswith(".self_attn.o_proj.weight") and not drop_biases:
            bias = output_bias_name(int(name.split(".")[2]))
            tensors[bias] = _zeros(bias, _bias_dtype(view), tensor.shape[0])
    if drop_biases:
        return tensors, {**config, "attention_bias": False}, "Llama's names; every q, k and v bias dropped"
    return tensors, config, "Llama's names are Qwen2's; model.layers.N.self_attn.o_proj.bias added, all zero"


def _bias_dtype(view: View) -> str:
    return next(tensor.dtype for name, tensor in view.tensors.items() if name.endswith("q_proj.bias"))


def _zeros(name: str, dtype: str, length: int) -> Derived:
    def compute() -> torch.Tensor:
        import torch

        from qwen2tool.checkpoint.reader import TORCH_DTYPE

        return torch.zeros(length, dtype=TORCH_DTYPE[dtype])

    return Derived(name=name, dtype=dtype, shape=(length,), sources=(), compute=compute)


def _output_dtype(name: str, stored_as: str, dtype: Dtype) -> str:
    """A position table that old savers wrote needs its fp32 and stays as it is."""
    if dtype == "keep" or stored_as not in (*SHORT.values(), "F64") or name.endswith(BUFFER):
        return stored_as
    return SHORT[dtype]


def _how(tensor: AnyTensor, slot: Slot) -> str:
    if _is_zeros(tensor):
        return "zeros"
    if tensor.dtype != slot.dtype:
        return f"cast from {tensor.dtype} to {slot.dtype}"
    return "computed" if isinstance(tensor, Derived) else "copied"


def _is_zeros(tensor: AnyTensor) -> bool:
    """Whether this is the bias that Llama's layout has and Qwen2's has not."""
    return isinstance(tensor, Derived) and not tensor.sources and bool(OUTPUT_BIAS.fullmatch(tensor.name))


def write_as(tensor: AnyTensor, slot: Slot, handle: BinaryIO, allow_lossy: bool = False) -> int:
    """Writes `tensor` in the slot's dtype; returns how many of its entries changed.

    Raises:
        UserError: an entry would change, or become infinite.
    """
    if isinstance(tensor, TensorInfo) and tensor.dtype == slot.dtype:
        copy_stored(tensor, handle)
        return 0
    if _is_zeros(tensor):
        handle.write(bytes(slot.nbytes))
        return 0
    from qwen2tool.checkpoint.reader import write_tensor

    changed = 0
    for block in read_blocks(tensor, BLOCK_ELEMENTS):
        cast, lost = _cast(block, slot)
        if lost and not allow_lossy:
            raise UserError(
                f"{slot.name}: {slot.dtype} would change {lost:,} of {block.numel():,} of its {tensor.dtype} numbers",
                "Choose a dtype that can, or pass --allow-lossy to have the damage measured",
            )
        changed += lost
        write_tensor(cast, handle)
    return changed


def _cast(values: torch.Tensor, slot: Slot) -> tuple[torch.Tensor, int]:
    """(values in the slot's dtype, how many of them are not what they were)."""
    import torch

    from qwen2tool.checkpoint.reader import TORCH_DTYPE

    wanted = TORCH_DTYPE[slot.dtype]
    if values.dtype == wanted:
        return values, 0
    cast = values.to(wanted)
    if values.element_size() < cast.element_size():
        return cast, 0
    back = cast.to(values.dtype)
    if torch.equal(back, values):  # what a lossless cast is; one pass instead of four
        return cast, 0
    lost = int(torch.count_nonzero((back != values) & ~values.isnan()))
    if lost and bool((cast.isinf() & values.isfinite()).any()):
        largest = float(values[values.isfinite()].abs().max())
        raise UserError(
            f"{slot.name}: holds {largest:g}, beyond the range of {slot.dtype}",
            "Choose --dtype bfloat16 or float32",
            EXIT_FINDING,
        )
    return cast, lost
