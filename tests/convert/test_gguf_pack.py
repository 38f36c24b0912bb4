"""Packing, bit for bit as the `gguf` package does it, which rounds as llama.cpp's reference."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from qwen2tool.convert import gguf_pack
from qwen2tool.convert.gguf_metadata import _packed_list, _writer_class
from qwen2tool.convert.gguf_pack import pack_q8_0, unpack_q8_0

Q8_0 = gguf.GGMLQuantizationType.Q8_0


def by_gguf(rows: torch.Tensor) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.quantize(rows.numpy(), Q8_0).reshape(-1, 34)


def halves() -> torch.Tensor:
    """Blocks of scale 1: every half up to 126.5 of either sign, with the fp32 numbers next to it on both sides."""
    half = torch.arange(127) + 0.5
    near = torch.cat([half, half.nextafter(torch.tensor(0.0)), half.nextafter(torch.tensor(999.0))])
    values = torch.cat([near, -near, torch.zeros(-2 * len(near) % 31)]).view(-1, 31)
    return torch.cat([torch.full((len(values), 1), 127.0), values], 1)


def rows(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(512, 256, generator=generator)
    if kind == "bits":  # any fp32 that has a scale, subnormals and all
        bits = torch.randint(-(2**31), 2**31 - 1, (512, 256), generator=generator, dtype=torch.int64).int()
        return bits.view(torch.float32).nan_to_num(0, 0, 0).clamp(-8e6, 8e6)
    scale = {"weights": 0.05, "wide": 10.0 ** torch.linspace(-6, 6, 512)[:, None], "tiny": 1e-37, "subnormal": 1e-39}
    return {"halves": halves, "zeros": lambda: normal * 0}.get(kind, lambda: normal * scale[kind])()


@pytest.mark.parametrize("kind", ["weights", "wide", "halves", "bits", "zeros", "tiny", "subnormal"])
def test_q8_0_is_the_packages(kind):
    packed, expected = pack_q8_0(rows(kind)), by_gguf(rows(kind))
    assert np.array_equal(packed.numpy(), expected)
    assert np.array_equal(unpack_q8_0(packed).numpy(), gguf.quants.dequantize(expected, Q8_0), equal_nan=True)


def test_adding_a_half_and_cutting_off_would_not_do(monkeypatch):
    monkeypatch.setattr(gguf_pack, "BELOW_HALF", 0.5)
    assert not np.array_equal(pack_q8_0(rows("halves")).numpy(), by_gguf(rows("halves")))


@pytest.mark.parametrize(
    "values", [["a", "", "Grüße 你好"], [1, -2, 2**31 - 1], [True, False], [0.5, 2.0], [[1, 2], [3]]], ids=str
)
def test_lists_are_packed_as_the_package_packs_them(values):
    plain = gguf.GGUFWriter(None, "qwen2")
    options = {"add_vtype": True, "sub_type": None}
    expected = plain._pack_val(values, gguf.GGUFValueType.ARRAY, **options)
    assert _writer_class()(None, "qwen2")._pack_val(values, gguf.GGUFValueType.ARRAY, **options) == expected
    quick = _packed_list(values)
    assert quick == (expected if type(values[0]) in (str, int) else None)
    assert quick is None or _packed_list(values[::-1]) != expected, "the control"
