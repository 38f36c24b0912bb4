"""Anything that holds a Qwen2, opened as one: `open_qwen2` is where convert and verify begin.

Order: what the files are (safetensors, .bin, GGUF), what they store (packed weights, Qwen 1), which layout (Llama's or
Qwen2's), then NF4 and adapters on top. Each step is a view of the one before; nothing is read but headers, config.json
and, in Llama's layout, the `o_proj.bias` vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from qwen2tool.checkpoint.adapter import LoraPair, delta, open_adapter, require_fit
from qwen2tool.checkpoint.folder import Checkpoint, open_checkpoint, resolve
from qwen2tool.checkpoint.geometry import geometry, with_both_spellings
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.checkpoint.inventory import require_whole, take_inventory
from qwen2tool.checkpoint.view import AnyTensor, Derived, View, plain_view, read
from qwen2tool.convert.llama import qwen2_of_llama
from qwen2tool.errors import EXIT_FINDING, UserError

if TYPE_CHECKING:
    import torch


def open_qwen2(
    name: str | Path,
    *,
    revision: str | None = None,
    adapters: Sequence[str | Path] = (),
    nf4: bool = False,
    whole: bool = True,
    tie_head: bool = False,
    max_length: int | None = None,
    allow_other_base: bool = False,
) -> View:
    """The Qwen2 at `name` (folder, file or Hub id), whatever it is stored as.

    Args:
        adapters: LoRA adapters in PEFT's format, added in this order, in fp32; an adapted weight is F32.
        nf4: the linears as QLoRA carries them: quantised to NF4 (double quantisation, blocks of 64) and back, before
            the adapters are added.
        whole: refuse a model that lacks a tensor or has one too many. Where that is what is to be found out, pass
            False: the view then holds what the files hold.
        tie_head: of a GGUF that stores the one table of a tied model twice, in two roundings, make one again.
        max_length: of a Qwen (1): the positions that it shall claim, where not those it was trained for.
        allow_other_base: take adapters that say they were trained on another base.

    Raises:
        UserError: no checkpoint, another architecture, a bias that Qwen2 has no place for, an adapter that does not
            fit; with `whole`, exit code 1 for what is missing, extra or of another shape.
    """
    view = _layers_of(open_checkpoint(name, revision=revision), tie_head, max_length)
    if whole:
        _require_whole(view)
    opened = [open_adapter(resolve(adapter)) for adapter in adapters]
    base = as_checkpoint(view)
    for adapter in opened:
        # A fingerprint is that of stored bytes: of a packed or dequantised base there is none to compare with.
        require_fit(adapter, base, allow_other_base or any(isinstance(t, Derived) for t in view.tensors.values()))
    if nf4:
        from qwen2tool.convert.nf4 import through_nf4

        view = through_nf4(view)
    for adapter in opened:
        view = _with_pairs(view, adapter.pairs, adapter.path.resolve().name)
    return view


def as_checkpoint(view: View) -> Checkpoint:
    """The names, shapes and config of a view, for checks that take a checkpoint and read no data."""
    tensors = cast(dict[str, TensorInfo], dict(view.tensors))
    return replace(view.origin, config=view.config, geometry=view.geometry, tensors=tensors)


def _layers_of(checkpoint: Checkpoint, tie_head: bool, max_length: int | None) -> View:
    """The view of the files alone."""
    if tie_head and checkpoint.format != "gguf":
        raise UserError(f"{checkpoint.path}: no GGUF, so its head is what config.json says", "Leave out --tie-head")
    kind, quantization = checkpoint.geometry.model_type, checkpoint.geometry.quantization
    if max_length is not None and kind != "qwen":
        raise UserError(f"{checkpoint.path}: no Qwen (1), so config.json says its length", "Leave out --max-length")
    if checkpoint.format == "gguf":
        from qwen2tool.convert.gguf_read import view_of_gguf

        view = view_of_gguf(checkpoint, tie_head=tie_head)
    elif kind == "qwen":
        from qwen2tool.convert.qwen1 import view_of_qwen1

        view = view_of_qwen1(checkpoint, max_length)
    elif quantization is not None:
        from qwen2tool.convert.nf4 import view_of_packed

        view = view_of_packed(checkpoint)
    else:
        view = plain_view(checkpoint)
    if view.config.get("model_type") == "llama":
        return qwen2_of_llama(view)
    if view.config.get("model_type") != "qwen2":
        raise UserError(
            f"{checkpoint.path}: model_type is {ascii(view.config.get('model_type'))[:40]}, not 'qwen2'",
            "Use a Qwen (1), Qwen1.5, Qwen2, Qwen2.5, QwQ or CodeQwen checkpoint, or one of them in Llama's layout",
        )
    config = with_both_spellings(view.config)
    return replace(view, config=config, geometry=geometry(config))


def _require_whole(view: View) -> None:
    checkpoint = as_checkpoint(view)
    lost = take_inventory(checkpoint).missing_biases
    if lost:
        total = 3 * view.geometry.num_hidden_layers
        raise UserError(
            f"{view.path}: {len(lost)} of {total} q/k/v biases are missing, the first is {lost[0]}",
            "Take them from the checkpoint that this one was made from: qwen2tool convert --biases-from ORIGINAL",
            EXIT_FINDING,
        )
    require_whole(checkpoint)


def _with_pairs(view: View, pairs: dict[str, LoraPair], adapter: str) -> View:
    """`view` with the updates of one adapter added to its weights."""
    tensors = dict(view.tensors)
    for module, pair in pairs.items():
        tensors[f"{module}.weight"] = _adapted(tensors[f"{module}.weight"], pair)
    return replace(view, tensors=tensors, kind=f"{view.kind} + adapter {adapter}")


def _adapted(weight: AnyTensor, pair: LoraPair) -> Derived:
    def compute() -> torch.Tensor:
        return read(weight).float() + delta(pair)

    stored = weight.sources if isinstance(weight, Derived) else (weight,)
    return Derived(
        name=weight.name, dtype="F32", shape=weight.shape, sources=(*stored, pair.a, pair.b), compute=compute
    )
