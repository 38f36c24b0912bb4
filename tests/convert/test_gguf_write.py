"""Round trips: bit for bit where a type holds the numbers, within its precision elsewhere; the unsayable is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2tool.checkpoint.view import Derived, read
from qwen2tool.convert import gguf_pack, gguf_store
from qwen2tool.convert.gguf_write import gguf_name
from qwen2tool.convert.read import open_qwen2
from qwen2tool.errors import UserError
from tests.convert.common import write_gguf
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("hf") / "tiny")


def edited(source, path, **changes):
    """A copy of a checkpoint in one file, some tensors replaced."""
    shutil.copytree(source, path)
    state = {}
    for file in path.glob("*.safetensors"):
        state |= load_file(file)
        file.unlink()
    (path / "model.safetensors.index.json").unlink()
    for name, change in changes.items():
        change(state[name])
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("kind", ["f32", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
def test_bf16_checkpoints_come_back_bit_for_bit(tmp_path, kind, tied):
    view = open_qwen2(write_tiny(tmp_path / "hf", tie_word_embeddings=tied))
    written = write_gguf(view, tmp_path / "m.gguf", kind)
    back = open_qwen2(tmp_path / "m.gguf")
    assert back.tensors.keys() == view.tensors.keys() and back.lossy == ""
    for name, tensor in view.tensors.items():
        assert torch.equal(read(back.tensors[name]).to(torch.bfloat16), read(tensor)), name
    dtype = {"f32": "float32", "bf16": "bfloat16"}[kind]
    assert back.config == view.config | {"dtype": dtype, "torch_dtype": dtype}
    assert written.nbytes == (tmp_path / "m.gguf").stat().st_size and sum(written.kinds.values()) == len(view.tensors)
    assert ("output.weight" in {t.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}) is not tied


@pytest.mark.parametrize("own", [True, False], ids=["its own", "a copy of the table"])
def test_a_stored_head_of_a_tied_model(tmp_path, own):
    """transformers computes with the stored head whatever config.json says; one that differs must not get lost."""
    folder = write_tiny(tmp_path / "hf", tie_word_embeddings=True)
    state = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"] * (2.0 if own else 1.0)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_gguf(open_qwen2(folder), tmp_path / "m.gguf", "bf16")
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    back = open_qwen2(tmp_path / "m.gguf")
    assert ("output.weight" in names) is own and back.geometry.tie_word_embeddings is not own
    assert not own or torch.equal(read(back.tensors["lm_head.weight"]), state["lm_head.weight"])


def test_fp32_biases_are_exact_in_every_kind(tmp_path):
    view = open_qwen2(write_tiny(tmp_path / "hf", dtype=torch.float32))
    for kind in ("f32", "f16", "bf16", "q8_0"):
        write_gguf(view, tmp_path / f"{kind}.gguf", kind)
        back = open_qwen2(tmp_path / f"{kind}.gguf")
        for name, tensor in view.tensors.items():
            same = torch.equal(read(back.tensors[name]).float(), read(tensor))
            exact = kind == "f32" or len(tensor.shape) == 1 or (kind == "q8_0" and "down_proj" in name)
            assert same is exact, (kind, name)


def test_q8_0_is_off_by_half_a_scale_at_most(tmp_path, tiny):
    view = open_qwen2(tiny)
    written = write_gguf(view, tmp_path / "m.gguf", "q8_0")
    back = open_qwen2(tmp_path / "m.gguf")
    assert written.kept == tuple(f"model.layers.{i}.mlp.down_proj.weight" for i in range(3))  # 100 wide
    worst = 0.0
    for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        if tensor.tensor_type != gguf.GGMLQuantizationType.Q8_0:
            continue
        name = next(n for n in view.tensors if gguf_name(n) == tensor.name)
        scales = np.ascontiguousarray(tensor.data.reshape(-1, 34)[:, :2]).view(np.float16).astype(np.float32)
        blocks = read(view.tensors[name]).float().view(-1, 32)
        error = (read(back.tensors[name]).view(-1, 32) - blocks).abs()
        exact_scale = blocks.abs().amax(1, keepdim=True) / 127
        scale_error = (torch.from_numpy(scales) - exact_scale).abs()
        assert (scale_error <= exact_scale * 2**-11 + 2**-25).all()  # fp16, rounded once
        assert (error <= exact_scale / 2 * (1 + 1e-4) + 127 * scale_error).all()
        worst = max(worst, float((error / exact_scale).max()))
    assert 0.45 < worst < 0.57  # the bound is reached, so a looser rounding would be seen


def test_llama_cpps_metadata(tmp_path, tiny):
    write_gguf(open_qwen2(tiny), tmp_path / "m.gguf", "bf16")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    found = {key: field.contents() for key, field in fields.items()}
    wanted = {
        "general.architecture": "qwen2", "general.type": "model", "general.name": "m", "general.file_type": 32,
        "qwen2.block_count": 3, "qwen2.context_length": 512, "qwen2.embedding_length": 64,
        "qwen2.feed_forward_length": 100, "qwen2.attention.head_count": 4, "qwen2.attention.head_count_kv": 2,
        "qwen2.rope.freq_base": 1e6, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    assert {key: found[key] for key in wanted} == wanted
    assert found["qwen2.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6, rel=1e-7)
    assert len(found["tokenizer.ggml.tokens"]) == len(found["tokenizer.ggml.token_type"]) == 384
    template = json.loads((tiny / "tokenizer_config.json").read_text())["chat_template"]
    assert found["tokenizer.chat_template"] == template


def test_yarn_comes_back_and_what_gguf_cannot_say_is_refused(tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
    view = open_qwen2(write_tiny(tmp_path / "yarn", rope_parameters=yarn))
    write_gguf(view, tmp_path / "m.gguf", "f32")
    assert open_qwen2(tmp_path / "m.gguf").geometry.rope_scaling == view.geometry.rope_scaling
    for name, changes, words in (
        ("a", {"rope_parameters": yarn | {"attention_factor": 1.5}}, "attention_factor"),
        ("b", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}}, "'dynamic'"),
        ("c", {"use_sliding_window": True}, "2 layers slide"),
    ):
        with pytest.raises(UserError, match=words):
            write_gguf(open_qwen2(write_tiny(tmp_path / name, **changes)), tmp_path / "no.gguf", "f32")
    assert not (tmp_path / "no.gguf").exists()


def test_fp16_overflow_is_refused_and_leaves_nothing(tmp_path, tiny):
    name = "model.layers.1.mlp.up_proj.weight"
    view = open_qwen2(edited(tiny, tmp_path / "hf", **{name: lambda t: t[3, 5].fill_(70_000)}))
    with pytest.raises(UserError, match=f"{name}: holds 70144, which fp16"):
        write_gguf(view, tmp_path / "m.gguf", "f16")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    for kind in ("bf16", "q8_0"):
        write_gguf(view, tmp_path / "m.gguf", kind, overwrite=True)
        assert float(read(open_qwen2(tmp_path / "m.gguf").tensors[name])[3, 5]) == pytest.approx(70144, rel=1e-3)


def test_large_biases_do_not_stand_in_the_way_of_fp16(tmp_path, tiny):
    name = "model.layers.0.self_attn.k_proj.bias"
    view = open_qwen2(edited(tiny, tmp_path / "hf", **{name: lambda t: t[0].fill_(1e5)}))
    write_gguf(view, tmp_path / "m.gguf", "f16")
    assert torch.equal(read(open_qwen2(tmp_path / "m.gguf").tensors[name]).bfloat16(), read(view.tensors[name]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 9e6])
def test_numbers_without_a_q8_0_scale_are_refused(tmp_path, tiny, value):
    name = "model.layers.0.mlp.gate_proj.weight"
    view = open_qwen2(edited(tiny, tmp_path / "hf", **{name: lambda t: t[0, 0].fill_(value)}))
    with pytest.raises(UserError, match=f"{name}: holds"):
        write_gguf(view, tmp_path / "m.gguf", "q8_0")
    assert not (tmp_path / "m.gguf").exists()


def test_a_model_that_is_not_whole_is_refused(tmp_path, tiny):
    view = open_qwen2(tiny)
    tensors = dict(view.tensors)
    del tensors["model.layers.2.self_attn.v_proj.bias"]
    broken = replace(view, tensors=tensors)
    with pytest.raises(UserError, match=r"layers\.2\.self_attn\.v_proj\.bias is missing"):
        write_gguf(broken, tmp_path / "m.gguf", "f32")


def test_stored_and_computed_tensors_in_small_pieces(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(gguf_pack, "BLOCK_ELEMENTS", 1000)
    view = open_qwen2(tiny)
    name = "model.layers.1.mlp.up_proj.weight"
    stored = view.tensors[name]
    scaled = Derived(
        name=name, dtype="F32", shape=stored.shape, sources=(stored,), compute=lambda: read(stored).float() * 3.1
    )
    view = replace(view, tensors=dict(view.tensors) | {name: scaled})
    seen: list[str] = []
    write_gguf(view, tmp_path / "m.gguf", "f32", on_tensor=lambda name, size: seen.append(name))
    back = open_qwen2(tmp_path / "m.gguf")
    assert sorted(seen) == sorted(view.tensors)
    for name, tensor in view.tensors.items():
        assert torch.equal(read(back.tensors[name]), read(tensor).float()), name


def test_gguf_to_gguf_keeps_config_and_tokenizer(tmp_path, tiny):
    (tmp_path / "again").mkdir()
    write_gguf(open_qwen2(tiny), tmp_path / "m.gguf", "bf16")
    write_gguf(open_qwen2(tmp_path / "m.gguf"), tmp_path / "again" / "m.gguf", "bf16")
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "again" / "m.gguf").read_bytes()


def test_outputs_are_not_overwritten_unasked(tmp_path, tiny):
    view = open_qwen2(tiny)
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        write_gguf(view, tmp_path / "m.gguf", "f32")
    with pytest.raises(UserError, match=r"ends in \.gguf"):
        write_gguf(view, tmp_path / "m.bin", "f32")
    with pytest.raises(UserError, match="no such folder"):
        write_gguf(view, tmp_path / "nowhere" / "m.gguf", "f32")
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_a_full_disk_leaves_the_old_file(tmp_path, tiny, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "m.gguf").write_text("mine")
    (tmp_path / ".m.gguf.resume-0123").mkdir()
    (tmp_path / ".m.gguf.resume-0123" / "m.gguf.unfinished").write_text("of a killed run of another command")
    monkeypatch.setattr(gguf_store, "write_data", full)
    with pytest.raises(UserError, match="disk full"):
        write_gguf(open_qwen2(tiny), tmp_path / "m.gguf", "f32", overwrite=True)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("m.gguf", "mine")]
