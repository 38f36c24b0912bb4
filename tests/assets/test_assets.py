"""tiny-qwen2 is a real, trained Qwen2 whose biases matter; the demo's records are what their README says."""

from __future__ import annotations

import json
from math import exp

import pytest
import torch
from transformers import AutoModelForCausalLM

from qwen2tool.assets import (
    HELD_OUT_INSTRUCTIONS,
    HELD_OUT_PREFERENCES,
    INSTRUCTIONS,
    PREFERENCES,
    TINY_QWEN2,
    split,
)
from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.inventory import require_whole
from qwen2tool.checkpoint.load import load_tokenizer
from qwen2tool.data.encode import encode_text
from qwen2tool.data.records import read_conversations, read_preferences


def test_tiny_qwen2_is_what_the_card_says():
    checkpoint = open_checkpoint(TINY_QWEN2)
    require_whole(checkpoint)
    shape = checkpoint.geometry
    assert len(checkpoint.shards) == 2 and {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}
    assert shape.num_attention_heads > shape.num_key_value_heads and not shape.tie_word_embeddings
    assert shape.rope_theta == 1e6 and shape.sliding_layers == ()
    assert {"rope_theta", "rope_parameters", "dtype", "torch_dtype"} <= set(checkpoint.config)
    assert sum(path.stat().st_size for path in TINY_QWEN2.iterdir()) <= 4_000_000


@pytest.fixture(scope="module")
def measure():
    """Perplexity per token of the bundled held-out answers as plain text, with some biases set to zero."""
    tokenizer = load_tokenizer(TINY_QWEN2)
    lines = split(INSTRUCTIONS, HELD_OUT_INSTRUCTIONS)[1].splitlines()
    text = "\n".join(json.loads(line)["output"] for line in lines)
    rows = encode_text(tokenizer, text, 256)

    def perplexity(dropped: str) -> float:
        model = AutoModelForCausalLM.from_pretrained(TINY_QWEN2, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") and name.split("_proj")[0][-1] in dropped:
                parameter.data.zero_()
        total = count = 0.0
        for row in rows:
            ids = torch.tensor([row.ids])
            with torch.no_grad():
                total += model(ids, labels=ids).loss.item() * (len(row.ids) - 1)
            count += len(row.ids) - 1
        return exp(total / count)

    return perplexity


def test_tiny_qwen2_has_learned(measure):
    """On text of our own that it never saw: under a twentieth of what a uniform guess scores."""
    assert measure("") <= open_checkpoint(TINY_QWEN2).geometry.vocab_size / 20


@pytest.mark.parametrize(("dropped", "times"), [("qkv", 10), ("k", 1.5), ("v", 1.5), ("q", 1.5)])
def test_its_biases_matter(measure, dropped, times):
    assert measure(dropped) >= times * measure("")


def test_tokenizer_knows_chatml_and_any_text():
    tokenizer = load_tokenizer(TINY_QWEN2)
    for text in ("plain words", "  two  spaces\n\ttab", "你好, 世界", "🦜 and café"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_bundled_records():
    instructions, preferences = read_conversations(INSTRUCTIONS), read_preferences(PREFERENCES)
    assert len(instructions) >= 200 + HELD_OUT_INSTRUCTIONS and len(preferences) >= 60 + HELD_OUT_PREFERENCES
    questions = [conversation.messages[0]["content"] for conversation in instructions]
    assert len(set(questions)) == len(questions)
    train, held_out = split(INSTRUCTIONS, HELD_OUT_INSTRUCTIONS)
    assert len(held_out.splitlines()) == HELD_OUT_INSTRUCTIONS and train + held_out == INSTRUCTIONS.read_text()
