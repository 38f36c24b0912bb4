"""A checkpoint folder as a transformers model and tokenizer, refused where anything would be lost on the way.

`from_pretrained` fills a missing bias with zeros and goes on, so the files are held against the architecture before it
runs, and the biases of the loaded model against the files after.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from qwen2tool.checkpoint.folder import Checkpoint, require_safetensors
from qwen2tool.checkpoint.inventory import BIAS_NAME, require_whole
from qwen2tool.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["float32", "bfloat16", "float16"]


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: Dtype,
    device: str = "cpu",
    nf4: bool = False,
    attention: Literal["sdpa", "eager"] = "sdpa",
) -> PreTrainedModel:
    """The model of `checkpoint` in `dtype` on `device`; with `nf4`, its linears in NF4 with double quantisation.

    Raises:
        UserError: the checkpoint is not a whole Qwen2, or a loaded bias is not the one in the file.
    """
    import torch
    from transformers import BitsAndBytesConfig, Qwen2ForCausalLM

    require_safetensors(checkpoint)
    require_whole(checkpoint)
    compute = getattr(torch, dtype)
    options: dict[str, Any] = {"dtype": compute, "attn_implementation": attention, "device_map": {"": device}}
    if nf4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    with quiet_transformers():
        model = Qwen2ForCausalLM.from_pretrained(checkpoint.path, **options)
    require_same_biases(checkpoint, model, compute)
    if nf4:
        _keep_nf4_layout(model)
    model.eval()
    return model


def _keep_nf4_layout(model: torch.nn.Module) -> None:
    """Keeps bitsandbytes from repacking NF4 weights for faster inference on CPUs with AVX512-BF16.

    It does so in place at the first pass in eval mode, and demands sizes in multiples of 32; the packed layout then
    serves neither a later training step nor a merge (a merge after it was seen to give garbage).
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def require_same_biases(checkpoint: Checkpoint, model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Passes a model in `dtype` whose biases are those of the files; what the model has no place for is not compared.

    Raises:
        UserError: a bias that is in the files did not arrive in the model.
    """
    import torch

    from qwen2tool.checkpoint.reader import read_tensor

    loaded = dict(model.named_parameters())
    for name, info in checkpoint.tensors.items():
        if not (BIAS_NAME.fullmatch(name) and name in loaded):
            continue
        if not torch.equal(loaded[name].detach().cpu(), read_tensor(info).to(dtype)):
            raise UserError(
                f"{name}: the loaded model does not hold what {info.file} does",
                "Report this with your versions: transformers changed how it loads",
            )


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `path`.

    Raises:
        UserError: there is none, or it has no chat template.
    """
    from transformers import AutoTokenizer

    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(
            f"{path}: no tokenizer (tokenizer.json)", "Copy the tokenizer files of the original model into the folder"
        )
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a damaged file surfaces as whatever its parser raises
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: the tokenizer cannot be loaded ({reason})", "Copy its files again") from None
    if not tokenizer.chat_template:
        raise UserError(
            f"{path}: the tokenizer has no chat template",
            "Copy chat_template.jinja or tokenizer_config.json of an Instruct model",
        )
    return tokenizer


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No loading bars and load reports of transformers inside; our own check says what is wrong."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
