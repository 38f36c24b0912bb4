"""Dequantised numbers against hand arithmetic, rows of "llama" against its RoPE, logits against transformers."""

from __future__ import annotations

import struct
from math import prod

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qwen2tool.checkpoint.gguf_file import open_gguf
from qwen2tool.checkpoint.view import View, read
from qwen2tool.convert import gguf_read
from qwen2tool.convert.gguf_read import view_of_gguf
from qwen2tool.convert.read import open_qwen2
from qwen2tool.errors import UserError
from tests.convert.common import write_gguf
from tests.convert.gguf_files import (
    HIDDEN,
    ROWS,
    gguf_bytes,
    permuted,
    small_metadata,
    small_tensors,
    write_llama_gguf,
    write_small,
)
from tests.tiny import write_tiny


def half(value: float) -> bytes:
    return struct.pack("<e", value)


def q8_0_table() -> tuple[bytes, torch.Tensor]:
    """Blocks of 32 int8 under an fp16 scale: number = scale x int."""
    data, rows = b"", []
    for row in range(ROWS):
        for block in range(HIDDEN // 32):
            scale, ints = 2.0 ** (row % 5 - 3), [(7 * i + 13 * row + 5 * block) % 256 - 128 for i in range(32)]
            data += half(scale) + struct.pack("<32b", *ints)
            rows += [scale * i for i in ints]
    return data, torch.tensor(rows).view(ROWS, HIDDEN)


def q4_0_table() -> tuple[bytes, torch.Tensor]:
    """Blocks of 32 nibbles less 8: the first 16 numbers in the low halves of 16 bytes, the others in the high ones."""
    data, rows = b"", []
    for row in range(ROWS):
        for block in range(HIDDEN // 32):
            scale, nibbles = (row + 1) * 0.25, [(3 * i + row + block) % 16 for i in range(32)]
            data += half(scale) + bytes(nibbles[i] | nibbles[i + 16] << 4 for i in range(16))
            rows += [scale * (n - 8) for n in nibbles]
    return data, torch.tensor(rows).view(ROWS, HIDDEN)


@pytest.mark.parametrize(("kind", "table"), [("Q8_0", q8_0_table()), ("Q4_0", q4_0_table())])
def test_blocks_by_hand(tmp_path, monkeypatch, kind, table):
    monkeypatch.setattr(gguf_read, "BLOCK_ELEMENTS", 5 * HIDDEN)  # 16 rows as 5, 5, 5 and 1
    data, wanted = table
    path = tmp_path / "m.gguf"
    tensors = small_tensors() | {"token_embd.weight": ([ROWS, HIDDEN], kind, data)}
    path.write_bytes(gguf_bytes(small_metadata(), tensors))
    view = view_of_gguf(open_gguf(path))
    found = view.tensors["model.embed_tokens.weight"]
    assert found.dtype == "F32" and torch.equal(read(found), wanted)
    assert not torch.equal(read(found), wanted.roll(1, 0))
    assert kind in view.kind and kind in view.lossy and "biases are exact" in view.lossy


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats_are_read_as_they_are(tmp_path, kind):
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    table = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(3)).to(dtype)
    data = table.view(torch.uint8).numpy().tobytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(
        gguf_bytes(small_metadata(), small_tensors() | {"token_embd.weight": ([ROWS, HIDDEN], kind, data)})
    )
    view = view_of_gguf(open_gguf(path))
    assert view.lossy == "" and torch.equal(read(view.tensors["model.embed_tokens.weight"]), table)


def test_every_type_that_the_package_dequantises_is_read(tmp_path, monkeypatch):
    kinds = [k for k in gguf.GGMLQuantizationType if k.name not in ("F32", "F16", "BF16", "F64") and k.name[0] != "I"]
    readable, refused = [], []
    for kind in [*kinds, *(k for k in gguf.GGMLQuantizationType if k.name.startswith("IQ"))]:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        monkeypatch.setitem(gguf_files_codes(), kind.name, int(kind))
        data = np.random.default_rng(int(kind)).integers(0, 60, 3 * size, dtype=np.uint8).tobytes()
        path = tmp_path / f"{kind.name}.gguf"
        path.write_bytes(gguf_bytes(small_metadata(), small_tensors() | {"odd": ([3, block], kind.name, data)}))
        try:
            tensor = view_of_gguf(open_gguf(path)).tensors["odd"]
            found = read(tensor)
        except UserError as error:
            assert "odd" in error.what and kind.name in error.what
            refused.append(kind.name)
            continue
        theirs = gguf.quants.dequantize(np.frombuffer(data, dtype=np.uint8).reshape(3, size), kind)
        assert np.array_equal(found.numpy(), theirs, equal_nan=True) and found.shape == (3, block)
        parts = torch.cat([tensor.rows(slice(0, 1)), tensor.rows(slice(1, 3))])
        assert np.array_equal(parts.numpy(), theirs, equal_nan=True)
        readable.append(kind.name)
    assert {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"} <= {*readable}
    assert {"Q8_1", "Q8_K"} <= {*refused}


def gguf_files_codes() -> dict[str, int]:
    from tests.convert import gguf_files

    return gguf_files.CODES


def model_of(view: View) -> Qwen2ForCausalLM:
    fields = {key: value for key, value in view.config.items() if key not in ("architectures", "model_type")}
    model = Qwen2ForCausalLM(Qwen2Config(**fields))
    state = {name: read(tensor).float() for name, tensor in view.tensors.items()}
    if view.config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24)[None] * 11 % 300).logits


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("gguf")
    return open_qwen2(write_tiny(root / "hf", dtype=torch.float32)), root


