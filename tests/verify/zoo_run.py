"""Builds the references of the zoo, plants a fault in a copy, and asks `verify` what it makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from qwen2tool.assets import TINY_QWEN2
from qwen2tool.checkpoint.adapter import delta, open_adapter
from qwen2tool.data.samples import Sample
from qwen2tool.verify.report import Report
from qwen2tool.verify.run import verify
from tests.tiny import write_adapter, write_tiny
from tests.verify.zoo import YARN, Fault, State, Zoo, kv_repeated, scaling

if TYPE_CHECKING:
    from tests.verify.harmless import Harmless

GQA = {"hidden_size": 112, "num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 3}
"""The grouping of Qwen2-7B: seven q heads to a k head."""
Edit = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass
class Keeper:
    """The references of one model, made once as they are asked for."""

    folder: Path
    """Where they are written."""
    plain: Path
    strength: float = 1.0
    """Of the adapter: what random updates of a tiny model's size do to a trained one leaves nothing to compare."""

    def reference(self, base: str) -> Path:
        """The reference that a fault starts from."""
        if base in ("plain", "adapter"):
            return self.plain
        target = self.folder / base
        if not target.exists():
            getattr(self, f"_{base}")(target)
        return target

    def adapter(self) -> Path:
        target = self.folder / "the-adapter"
        if not target.exists():
            write_adapter(target, self.plain)
            file = target / "adapter_model.safetensors"
            halves = {k: t * self.strength if "lora_B" in k else t for k, t in load_file(file).items()}
            save_file(halves, file, metadata={"format": "pt"})
        return target

    def zoo(self, base: str) -> Zoo:
        config = json.loads((self.reference(base) / "config.json").read_text())
        updates = {}
        if base == "adapter":
            updates = {f"{m}.weight": delta(pair) for m, pair in open_adapter(self.adapter()).pairs.items()}
        counts = (config[k] for k in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"))
        return Zoo(*counts, updates)

    def plant(self, fault: Fault, target: Path) -> Path:
        """A copy of the fault's reference with the fault in it."""
        zoo = self.zoo(fault.base)
        return copied(self.reference(fault.base), target, lambda state: fault.change(state, zoo), fault.config)

    def _tied(self, target: Path) -> None:
        copied(self.plain, target, lambda s: s.pop("lm_head.weight", None), lambda c: {"tie_word_embeddings": True})

    def _fp32(self, target: Path) -> None:
        """Numbers that no 16-bit format holds: the model's own times a third."""

        def thirds(state: State) -> None:
            state.update({key: tensor.float() * (1 + 2.0**-9 / 3) for key, tensor in state.items()})

        copied(self.plain, target, thirds, lambda c: {"dtype": "float32", "torch_dtype": "float32"})

    def _zeros(self, target: Path) -> None:
        """A v bias that begins with 0."""
        copied(self.plain, target, lambda s: s["model.layers.0.self_attn.v_proj.bias"][:1].zero_())

    def _yarn(self, target: Path) -> None:
        copied(self.plain, target, lambda s: None, scaling(YARN))

    def _mha(self, target: Path) -> None:
        """Every q head with a k and v head of its own."""
        zoo = self.zoo("plain")

        def widen(state: State) -> None:
            kv_repeated(state, zoo)
            for key in [k for k in state if ".k_proj." in k or ".v_proj." in k]:
                state[key] = state[key] * (1 + 0.25 * state[key].roll(1, 0).sign())  # heads of their own

        copied(self.plain, target, widen, lambda c: {"num_key_value_heads": c["num_attention_heads"]})


def states(folder: Path) -> State:
    """All tensors of a folder, by safetensors."""
    return {key: t for file in sorted(folder.glob("*.safetensors")) for key, t in load_file(file).items()}


def copied(source: Path, target: Path, change: Callable[[State], Any], config: Edit = lambda config: {}) -> Path:
    """A copy of `source` as one file, its tensors edited in place by `change`; a key set to None is removed."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    state = states(source)
    change(state)
    save_file({k: t.contiguous() for k, t in state.items()}, target / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((target / "config.json").read_text())
    changes = config(settings)
    settings = {key: value for key, value in (settings | changes).items() if changes.get(key, value) is not None}
    (target / "config.json").write_text(json.dumps(settings))
    return target


def keeper_of(model: str, folder: Path) -> Keeper:
    """The keeper of "tiny-qwen2", of "gqa 28/4", or of the folder of a published model."""
    if model == "tiny-qwen2":
        return Keeper(folder, TINY_QWEN2)
    if model == "gqa 28/4":
        return Keeper(folder, write_tiny(folder / "gqa", shards=1, **GQA))
    return Keeper(folder, Path(model), strength=0.1)


def texts(model: Keeper, count: int = 3, length: int = 24) -> list[Sample]:
    """Text that the model's tokenizer makes of the bundled instructions, every token scored; 0: of growing length."""
    from qwen2tool.data.choose import choose_samples

    found = []
    for number, sample in enumerate(choose_samples(model.plain, None, None, 512)[:count]):
        ids = sample.ids[: length or 7 + 9 * number]
        found.append(Sample(ids=ids, scored=(True,) * len(ids), record=sample.record))
    return found


def judge_fault(keeper: Keeper, fault: Fault, target: Path, **text: int) -> Report:
    """`verify` on the fault's reference and a copy with the fault in it; the copy is removed."""
    candidate = keeper.plant(fault, target)
    try:
        return _verify(keeper, fault.base, candidate, texts(keeper, **text))
    finally:
        shutil.rmtree(target)


def judge_harmless(keeper: Keeper, change: Harmless, target: Path, **text: int) -> Report:
    """`verify` on a reference and a harmless change of it."""
    reference = keeper.reference(change.base)
    if change.make is not None:
        change.make(reference, target, keeper)
    threads = torch.get_num_threads()
    torch.set_num_threads(change.threads)
    try:
        candidate = target if change.make is not None else reference
        return _verify(keeper, change.base, candidate, texts(keeper, **(text | change.text)), **change.options)
    finally:
        torch.set_num_threads(threads)
        if target.is_symlink():
            target.unlink()
        else:
            shutil.rmtree(target, ignore_errors=True)


def _verify(keeper: Keeper, base: str, candidate: Path, samples: list[Sample], **options: Any) -> Report:
    adapter = [keeper.adapter()] if base == "adapter" else None
    return verify(keeper.reference(base), candidate, samples, adapter=adapter, **options)
