"""Small random Qwen2 checkpoints and adapters with teeth.

transformers starts q/k/v biases at 0 and PEFT starts B at 0: with those, a dropped bias or adapter changes nothing and
every test passes. Here biases are of order 1 (k heavy-tailed), norms are away from 1, B is random and alpha != rank.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny_config(**changes: Any) -> Qwen2Config:
    """GQA 4/2 heads, 3 layers, odd intermediate size, untied; theta 1e6; sliding_window set but not used."""
    fields: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 384, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "sliding_window": 32, "use_sliding_window": False, "max_window_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    return Qwen2Config(**(fields | changes))


def tiny_model(seed: int = 0, **changes: Any) -> Qwen2ForCausalLM:
    """A random fp32 model whose biases and norms matter."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(tiny_config(**changes))
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("k_proj.bias"):
            noise = noise + 3 * noise.sign() * (noise.abs() > 1.5)
        elif name.endswith("layernorm.weight") or name.endswith("model.norm.weight"):
            noise = 1 + 0.2 * noise
        elif not name.endswith("bias"):
            noise = noise * (1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
        parameter.data.copy_(noise)
    return model.eval()


def write_tokenizer(path: Path) -> None:
    """A byte-level BPE of 256 bytes, 3 special tokens and a few merges, with the ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(["the model answers the question and the user reads the answer"] * 4, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHATML}))


def write_tiny(path: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16, shards: int = 2, **changes: Any) -> Path:
    """A complete folder at `path`: config in both spellings, `shards` safetensors files, index, tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    model = tiny_model(seed, **changes)
    tied = model.config.tie_word_embeddings
    state = {k: v.to(dtype).contiguous() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    config = json.loads(model.config.to_json_string(use_diff=False))
    config |= {
        "architectures": ["Qwen2ForCausalLM"],
        "rope_theta": 1e6,
        "dtype": str(dtype)[6:],
        "torch_dtype": str(dtype)[6:],
    }
    (path / "config.json").write_text(json.dumps(config))
    write_shards(path, state, shards)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "pad_token_id": 0}))
    write_tokenizer(path)
    return path


def write_shards(path: Path, state: dict[str, torch.Tensor], shards: int = 2) -> None:
    """`state` as safetensors: one model.safetensors, or `shards` files and their index."""
    if shards == 1:
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(state)
    files = {
        name: f"model-{1 + i * shards // len(names):05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)
    }
    for file in sorted(set(files.values())):
        save_file({n: state[n] for n in names if files[n] == file}, path / file, metadata={"format": "pt"})
    total = sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def write_adapter(path: Path, base: Path, seed: int = 7, rank: int = 4, alpha: int = 12, **changes: Any) -> Path:
    """A PEFT LoRA adapter for the model at `base` with random A and B of useful size."""
    from peft import LoraConfig, get_peft_model

    model = Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32)
    fields = {"target_modules": list(TARGETS), "task_type": "CAUSAL_LM"} | changes
    peft = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, **fields))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    peft.save_pretrained(path)
    return path
