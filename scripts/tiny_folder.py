"""The files of the ``tiny-qwen2`` folder: configuration, two shards with their index, a card filled in from figures.

The JSON is written here rather than by ``save_pretrained``, which keeps only the spellings of its own version and drops
``sliding_window`` where it is unused; published Qwen2 folders carry both.
"""

import json
import math
from pathlib import Path
from typing import Any

import tiny_tokenizer
import torch
from safetensors.torch import save_file
from tiny_tokenizer import END_OF_TEXT, IM_END

FOLDER_LIMIT = 4_000_000  # bytes

CARD = """---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
tags:
- qwen2
- test-model
---

# {name}

A Qwen2 of {parameters} parameters, trained from scratch to test tools that must not lose q, k and v biases.
It writes English-looking text and follows ChatML's turns; it knows nothing and is no use as an assistant.

{c[num_hidden_layers]} layers, hidden {c[hidden_size]}, intermediate {c[intermediate_size]}, \
{c[num_attention_heads]} query and {c[num_key_value_heads]} key/value heads,
{c[vocab_size]:,} vocabulary rows, untied head, RoPE theta 1e6; bfloat16 in two shards.

## Data

The English files of the demo data folder of LLaMA-Factory (Apache-2.0): {files}.
Of the preference pairs the chosen answers, of the tool-calling conversations the human and assistant turns; all chats
as ChatML. \
{corpus[training][documents]:,} documents ({corpus[training][tokens]:,} tokens) are for training, \
{corpus[validation][documents]:,} ({corpus[validation][tokens]:,} tokens) held out, split by a seeded hash.
The tokenizer is a byte-level BPE with Qwen2's pre-tokeniser, trained on the training documents.

## Training

AdamW with warm-up and cosine, learning rate {a[lr]:g} (biases {bias_lr:g}), \
weight decay {a[weight_decay]:g} on matrices, gradient norm clipped at 1,
{a[precision]}, {a[batch]} rows of {a[seq_len]} tokens a step, seed {a[seed]}: \
{t[tokens]:,} tokens in {t[seconds]:.0f} s on {hardware} ({versions}).
The state with the lowest held-out perplexity was kept (step {t[best_step]:,}), which favours the figures a little.
The biases started at magnitudes like those of published Qwen2 models, scaled by {a[bias_q]:g} (q), \
{a[bias_k]:g} (k) and {a[bias_v]:g} (v), and were trained with the rest.

## Held-out perplexity

Per token, in rows of {a[seq_len]} tokens, from the files as they are here (bf16 weights, fp32 arithmetic). \
A uniform guess has {c[vocab_size]:,}.

| biases set to zero | perplexity | times |
| --- | --- | --- |
{drops}

Plain text {kind[plain]:.1f}, chats {kind[chat]:.1f}; everything in bf16 arithmetic {half:.1f}.

## Biases: norm (largest entry)

| layer | q | k | v |
| --- | --- | --- | --- |
{norms}
"""


def config_dict(args: Any, tokenizer: Any) -> dict[str, Any]:
    """config.json with both spellings (rope_theta, rope_parameters; torch_dtype, dtype), for every transformers."""
    end, stop = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(IM_END)
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": end,
        "dtype": "bfloat16",
        "eos_token_id": stop,
        "hidden_act": "silu",
        "hidden_size": args.hidden,
        "initializer_range": 0.02,
        "intermediate_size": args.intermediate,
        "max_position_embeddings": 1024,
        "max_window_layers": args.layers,
        "model_type": "qwen2",
        "num_attention_heads": args.heads,
        "num_hidden_layers": args.layers,
        "num_key_value_heads": args.kv_heads,
        "pad_token_id": end,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "rope_theta": 1e6,
        "sliding_window": 1024,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": args.vocab,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented UTF-8 JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_model(model: Any, config: dict[str, Any], folder: Path) -> None:
    """Write config.json, generation_config.json and the weights: bf16, in two shards that part between layers."""
    write_json(folder / "config.json", config)
    generation = {
        "bos_token_id": config["bos_token_id"],
        "do_sample": True,
        "eos_token_id": [config["eos_token_id"], config["bos_token_id"]],
        "pad_token_id": config["pad_token_id"],
        "repetition_penalty": 1.1,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
    }
    write_json(folder / "generation_config.json", generation)
    tensors = {n: t.detach().to("cpu", torch.bfloat16).contiguous() for n, t in model.state_dict().items()}
    half = math.ceil(config["num_hidden_layers"] / 2)
    first = {f"model.layers.{index}." for index in range(half)} | {"model.embed_tokens."}
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, tensor in tensors.items():
        shards[not name.startswith(tuple(first))][name] = tensor
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors writes files that only their owner reads
        weight_map |= dict.fromkeys(shard, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_card(folder: Path, report: dict[str, Any], *, name: str) -> int:
    """Write README.md from the measured values; returns the folder's bytes, at most ``FOLDER_LIMIT``."""
    (folder / "README.md").write_text(
        card(report, json.loads((folder / "config.json").read_text()), name), encoding="utf-8"
    )
    size = sum(file.stat().st_size for file in folder.iterdir())
    if size > FOLDER_LIMIT:
        raise SystemExit(
            f"{folder} holds {size:,} bytes, past the limit of {FOLDER_LIMIT:,}: lower --layers or --vocab"
        )
    return size


def card(report: dict[str, Any], config: dict[str, Any], name: str) -> str:
    """The model card's text."""
    training, chosen, corpus = report["training"], report["arguments"], report["corpus"]
    dropped, ratio = report["perplexity_with_biases_dropped"], report["ratio_with_biases_dropped"]
    labels = {"none": "none", "all": "all of q, k, v", "q": "q alone", "k": "k alone", "v": "v alone"}
    values: dict[str, Any] = {
        "name": name,
        "parameters": f"{report['parameters']:,}",
        "files": ", ".join(f"`{file}`" for file in (*tiny_tokenizer.PLAIN_SOURCES, *tiny_tokenizer.CHAT_SOURCES)),
        "bias_lr": chosen["lr"] * chosen["bias_lr"],
        "hardware": report["hardware"],
        "versions": ", ".join(f"{package} {version}" for package, version in report["versions"].items()),
        "drops": "\n".join(f"| {text} | {dropped[key]:,.1f} | {ratio[key]:,.2f} |" for key, text in labels.items()),
        "norms": "\n".join(f"| {row} | {' | '.join(cells)} |" for row, cells in enumerate(_bias_cells(report, config))),
        "half": report["perplexity_bf16_arithmetic"],
        "c": config,
        "t": training,
        "a": chosen,
        "corpus": corpus,
        "kind": report["perplexity_by_kind"],
    }
    return CARD.format(**values)


def _bias_cells(report: dict[str, Any], config: dict[str, Any]) -> list[list[str]]:
    """Per layer, the three cells of the bias table."""
    biases = report["bias_norm_and_largest"]
    prefix = "model.layers.{}.self_attn.{}_proj.bias"
    return [
        ["{:.3g} ({:.3g})".format(*biases[prefix.format(layer, projection)]) for projection in "qkv"]
        for layer in range(config["num_hidden_layers"])
    ]