def test_transformers_reads_the_same_model(tiny):
    """transformers' GGUF reader shares no line with this one but the gguf package's dequantisation."""
    view, root = tiny
    write_gguf(view, root / "q8.gguf", "q8_0", overwrite=True)
    theirs = AutoModelForCausalLM.from_pretrained(root, gguf_file="q8.gguf", dtype=torch.float32).eval()
    ours = logits(model_of(open_qwen2(root / "q8.gguf")))
    torch.testing.assert_close(ours, logits(theirs), rtol=0, atol=1e-5)
    assert (ours - logits(model_of(view))).abs().max() > 1e-3  # quantisation is seen at all


def test_llamas_rows_come_back_weights_and_biases(tiny):
    view, root = tiny
    qwen2 = write_gguf(view, root / "f32.gguf", "f32", overwrite=True).file
    back = open_qwen2(write_llama_gguf(view, qwen2, root / "llama.gguf"))
    assert back.config["model_type"] == "qwen2" and "Llama layout" in back.kind
    for name, tensor in view.tensors.items():
        assert torch.equal(read(back.tensors[name]), read(tensor)), name
    assert back.tensors.keys() == view.tensors.keys()
    torch.testing.assert_close(logits(model_of(back)), logits(model_of(view)), rtol=0, atol=0)
    stored = open_gguf(root / "llama.gguf").tensors["model.layers.1.self_attn.k_proj.bias"]
    assert not torch.equal(read(stored), read(view.tensors[stored.name]))


def test_a_file_whose_biases_were_not_reordered_is_another_model(tiny):
    view, root = tiny
    qwen2 = write_gguf(view, root / "f32.gguf", "f32", overwrite=True).file
    wrong = open_qwen2(write_llama_gguf(view, qwen2, root / "wrong.gguf", permute_biases=False))
    names = [n for n, t in view.tensors.items() if not torch.equal(read(wrong.tensors[n]), read(t))]
    assert len(names) == 6 and all(name.endswith(("q_proj.bias", "k_proj.bias")) for name in names)


def test_rows_are_reordered_as_the_two_rotations_ask():
    """RoPE over neighbours on reordered rows is RoPE over halves on the original ones, reordered."""
    dim, position = 8, 5.0
    angles = position * 10.0 ** -torch.arange(dim // 2)
    q = torch.randn(dim, generator=torch.Generator().manual_seed(1))
    low, high = q[: dim // 2], q[dim // 2 :]
    halves = torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()])
    even, odd = permuted(q, 1)[0::2], permuted(q, 1)[1::2]
    turned = torch.stack([even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()], 1)
    assert torch.equal(turned.flatten(), permuted(halves, 1))


def quantised_twice(tmp_path, head: torch.Tensor, table: torch.Tensor):
    kinds = {"token_embd.weight": (table, "Q4_0"), "output.weight": (head, "Q8_0")}
    blocks = {
        name: ([*t.shape], kind, gguf.quants.quantize(t.numpy(), gguf.GGMLQuantizationType[kind]).tobytes())
        for name, (t, kind) in kinds.items()
    }
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(small_metadata(), small_tensors() | blocks))
    return open_gguf(tmp_path / "m.gguf")


def test_one_table_in_two_roundings(tmp_path):
    table = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(5))
    checkpoint = quantised_twice(tmp_path, table, table)
    apart = view_of_gguf(checkpoint)
    assert apart.config["tie_word_embeddings"] is False and "head is untied" in apart.lossy
    tied = view_of_gguf(checkpoint, tie_head=True)
    assert tied.config["tie_word_embeddings"] is True and tied.geometry.tie_word_embeddings
    assert "lm_head.weight" not in tied.tensors and "untied" not in tied.lossy
    assert torch.equal(read(tied.tensors["model.embed_tokens.weight"]), read(apart.tensors["lm_head.weight"]))


def test_two_tables_are_not_tied(tmp_path):
    dice = torch.Generator().manual_seed(5)
    checkpoint = quantised_twice(tmp_path, *(torch.randn(ROWS, HIDDEN, generator=dice) for _ in range(2)))
    with pytest.raises(UserError, match="not one table"):
        view_of_gguf(checkpoint, tie_head=True)


def test_rope_factors_of_llama_3_are_refused(tmp_path):
    freqs = {"rope_freqs.weight": ([16], "F32", bytes(64))}
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(small_metadata("llama"), small_tensors() | freqs))
    with pytest.raises(UserError, match=r"rope_freqs\.weight"):
        view_of_gguf(open_gguf(tmp_path / "m.gguf"))


def test_a_missing_bias_stays_missing(tmp_path):
    tensors = small_tensors()
    del tensors["blk.0.attn_k.bias"]
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(small_metadata(), tensors))
    with pytest.raises(UserError, match=r"1 of 3 q/k/v biases are missing.*k_proj\.bias"):
        open_qwen2(tmp_path / "m.gguf")
    open_qwen2(write_small(tmp_path / "whole.gguf"))


def test_views_cost_no_data(tmp_path):
    path = write_small(tmp_path / "m.gguf")
    view = view_of_gguf(open_gguf(path))
    path.unlink()
    assert sum(prod(tensor.shape) for tensor in view.tensors.values()) == view.nbytes // 4
