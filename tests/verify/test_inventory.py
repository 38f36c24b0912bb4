"""What the headers and config.json of two folders say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen2tool.convert.read import open_qwen2
from qwen2tool.verify.inventory import InventoryComparison, compare_inventories
from tests.verify.common import State, variant, without


def compared(reference: Path, candidate: Path) -> InventoryComparison:
    return compare_inventories(open_qwen2(reference, whole=False), open_qwen2(candidate, whole=False))


def test_a_copy_agrees_and_a_lost_bias_is_named(tmp_path: Path, base_folder: Path) -> None:
    same = compared(base_folder, variant(base_folder, tmp_path / "same", shards=3))
    assert same.agrees
    assert (same.reference_biases, same.candidate_biases) == (9, 9)
    less = variant(base_folder, tmp_path / "less", without("1.self_attn.k_proj.bias"))
    found = compared(base_folder, less)
    assert found.missing == ("model.layers.1.self_attn.k_proj.bias",)
    assert (found.reference_biases, found.candidate_biases) == (9, 8)
    assert compared(less, base_folder).extra == found.missing


def widen(state: State) -> None:
    state["model.norm.weight"] = state["model.norm.weight"].repeat(2)


def test_another_shape(tmp_path: Path, base_folder: Path) -> None:
    assert compared(base_folder, variant(base_folder, tmp_path / "wide", widen)).misshapen == ("model.norm.weight",)


def test_an_old_buffer_is_no_difference(tmp_path: Path, base_folder: Path) -> None:
    def add(state: State) -> None:
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = state["model.norm.weight"].float()

    assert compared(base_folder, variant(base_folder, tmp_path / "old", add)).agrees


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, "rope_scaling"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1}, "num_attention_heads"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding_layers"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_config_fields_that_change_the_function(
    tmp_path: Path, base_folder: Path, change: dict[str, Any], name: str
) -> None:
    assert name in compared(base_folder, variant(base_folder, tmp_path / "other", config=change)).config


def test_config_fields_that_do_not(tmp_path: Path, base_folder: Path) -> None:
    idle = {"sliding_window": 7, "max_position_embeddings": 99, "use_cache": False, "attention_dropout": 0.1}
    assert compared(base_folder, variant(base_folder, tmp_path / "idle", config=idle)).agrees


def test_a_head_that_is_neither_stored_nor_tied_is_missing(tmp_path: Path, tied_folder: Path) -> None:
    untied = variant(tied_folder, tmp_path / "untied", config={"tie_word_embeddings": False})
    assert compared(tied_folder, untied).missing == ("lm_head.weight",)
