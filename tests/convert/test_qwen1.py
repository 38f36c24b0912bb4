"""Qwen (1) read as Qwen2: the bytes are the stored ones, and the logits those of a Qwen (1) written down by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM

from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.geometry import expected_tensors, geometry
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.checkpoint.inventory import require_whole
from qwen2tool.checkpoint.view import View, read
from qwen2tool.convert.qwen1 import source_of, to_qwen2_config, view_of_qwen1
from qwen2tool.errors import EXIT_FINDING, UserError
from tests.checkpoint.edits import drop, load_state, put, rewrite
from tests.cli_runner import run
from tests.convert.qwen1_model import CONFIG, FIRST_RELEASE, State, forward, write_qwen1

FUSED = "transformer.h.1.attn.c_attn"
TOKENS = torch.randint(0, 384, (2, 200), generator=torch.Generator().manual_seed(5))


def view_of(folder: Path) -> View:
    return view_of_qwen1(open_checkpoint(folder))


def converted_logits(view: View, tokens: torch.Tensor) -> torch.Tensor:
    """What transformers' Qwen2 gives with the view's config and tensors, in fp32."""
    from transformers import Qwen2Config

    model = Qwen2ForCausalLM(Qwen2Config(**view.config)).eval()
    state = {name: read(tensor).float() for name, tensor in view.tensors.items()}
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        return model.float()(tokens).logits


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return ((left - right).abs().max() / right.std()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"kv_channels": 32}], ids=["heads fill hidden", "wider heads"])
def test_logits_are_those_of_a_qwen1(tmp_path: Path, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    folder = write_qwen1(tmp_path / "qwen1", dtype, **changes)
    truth = forward(load_state(folder), CONFIG | changes, TOKENS)
    assert distance(converted_logits(view_of(folder), TOKENS), truth) < 2e-5


def exchange(first: str, second: str) -> Callable[[State], None]:
    def edit(state: State) -> None:
        for layer in range(3):
            a, b = f"transformer.h.{layer}.{first}", f"transformer.h.{layer}.{second}"
            state[a], state[b] = state[b], state[a]

    return edit


def turn_thirds(kind: str) -> Callable[[State], None]:
    def edit(state: State) -> None:
        name = f"{FUSED}.{kind}"
        state[name] = state[name].roll(state[name].shape[0] // 3, 0)

    return edit


@pytest.mark.parametrize(
    "wrong",
    [
        exchange("mlp.w1.weight", "mlp.w2.weight"), turn_thirds("weight"), turn_thirds("bias"),
        exchange("ln_1.weight", "ln_2.weight"),
    ],
    ids=["gate and up exchanged", "thirds of a weight turned", "thirds of a bias turned", "norms exchanged"],
)  # fmt: skip
def test_another_map_gives_other_logits(tmp_path: Path, wrong: Callable[[State], None]) -> None:
    folder = write_qwen1(tmp_path / "qwen1", torch.float32)
    truth = forward(load_state(folder), CONFIG, TOKENS)
    rewrite(folder, wrong)
    assert distance(converted_logits(view_of(folder), TOKENS), truth) > 0.1


def test_every_tensor_is_a_range_of_stored_bytes(tmp_path: Path) -> None:
    folder = write_qwen1(tmp_path / "qwen1")
    state, view = load_state(folder), view_of(folder)
    for name, tensor in view.tensors.items():
        assert isinstance(tensor, TensorInfo) and tensor.name == name
        source, third = source_of(name)
        stored = state[source] if third is None else state[source].chunk(3)[third]
        assert torch.equal(read(tensor), stored) and tensor.shape == stored.shape
    assert list(view.tensors) == list(expected_tensors(view.geometry))
    assert sum(tensor.nbytes for tensor in view.tensors.values()) == sum(t.nbytes for t in state.values())


def test_the_map_is_the_published_one() -> None:
    assert source_of("model.layers.7.mlp.up_proj.weight") == ("transformer.h.7.mlp.w1.weight", None)
    assert source_of("model.layers.7.mlp.gate_proj.weight") == ("transformer.h.7.mlp.w2.weight", None)
    assert source_of("model.layers.7.self_attn.k_proj.bias") == ("transformer.h.7.attn.c_attn.bias", 1)
    assert source_of("model.layers.7.self_attn.o_proj.weight") == ("transformer.h.7.attn.c_proj.weight", None)


def test_the_config_is_a_qwen2s(tmp_path: Path) -> None:
    view = view_of(write_qwen1(tmp_path / "qwen1", seq_length=300, own_note="kept"))
    assert view.config == {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "own_note": "kept",
        "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 300, "rms_norm_eps": 1e-5, "rope_theta": 20000.0,
        "rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"}, "attention_dropout": 0.0,
        "initializer_range": 0.02, "tie_word_embeddings": False, "use_cache": True, "use_sliding_window": False,
        "vocab_size": 384, "transformers_version": "4.32.0", "dtype": "bfloat16", "torch_dtype": "bfloat16",
    }  # fmt: skip
    assert view.geometry == geometry(view.config) and view.kind == "Qwen 1"


def test_the_first_release_spelled_keys_differently(tmp_path: Path) -> None:
    later = view_of(write_qwen1(tmp_path / "later")).config
    old = {new: CONFIG[key] for key, new in FIRST_RELEASE.items()} | dict.fromkeys(FIRST_RELEASE)
    folder = write_qwen1(tmp_path / "first", vocab_size=381, padded_vocab_size=384, pos_emb="rotary")
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in (config | old).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    assert view_of(folder).config == later


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [({"bf16": True}, "bfloat16"), ({"fp16": True}, "float16"), ({"torch_dtype": "float16", "bf16": True}, "float16")],
)
def test_a_flag_names_the_dtype(flags: dict[str, Any], dtype: str) -> None:
    assert to_qwen2_config(CONFIG | flags, "float32")["dtype"] == dtype
    assert to_qwen2_config(CONFIG, "float32")["torch_dtype"] == "float32"


def test_what_it_cannot_say_is_said(tmp_path: Path) -> None:
    both = view_of(write_qwen1(tmp_path / "both"))
    assert both.lossy == (
        "exact up to 256 positions; beyond, the original raises its RoPE base (use_dynamic_ntk) and "
        "stretches its queries (use_logn_attn), which no Qwen2 does"
    )
    assert view_of(write_qwen1(tmp_path / "none", use_dynamic_ntk=False, use_logn_attn=False)).lossy == ""
    assert "use_dynamic_ntk" not in view_of(write_qwen1(tmp_path / "logn", use_dynamic_ntk=False)).lossy


def test_a_longer_claim_is_refused_where_it_would_be_false(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_qwen1(tmp_path / "both"))
    with pytest.raises(UserError, match="beyond 256 positions it raises its RoPE base"):
        view_of_qwen1(checkpoint, max_length=257)
    assert view_of_qwen1(checkpoint, max_length=256).geometry.max_position_embeddings == 256
    plain = open_checkpoint(write_qwen1(tmp_path / "none", use_dynamic_ntk=False, use_logn_attn=False))
    assert view_of_qwen1(plain, max_length=4096).config["max_position_embeddings"] == 4096


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("no_bias", False), ("rotary_pct", 0.5), ("scale_attn_weights", False), ("pos_emb", "alibi"),
        ("use_cache_quantization", True), ("apply_residual_connection_post_layernorm", True),
        ("rope_scaling", {"type": "linear", "factor": 2.0}), ("intermediate_size", 201),
    ],
)  # fmt: skip
def test_what_qwen2_does_not_have_is_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(UserError, match=key):
        view_of(write_qwen1(tmp_path / "qwen1", **{key: value}))


@pytest.mark.parametrize("value", [0, -1e-6, 10**400, float("inf"), "1e-6"])
def test_a_number_that_is_none_is_refused_where_the_folder_is_opened(tmp_path: Path, value: object) -> None:
    with pytest.raises(UserError, match=r"rms_norm_eps is .* not a positive number"):
        view_of(write_qwen1(tmp_path / "qwen1", layer_norm_epsilon=value))


@pytest.mark.parametrize("key", ["seq_length", "layer_norm_epsilon"])
def test_a_key_without_a_default_must_be_there(tmp_path: Path, key: str) -> None:
    folder = write_qwen1(tmp_path / "qwen1")
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"no {key}"):
        view_of(folder)


def test_quantised_ones_are_refused(tmp_path: Path) -> None:
    folder = write_qwen1(tmp_path / "named", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match=r"quantised \('gptq'\)"):
        view_of(folder)
    folder = write_qwen1(tmp_path / "unnamed")
    put(folder, f"{FUSED}.qweight", torch.zeros(8, 8, dtype=torch.int32))
    with pytest.raises(UserError, match="quantised"):
        view_of(folder)


def whole(folder: Path) -> None:
    """What `open_qwen2` does with the view."""
    view = view_of(folder)
    tensors: Any = view.tensors
    require_whole(replace(view.origin, config=view.config, geometry=view.geometry, tensors=tensors))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: drop(folder, f"{FUSED}.bias"),
            r"3 of 9 q/k/v biases are missing.*layers\.1\.self_attn\.q_proj",
        ),
        (lambda folder: drop(folder, "h.2.mlp.w2.weight"), r"missing.*layers\.2\.mlp\.gate_proj\.weight"),
        (lambda folder: put(folder, "transformer.visual.proj", torch.zeros(3)), r"no Qwen2 has.*transformer\.visual"),
        (lambda folder: put(folder, f"{FUSED}.bias", torch.zeros(189)), "has shape"),
    ],
)
def test_what_is_lost_or_strange_is_found(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    folder = write_qwen1(tmp_path / "qwen1")
    whole(folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        whole(folder)
    assert caught.value.exit_code == EXIT_FINDING


def test_a_fused_tensor_without_thirds_is_refused(tmp_path: Path) -> None:
    folder = write_qwen1(tmp_path / "qwen1")
    put(folder, f"{FUSED}.bias", torch.zeros(190))
    with pytest.raises(UserError, match="no three thirds"):
        view_of(folder)


def test_position_tables_of_early_savers_are_left_out(tmp_path: Path) -> None:
    folder = write_qwen1(tmp_path / "qwen1")
    put(folder, "transformer.rotary_emb.inv_freq", torch.zeros(8))
    whole(folder)


def test_inspect_says_what_it_is(tmp_path: Path) -> None:
    found = run("inspect", write_qwen1(tmp_path / "qwen1"))
    assert found.code == 1 and "not qwen2 (Qwen 1: convert it)" in found.out


def test_the_geometry_is_translated() -> None:
    shape = geometry(CONFIG)
    assert (shape.model_type, shape.intermediate_size, shape.num_key_value_heads, shape.head_dim) == (
        "qwen",
        100,
        4,
        16,
    )
    assert (shape.max_position_embeddings, shape.rope_theta, shape.rms_norm_eps) == (256, 20000.0, 1e-5)
    assert geometry({**CONFIG, "kv_channels": None}).head_dim == 128
