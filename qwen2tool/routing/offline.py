"""The plan of a checkpoint that is not loaded: its model stands on torch's meta device, made of configs alone.

Every module is of the class that a real load gives it (bitsandbytes' linears come from transformers' own quantiser,
LoRA layers from PEFT), and `plan_routes` judges them as it judges a loaded model, so the two plans are the same one.
No weight is read: the cost is importing transformers and PEFT plus one Python object a module, a few seconds and
0.6 GB for 80 layers as for 2.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen2tool.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_FILE
from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.header import read_header
from qwen2tool.checkpoint.inventory import require_whole
from qwen2tool.checkpoint.load import quiet_transformers
from qwen2tool.errors import UserError
from qwen2tool.routing.memory import MemoryPlan, plan_memory
from qwen2tool.routing.plan import LINEARS, RoutePlan, plan_routes
from qwen2tool.routing.sizes import measure

LINEAR_NAMES = [name for names in LINEARS.values() for name in names]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
"""What `train --quantize nf4` asks of bitsandbytes."""


def plan_checkpoint(checkpoint: Checkpoint, adapter: Path | None = None, *, nf4: bool = False) -> RoutePlan:
    """What runs in training on `checkpoint`, its base frozen, with `adapter` (a PEFT folder) on it.

    Args:
        nf4: as if the base were loaded in NF4.

    Raises:
        UserError: not a whole Qwen2, a quantisation other than bitsandbytes', an adapter that does not fit.
    """
    return plan_routes(_training_model(checkpoint, adapter, nf4))


def plan_checkpoint_memory(
    checkpoint: Checkpoint, adapter: Path | None = None, *, nf4: bool = False, tokens: int, length: int, budget: int
) -> MemoryPlan:
    """What training on a GPU keeps where, within `budget` bytes, for passes of `tokens` tokens.

    Args:
        adapter: without one, the LoRA that `train` puts on by default: rank 64 on all seven linears.
        length: the longest sequence.

    Raises:
        UserError: as `plan_checkpoint`.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    model = _training_model(checkpoint, adapter, nf4)
    if adapter is None:
        config = LoraConfig(r=64, target_modules=LINEAR_NAMES, task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(model, config, low_cpu_mem_usage=True)
    sizes = measure(model, tokens, length, torch.bfloat16, all_fused=plan_routes(model).all_fused)
    return plan_memory(sizes, budget)


def _training_model(checkpoint: Checkpoint, adapter: Path | None, nf4: bool) -> Any:
    require_whole(checkpoint)
    model = meta_model(checkpoint, nf4=nf4)
    return model if adapter is None else _adapted(model, adapter)


def meta_model(checkpoint: Checkpoint, *, nf4: bool = False) -> Any:
    """A frozen Qwen2ForCausalLM in training mode without data, in config.json's dtype, linears quantised if they are.

    Raises:
        UserError: transformers cannot build it, or the quantisation is not bitsandbytes'.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    quantization = _quantization(checkpoint, nf4)
    dtype = getattr(torch, checkpoint.geometry.dtype or "float32", None)
    with _one_line(f"{checkpoint.path / 'config.json'}: transformers builds no model from it", "Repair config.json"):
        config = Qwen2Config.from_pretrained(checkpoint.path)
        with torch.device("meta"):
            model = Qwen2ForCausalLM(config)
        model = model.to(dtype if isinstance(dtype, torch.dtype) else torch.float32)
        if quantization is not None:
            _quantise(model, quantization, stored=not nf4)
    return model.requires_grad_(False).train()


def _quantization(checkpoint: Checkpoint, nf4: bool) -> dict[str, Any] | None:
    stored = checkpoint.geometry.quantization
    if stored is None:
        return dict(NF4) if nf4 else None
    bits = stored.get("load_in_4bit") or stored.get("load_in_8bit")
    if stored.get("quant_method", "bitsandbytes") != "bitsandbytes" or not bits:
        raise UserError(
            f"{checkpoint.path}: quantised by {ascii(stored.get('quant_method'))[:40]}, which nothing here reads",
            "Name the 16-bit checkpoint, or one that bitsandbytes quantised",
        )
    if nf4:
        raise UserError(f"{checkpoint.path}: already quantised", "Leave out --quantize")
    return stored


def _quantise(model: Any, quantization: dict[str, Any], stored: bool) -> None:
    """Exchanges the linears as `from_pretrained` does before it reads weights, and marks the model as it does after."""
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=stored)
    quantizer.preprocess_model(model, device_map=None)
    quantizer.postprocess_model(model)
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes."):
            module.weight = _copyable(module)


def _copyable(linear: Any) -> Any:
    """A plain weight for a quantised linear: DoRA copies the base, and bitsandbytes' own cannot be copied on meta."""
    import torch

    shape = (linear.out_features, linear.in_features)
    weight = torch.nn.Parameter(torch.empty(shape, dtype=torch.float16, device="meta"), requires_grad=False)
    for name in ("compress_statistics", "quant_type"):  # PEFT reads them off a 4-bit weight
        setattr(weight, name, getattr(linear.weight, name, None))
    return weight


def _adapted(model: Any, adapter: Path) -> Any:
    """`model` under PEFT as training holds it: the adapter trainable, none of its weights read."""
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise UserError(f"{adapter}: not a PEFT adapter (no {ADAPTER_CONFIG})", "Name the folder that training wrote")
    from peft import PeftConfig, get_peft_model

    remedy = "Use the base that the adapter was trained on"
    with _one_line(f"{adapter}: PEFT cannot put this adapter on the base", remedy):
        config = PeftConfig.from_pretrained(str(adapter))
        config.inference_mode = False  # as it was saved, to be loaded for training
        if config.is_prompt_learning:
            raise UserError(f"{adapter}: {config.peft_type.value} changes the input, no module", "Leave out --adapter")
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = False  # PiSSA, OLoRA and others would decompose a base that is not there
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
        if (adapter / ADAPTER_FILE).is_file():
            _require_fit(adapter, adapted)
    return adapted.train()


def _require_fit(adapter: Path, model: Any) -> None:
    """Passes an adapter file that holds what its config promises for this base, and nothing else."""
    from peft import get_peft_model_state_dict

    promised = {n: tuple(t.shape) for n, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    beside = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    found = {name: info.shape for name, info in read_header(adapter / ADAPTER_FILE).tensors.items()}
    for name, shape in found.items():
        wanted = promised.get(name, beside.get(name))
        if wanted is None:
            raise UserError(f"{adapter}: holds {name}, for which the base has no place", "Use the adapter's own base")
        if wanted != shape:
            raise UserError(
                f"{adapter}: {name} has shape {list(shape)}, this base asks for {list(wanted)}",
                "Use the base that the adapter was trained on",
            )
    missing = [name for name in promised if name not in found]
    if missing:
        raise UserError(f"{adapter}: no {missing[0]}, which {ADAPTER_CONFIG} promises", "Copy the adapter again")


@contextmanager
def _one_line(what: str, fix: str) -> Iterator[None]:
    """What transformers or PEFT raise inside becomes one line that begins with `what`; their warnings are not shown."""
    try:
        with warnings.catch_warnings(), quiet_transformers():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:  # a config that is wrong surfaces as anything
        raise UserError(f"{what} ({' '.join(str(error).split())[:160] or type(error).__name__})", fix) from None
