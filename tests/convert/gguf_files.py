"""GGUF files put together byte by byte, so that what reads them is not tested with what wrote them."""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path

import numpy as np
import torch

from qwen2tool.checkpoint.view import View, read

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
CODES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "BF16": 30}
"""Type codes of the specification."""
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTER, ROWS = 2, 1, 32, 64, 32, 16
TOKENS = ["a", "b", "c", "Ġ", "ab", "Ġa", "abc", "1", "2", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def string(value: str) -> bytes:
    return struct.pack("<I", STRING) + text(value)


def u32(value: int) -> bytes:
    return struct.pack("<II", U32, value)


def f32(value: float) -> bytes:
    return struct.pack("<If", F32, value)


def strings(values: list[str]) -> bytes:
    return struct.pack("<IIQ", ARRAY, STRING, len(values)) + b"".join(map(text, values))


def numbers(values: list[int]) -> bytes:
    return struct.pack(f"<IIQ{len(values)}i", ARRAY, I32, len(values), *values)


def gguf_bytes(
    metadata: dict[str, bytes], tensors: dict[str, tuple[list[int], str, bytes]], version: int = 3, alignment: int = 32
) -> bytes:
    """A whole file; a tensor is (row-major shape, type, data). Offsets follow each other, padded to `alignment`."""
    body = b"".join(text(key) + value for key, value in metadata.items())
    data = b""
    for name, (shape, kind, payload) in tensors.items():
        body += text(name) + struct.pack("<I", len(shape))
        body += b"".join(struct.pack("<Q", size) for size in reversed(shape))
        body += struct.pack("<IQ", CODES[kind], len(data))
        data += payload + bytes(-len(payload) % alignment)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata)) + body
    return head + bytes(-len(head) % alignment) + data


def small_metadata(architecture: str = "qwen2") -> dict[str, bytes]:
    """A model of one layer, 2/1 heads of 32, with a tokenizer of 16 rows, three of them unused."""
    facts = {
        "block_count": u32(1), "context_length": u32(128), "embedding_length": u32(HIDDEN),
        "feed_forward_length": u32(INTER), "attention.head_count": u32(HEADS), "attention.head_count_kv": u32(KV_HEADS),
        "attention.layer_norm_rms_epsilon": f32(1e-6), "rope.freq_base": f32(1e6),
    }  # fmt: skip
    return {
        "general.architecture": string(architecture),
        **{f"{architecture}.{key}": value for key, value in facts.items()},
        "tokenizer.ggml.model": string("gpt2"),
        "tokenizer.ggml.pre": string("qwen2"),
        "tokenizer.ggml.tokens": strings(TOKENS + [f"[PAD{i}]" for i in range(len(TOKENS), ROWS)]),
        "tokenizer.ggml.token_type": numbers([1] * 9 + [3, 3, 3, 4] + [5] * 3),
        "tokenizer.ggml.merges": strings(["a b", "Ġ a", "ab c"]),
        "tokenizer.ggml.eos_token_id": u32(11),
        "tokenizer.ggml.padding_token_id": u32(9),
        "tokenizer.ggml.bos_token_id": u32(9),
        "tokenizer.ggml.add_bos_token": struct.pack("<IB", BOOL, 0),
        "tokenizer.chat_template": string(
            "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
        ),
    }


def small_shapes() -> dict[str, list[int]]:
    """Every tensor of that model with an untied head: GGUF's name -> row-major shape."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    layer = {
        "attn_norm.weight": [HIDDEN], "attn_q.weight": [q, HIDDEN], "attn_q.bias": [q], "attn_k.weight": [kv, HIDDEN],
        "attn_k.bias": [kv], "attn_v.weight": [kv, HIDDEN], "attn_v.bias": [kv], "attn_output.weight": [HIDDEN, q],
        "ffn_norm.weight": [HIDDEN], "ffn_gate.weight": [INTER, HIDDEN], "ffn_up.weight": [INTER, HIDDEN],
        "ffn_down.weight": [HIDDEN, INTER],
    }  # fmt: skip
    top = {"token_embd.weight": [ROWS, HIDDEN], "output_norm.weight": [HIDDEN], "output.weight": [ROWS, HIDDEN]}
    return top | {f"blk.0.{name}": shape for name, shape in layer.items()}


def small_tensors(seed: int = 0) -> dict[str, tuple[list[int], str, bytes]]:
    """Random F32 tensors of those shapes."""
    dice = np.random.default_rng(seed)
    return {
        name: (shape, "F32", dice.standard_normal(prod(shape)).astype("<f4").tobytes())
        for name, shape in small_shapes().items()
    }


def write_small(path: Path, metadata: dict[str, bytes] | None = None, **changes: bytes) -> Path:
    path.write_bytes(gguf_bytes((metadata or small_metadata()) | changes, small_tensors()))
    return path


def permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k in the order of llama.cpp's "llama": one by one, from the definition of the two RoPEs."""
    head_dim = rows.shape[0] // heads
    out = torch.empty_like(rows)
    for head in range(heads):
        for pair in range(head_dim // 2):
            for side in range(2):
                out[head * head_dim + 2 * pair + side] = rows[head * head_dim + side * head_dim // 2 + pair]
    return out


def write_llama_gguf(view: View, qwen2_gguf: Path, out: Path, *, permute_biases: bool = True) -> Path:
    """`view` as llama.cpp's converter stores a llamafied Qwen2; metadata as in a GGUF file of the same model."""
    import gguf

    from qwen2tool.checkpoint.gguf_file import LAYER_NAMES, TOP_NAMES

    theirs = {ours: name for name, ours in (TOP_NAMES | LAYER_NAMES).items()}
    writer = gguf.GGUFWriter(out, "llama")
    source = gguf.GGUFReader(qwen2_gguf)
    for field in source.fields.values():
        if field.name.startswith("qwen2.") or field.name.startswith("tokenizer."):
            kind, inner = field.types[0], field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name.replace("qwen2.", "llama.", 1), field.contents(), kind, inner)
    for name, tensor in view.tensors.items():
        parts = name.split(".", 3)
        label = theirs[name] if name in theirs else f"blk.{parts[2]}.{theirs[parts[3]]}"
        numbers = read(tensor).float()
        heads = {"q": view.geometry.num_attention_heads, "k": view.geometry.num_key_value_heads}
        which = name.split("_proj.")[0][-1]
        if "_proj." in name and which in heads and "self_attn" in name and (permute_biases or "bias" not in name):
            numbers = permuted(numbers, heads[which])
        writer.add_tensor(label, numbers.numpy())
        if name.endswith("o_proj.weight"):
            writer.add_tensor(label.replace("weight", "bias"), np.zeros(len(numbers), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
