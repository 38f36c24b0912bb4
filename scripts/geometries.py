"""config.json of the published base models of the Qwen2 architecture, as numbers.

`SOURCES` says where each row was seen: "own" is a config.json in the model's own repository (at some revision, or
quoted verbatim), "child" one of a fine-tune or quantisation that names the model as its base and keeps these values.
Instruct and Chat siblings differ in eps, max_window_layers and max_position_embeddings, never in a tensor's shape.
Parameter totals follow from the shapes; `TOTALS` holds those that were found printed elsewhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Row(NamedTuple):
    """The values in which the models differ; `window` is sliding_window, which none of them uses."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    positions: int
    window: int
    window_layers: int
    eps: float
    theta: float = 1e6


K32, K64, K128 = 32768, 65536, 131072

ROWS = {
    "qwen1.5-0.5b": Row(1024, 2816, 24, 16, 16, 151936, True, K32, K32, 21, 1e-6),
    "qwen1.5-1.8b": Row(2048, 5504, 24, 16, 16, 151936, False, K32, K32, 21, 1e-6),
    "qwen1.5-4b": Row(2560, 6912, 40, 20, 20, 151936, False, K32, K32, 21, 1e-6, theta=5e6),
    "qwen1.5-7b": Row(4096, 11008, 32, 32, 32, 151936, False, K32, K32, 28, 1e-6),
    "qwen1.5-14b": Row(5120, 13696, 40, 40, 40, 152064, False, K32, K32, 35, 1e-6),
    "qwen1.5-32b": Row(5120, 27392, 64, 40, 8, 152064, False, K32, K32, 35, 1e-6),
    "qwen1.5-72b": Row(8192, 24576, 80, 64, 64, 152064, False, K32, K32, 28, 1e-5),
    "codeqwen1.5-7b": Row(4096, 13440, 32, 32, 4, 92416, False, K64, K64, 28, 1e-5),
    "qwen2-0.5b": Row(896, 4864, 24, 14, 2, 151936, True, K128, K128, 24, 1e-6),
    "qwen2-1.5b": Row(1536, 8960, 28, 12, 2, 151936, True, K128, K128, 28, 1e-6),
    "qwen2-7b": Row(3584, 18944, 28, 28, 4, 152064, False, K128, K128, 28, 1e-6),
    "qwen2-72b": Row(8192, 29568, 80, 64, 8, 152064, False, K128, K128, 80, 1e-5),
    "qwen2.5-0.5b": Row(896, 4864, 24, 14, 2, 151936, True, K32, K32, 24, 1e-6),
    "qwen2.5-1.5b": Row(1536, 8960, 28, 12, 2, 151936, True, K128, K128, 28, 1e-6),
    "qwen2.5-3b": Row(2048, 11008, 36, 16, 2, 151936, True, K32, K32, 36, 1e-6),
    "qwen2.5-7b": Row(3584, 18944, 28, 28, 4, 152064, False, K128, K128, 28, 1e-6),
    "qwen2.5-14b": Row(5120, 13824, 48, 40, 8, 152064, False, K128, K128, 48, 1e-5),
    "qwen2.5-32b": Row(5120, 27648, 64, 40, 8, 152064, False, K128, K128, 64, 1e-5),
    "qwen2.5-72b": Row(8192, 29568, 80, 64, 8, 152064, False, K128, K128, 80, 1e-5),
}

SOURCES = {
    "qwen1.5-0.5b": "child (RESMPDEV/Qwen1.5-Wukong-0.5B)",
    "qwen1.5-1.8b": "own, first revision (then 8192 positions); child for the rest (GreenBitAI)",
    "qwen1.5-4b": "child (aloobun/Reyna-CoT-4B-v0.1)",
    "qwen1.5-7b": "own (the Chat model); child (WDong/Qwen1.5-7B-sft-0502)",
    "qwen1.5-14b": "child (M4-ai/Hercules-Qwen1.5-14B)",
    "qwen1.5-32b": "child (KnutJaegersberg/Deita-32b)",
    "qwen1.5-72b": "child (abacusai/Liberated-Qwen1.5-72B); the Chat model has 70 window layers and eps 1e-6",
    "codeqwen1.5-7b": "own (the Chat model); child (PrunaAI/Qwen-CodeQwen1.5-7B-HQQ-1bit-smashed)",
    "qwen2-0.5b": "own, quoted (revision 91d2aff)",
    "qwen2-1.5b": "child (glouriousgautam/Qwen2-1.5b-oasstguanaco-qdora-merged)",
    "qwen2-7b": "own, quoted (the Instruct model, with 32768 positions); positions as its 0.5B, 1.5B and 72B siblings",
    "qwen2-72b": "child (Cylingo/Xinyuan-QS-72B, MaziyarPanahi/calme-2.3-qwen2-72b, which has the 80)",
    "qwen2.5-0.5b": "own, quoted (revision 060db64)",
    "qwen2.5-1.5b": "child (GramTrans/GramTrans_DSL_LR1)",
    "qwen2.5-3b": "own, quoted (citsjtu2020/LLM-Prof)",
    "qwen2.5-7b": "own, quoted (citsjtu2020/LLM-Prof)",
    "qwen2.5-14b": "own, quoted (citsjtu2020/LLM-Prof)",
    "qwen2.5-32b": "own, quoted (citsjtu2020/LLM-Prof)",
    "qwen2.5-72b": "child (raphgg/test2-2.5-72B); window from its 14B and 32B siblings",
}

TOTALS = {
    "qwen1.5-7b": 7_721_324_544,
    "codeqwen1.5-7b": 7_250_284_544,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
}


def published_config(name: str, layers: int | None = None) -> dict[str, Any]:
    """config.json of a published model, in the spelling of its time; `layers` shortens it.

    Raises:
        KeyError: no such model.
    """
    row = ROWS[name.lower()]
    special = 2 if name.lower().startswith("codeqwen") else 151643
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": special,
        "eos_token_id": special,
        "hidden_act": "silu",
        "hidden_size": row.hidden,
        "initializer_range": 0.02,
        "intermediate_size": row.intermediate,
        "max_position_embeddings": row.positions,
        "max_window_layers": row.window_layers,
        "model_type": "qwen2",
        "num_attention_heads": row.heads,
        "num_hidden_layers": layers or row.layers,
        "num_key_value_heads": row.kv_heads,
        "rms_norm_eps": row.eps,
        "rope_theta": row.theta,
        "sliding_window": row.window,
        "tie_word_embeddings": row.tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": row.vocab,
    }
