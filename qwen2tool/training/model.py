"""The model that is trained: a transformers Qwen2 (16-bit or NF4) under PEFT's LoRA, fresh or continued."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch

from qwen2tool.checkpoint.adapter import ADAPTER_FILE, PROVENANCE_FILE, Adapter, open_adapter, require_fit
from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.load import Dtype, load_model, quiet_transformers
from qwen2tool.checkpoint.writer import atomic_folder, write_json
from qwen2tool.errors import UserError
from qwen2tool.training.fast import embedding_to_host
from qwen2tool.training.guard import require_finite_weights
from qwen2tool.training.settings import TrainSettings


class Placement(NamedTuple):
    """Where a run computes and in which dtype; `autocast` is on for 16-bit runs, as in transformers.Trainer."""

    device: str
    dtype: Dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def autocast(self) -> torch.autocast:
        half = self.dtype != "float32"
        return torch.autocast(self.device, self.torch_dtype if half else torch.bfloat16, enabled=half)


def place(settings: TrainSettings) -> Placement:
    """Resolves "auto".

    Raises:
        UserError: CUDA is asked for and not there, or the GPU has no bfloat16.
    """
    has_cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not has_cuda:
        raise UserError(
            "--device is cuda, but torch sees no CUDA device", "Use --device cpu, or install a CUDA build of torch"
        )
    device = ("cuda" if has_cuda else "cpu") if settings.device == "auto" else settings.device
    has_bfloat16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if settings.dtype != "auto":
        dtype: Dtype = settings.dtype
    else:
        dtype = "float32" if device == "cpu" else "bfloat16" if has_bfloat16 else "float16"
    if device == "cuda" and dtype == "bfloat16" and not has_bfloat16:
        raise UserError("this GPU has no bfloat16", "Pass --dtype float16, or leave --dtype out")
    if dtype == "float16" and device == "cpu":
        raise UserError("--dtype is float16 on the CPU, where loss scaling does not exist", "Pass --dtype bfloat16")
    return Placement(device, dtype)


def trainable_model(checkpoint: Checkpoint, settings: TrainSettings, placement: Placement) -> Any:
    """A PeftModel whose only trainable parameters are LoRA's A and B, in fp32.

    Raises:
        UserError: a checkpoint that is not whole or already quantised, an adapter that does not fit.
    """
    from peft import PeftModel

    if checkpoint.geometry.quantization is not None:
        raise UserError(
            f"{checkpoint.path}: already quantised",
            "Train on the 16-bit checkpoint, with --quantize nf4 if memory is short",
        )
    adapter = _fitting_adapter(checkpoint, settings.adapter)
    hash_compiler(placement.device)
    model = load_model(checkpoint, dtype=placement.dtype, device=placement.device, nf4=settings.quantize == "nf4")
    model.config.use_cache = False
    if adapter is not None:
        with quiet_transformers():
            model = PeftModel.from_pretrained(model, adapter.path, is_trainable=True)
    else:
        model = fresh_lora(
            model,
            rank=settings.lora_rank,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
            targets=settings.lora_targets,
        )
    if settings.memory_budget is not None or settings.embedding == "host":  # before gradients and the optimizer come
        embedding_to_host(model)
    return model


def hash_compiler(device: str) -> None:
    """Lets Triton hash its own files in a thread, which the first kernel of a process waits for otherwise (0.4 s, more
    from a cold disk). Called before weights are loaded: copies and hashes leave the interpreter alone."""
    if not device.startswith("cuda"):
        return
    with suppress(ImportError):  # it is not of Triton's documented names
        from triton.runtime.cache import triton_key

        Thread(target=triton_key).start()


def fresh_lora(model: Any, *, rank: int, alpha: int, dropout: float, targets: Iterable[str]) -> Any:
    """`model` under a new LoRA on `targets`, A by PEFT's own start, B zero.

    A is drawn where the model is: the 160 M numbers of a 7B at rank 64 would take the host three seconds. So one seed
    starts differently on a CPU and on a GPU.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM"
    )
    with model.get_output_embeddings().weight.device:
        return get_peft_model(model, config)


def _fitting_adapter(checkpoint: Checkpoint, path: str | None) -> Adapter | None:
    if path is None:
        return None
    adapter = open_adapter(Path(path))
    require_fit(adapter, checkpoint)
    return adapter


def save_adapter(model: Any, base_name: str, base_fingerprint: str, target: Path) -> None:
    """Writes the adapter in PEFT's format, with the base's fingerprint beside it; complete or not at all."""
    require_finite_weights(model)
    model.peft_config["default"].base_model_name_or_path = base_name
    with atomic_folder(target) as folder:
        model.save_pretrained(folder, safe_serialization=True)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; `push` writes a real one
        write_json(folder / PROVENANCE_FILE, {"base": base_name, "base_fingerprint": base_fingerprint})
        if not (folder / ADAPTER_FILE).is_file():
            raise AssertionError("PEFT wrote no safetensors adapter")
