"""The whole matrix on a GPU: every dtype, base, dropout, adapter and batch over four geometries; see test_matrix.py.

Models and truths are shared by neighbours, so the order of the parameters matters: the geometry changes last.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen2tool.kernels.nf4 import dequantise_reference, from_bnb
from qwen2tool.routing.plan import find_stack
from tests.routing.test_matrix import Case, Geometry, built, check, lost_bias_ratio, other_masks_ratio
from tests.tolerances import FACTOR

pytestmark = pytest.mark.gpu

COLUMNS = 192
"""Three rows of them; 192 % 128 is 64, the length at which cuDNN's masked backward breaks."""


def geometry(**changes: Any) -> Geometry:
    return tuple(changes.items())


GEOMETRIES = {
    "gqa 28/4": geometry(
        hidden_size=3584, intermediate_size=2048, num_attention_heads=28, num_key_value_heads=4, num_hidden_layers=2
    ),
    "mha 8/8": geometry(
        hidden_size=512, intermediate_size=1000, num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=2
    ),
    "tied small": geometry(tie_word_embeddings=True),
    "vocabulary 152064": geometry(
        hidden_size=256, intermediate_size=344, vocab_size=152064, num_hidden_layers=1, rms_norm_eps=1e-5
    ),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def case_of(
    name: str, quantize: str = "none", dropout: float = 0.05, adapter: str = "on", layout: str = "left"
) -> Case:
    return Case(GEOMETRIES[name], quantize, dropout, adapter, layout, COLUMNS, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter", ["on", "off"])
@pytest.mark.parametrize("layout", ["plain", "packed", "left", "right"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_error_is_no_larger_than_the_unrouted_model_s(
    monkeypatch, record_property, name, quantize, dropout, layout, adapter, dtype
):
    record_property("ratio", check(case_of(name, quantize, dropout, adapter, layout), dtype, monkeypatch))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_lost_bias_is_outside(monkeypatch, name, quantize, dtype):
    assert lost_bias_ratio(case_of(name, quantize), dtype, monkeypatch) > 2 * FACTOR


@pytest.mark.parametrize("name", GEOMETRIES)
def test_masks_of_another_seed_are_outside(monkeypatch, name):
    assert other_masks_ratio(case_of(name), monkeypatch) > 100


def test_the_same_nf4_values_whatever_the_dtype():
    """What lets the dtypes share a truth, and the truth's own values."""
    weights = []
    for dtype in (*DTYPES, torch.float64):
        weight = (
            find_stack(built(GEOMETRIES["mha 8/8"], "nf4", dtype, "cuda"))[0].layers[0].mlp.up_proj.base_layer.weight
        )
        plain = dtype == torch.float64
        weights.append(weight.float() if plain else dequantise_reference(from_bnb(weight), torch.float32))
    assert all(torch.equal(weights[0], weight) for weight in weights[1:])
