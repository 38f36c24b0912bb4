"""The faults of the zoo, by name; see `zoo` for what each does."""

from __future__ import annotations

import torch

from tests.verify import zoo
from tests.verify.zoo import YARN, Fault, middle, name, on_biases

BOTH = ("weight", "bias")
BIASES = [
    Fault("q biases dropped", ("bias_missing",), zoo.dropped("q"), real=True),
    Fault("k biases dropped", ("bias_missing",), zoo.dropped("k")),
    Fault("v biases dropped", ("bias_missing",), zoo.dropped("v")),
    Fault("all biases dropped", ("bias_missing",), zoo.dropped("qkv"), real=True),
    Fault(
        "renamed a Llama", ("bias_ignored",),
        config=zoo.keys(model_type="llama", architectures=["LlamaForCausalLM"], use_sliding_window=None), real=True,
    ),
    Fault("q biases zero", ("bias_zero",), on_biases("q", zoo.zero)),
    Fault("k biases zero", ("bias_zero",), on_biases("k", zoo.zero), real=True),
    Fault("v biases zero", ("bias_zero",), on_biases("v", zoo.zero)),
    Fault("v bias of the middle layer zero", ("bias_zero",), on_biases("v", zoo.zero, "middle"), real=True),
    Fault("q biases halved", ("bias_scaled",), on_biases("q", zoo.times(0.5))),
    Fault("k biases times 1.1", ("bias_scaled",), on_biases("k", zoo.times(1.1)), real=True),
    Fault(
        "v bias of the middle layer times 0.9", ("bias_scaled",),
        on_biases("v", zoo.times(0.9), "middle"), real=True,
    ),
    Fault("k bias of layer 0 with its sign flipped", ("bias_scaled",), on_biases("k", zoo.times(-1), "first")),
    Fault("k and v biases exchanged", ("bias_swapped",), zoo.projections("k", "v", ("bias",)), real=True),
    Fault(
        "k biases of layers 0 and 1 exchanged", ("bias_swapped",),
        zoo.exchange(lambda state, z: [(name(0, "k", "bias"), name(1, "k", "bias"))]), real=True,
    ),
    Fault("q biases with the heads rotated", ("bias_permuted",), on_biases("q", zoo.heads_rotated)),
    Fault("k biases with the heads rotated", ("bias_permuted",), on_biases("k", zoo.kv_heads_swapped)),
    Fault("k biases interleaved as for GGUF", ("bias_permuted",), on_biases("k", zoo.interleaved), real=True),
    Fault("v bias of layer 0 reversed", ("bias_permuted",), on_biases("v", lambda b, z: b.flip(0), "first")),
    Fault("q, k and v biases as new", ("bias_reinitialised",), on_biases("kv", zoo.fresh)),
    Fault("one entry of one k bias", ("entry_changed",), zoo.one_entry(middle("k", "bias")), real=True),
]  # fmt: skip
PLACES = [
    Fault("layers 0 and 1 exchanged", ("layer_swapped",), zoo.exchange(zoo.layers_swapped), real=True),
    Fault("the last layer is a copy of layer 0", ("layer_duplicated",), zoo.layer_doubled),
    Fault("k and v exchanged", ("bias_swapped", "weight_swapped"), zoo.projections("k", "v", BOTH), real=True),
    Fault("q and k exchanged", ("bias_swapped", "weight_swapped"), zoo.projections("q", "k", BOTH), base="mha"),
    Fault("gate and up exchanged", ("weight_swapped",), zoo.projections("gate", "up", ("weight",))),
    Fault(
        "q of the middle layer is layer 0's", ("weight_misplaced",),
        lambda state, z: state.update({name(z.middle, "q", "weight"): state[name(0, "q", "weight")].clone()}),
    ),
]  # fmt: skip
ADAPTERS = [
    Fault("adapter twice", ("adapter_twice",), zoo.with_adapter(lambda key, z: 2.0), base="adapter", real=True),
    Fault("adapter at half its scale", ("adapter_scaling",), zoo.with_adapter(lambda key, z: 0.5), base="adapter"),
    Fault("adapter not applied", ("adapter_not_applied",), zoo.with_adapter(lambda key, z: 0.0), base="adapter"),
    Fault(
        "adapter missing in layer 1", ("adapter_missing",),
        zoo.with_adapter(lambda key, z: 0.0 if "layers.1." in key else 1.0), base="adapter", real=True,
    ),
    Fault("adapter taken away", ("adapter_scaling",), zoo.with_adapter(lambda key, z: -1.0), base="adapter"),
    Fault("an update of rank 2 nobody told of", ("low_rank_update",), zoo.at(middle("up", "weight"), zoo.low_rank)),
]  # fmt: skip
CONFIG = [
    Fault("rope_theta 10000", ("rope_theta",), config=zoo.theta(1e4), real=True),
    Fault("rms_norm_eps 1e-5", ("norm_eps",), config=zoo.keys(rms_norm_eps=1e-5), real=True),
    Fault("YaRN lost", ("rope_scaling_lost",), config=zoo.scaling(None), base="yarn"),
    Fault("YaRN added", ("rope_scaling_added",), config=zoo.scaling(YARN)),
    Fault(
        "sliding attention switched on", ("sliding_window",),
        config=zoo.keys(use_sliding_window=True, sliding_window=8, max_window_layers=0, layer_types=None), real=True,
    ),
    Fault(
        "twice as many heads of half the size", ("heads_regrouped",),
        config=lambda c: {k: 2 * c[k] for k in ("num_attention_heads", "num_key_value_heads")} | {"head_dim": None},
    ),
    Fault("gelu instead of silu", ("activation",), config=zoo.keys(hidden_act="gelu")),
]  # fmt: skip
TABLES = [
    Fault(
        "tied head split",
        ("head_untied",),
        zoo.head_split,
        config=zoo.keys(tie_word_embeddings=False),
        base="tied",
        real=True,
    ),
    Fault("last rows of the vocabulary cut", ("embedding_cut",), zoo.rows_cut, config=zoo.vocabulary(-16), real=True),
    Fault("rows added to the vocabulary", ("embedding_resized",), zoo.rows_added, config=zoo.vocabulary(16)),
    Fault(
        "two rows of the embedding zero", ("rows_changed",), zoo.at(lambda z: "model.embed_tokens.weight", zoo.row_zero)
    ),
]
PRECISION = [
    Fault(
        "float16 by way of bfloat16", ("rounded_weights",),
        zoo.everywhere(lambda t: t.bfloat16().half()), base="fp32",
    ),
    Fault(
        "bfloat16 stored as float32", ("rounded_weights",),
        zoo.everywhere(lambda t: t.bfloat16().float()), base="fp32",
    ),
    Fault(
        "bfloat16 rounded twice", ("rounded_weights",),
        zoo.everywhere(lambda t: t.half().bfloat16().float()), base="fp32",
    ),
    Fault("NF4 in blocks of 64 and back", ("quantised_weights",), zoo.on_matrices(zoo.nf4(64)), real=True),
    Fault("NF4 in blocks of 128 and back", ("quantised_weights",), zoo.on_matrices(zoo.nf4(128))),
    Fault("4-bit integers in blocks of 32 and back", ("quantised_weights",), zoo.on_matrices(zoo.int4_blocks)),
    Fault("8-bit integers a row and back", ("quantised_weights",), zoo.on_matrices(zoo.int8_rows)),
]  # fmt: skip
WEIGHTS = [
    Fault("o_proj transposed", ("weight_transposed",), zoo.at(middle("o", "weight"), lambda w, z: w.T.clone())),
    Fault("norms off by one", ("norm_off_by_one",), zoo.norm_minus_one, real=True),
    Fault("norms of layer 0 all ones", ("norm_reinitialised",), zoo.at(
        lambda z: "model.layers.0.input_layernorm.weight", lambda w, z: torch.ones_like(w))),
    Fault("a NaN in down_proj", ("not_finite",), zoo.at(middle("down", "weight"), zoo.nan_inside), real=True),
    Fault("one entry of up_proj", ("entry_changed",), zoo.one_entry(middle("up", "weight"))),
    Fault("gate_proj times 1.5", ("weight_scaled",), zoo.at(middle("gate", "weight"), zoo.times(1.5))),
    Fault("rows of q_proj reversed", ("weight_permuted",), zoo.at(middle("q", "weight"), zoo.rows_reversed)),
    Fault("up_proj as new", ("weight_reinitialised",), zoo.at(middle("up", "weight"), zoo.initial)),
    Fault("down_proj zero", ("weight_zero",), zoo.at(middle("down", "weight"), zoo.zero)),
    Fault("noise on down_proj", ("unknown",), zoo.at(middle("down", "weight"), zoo.noise), real=True),
    Fault("o_proj of layer 0 missing", ("tensor_missing",), lambda s, z: s.pop(name(0, "o", "weight"))),
    Fault("a layer cut off", ("layer_missing",), lambda s, z: [s.pop(k) for k in zoo.of_layer(s, z.layers - 1)],
          config=lambda c: {"num_hidden_layers": c["num_hidden_layers"] - 1, "layer_types": None}),
    Fault("k and v heads repeated", ("kv_heads_repeated",), zoo.kv_repeated,
          config=lambda c: {"num_key_value_heads": c["num_attention_heads"]}),
]  # fmt: skip
FAULTS = [*BIASES, *PLACES, *ADAPTERS, *CONFIG, *TABLES, *PRECISION, *WEIGHTS]
