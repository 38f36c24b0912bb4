"""A GGUF file as a checkpoint: names, config, the two architectures, split files, and what is refused."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import tracemalloc

import gguf
import numpy as np
import pytest

from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.geometry import expected_tensors
from qwen2tool.checkpoint.gguf_file import LAYER_NAMES, STORED_CONFIG, TOP_NAMES, huggingface_name, open_gguf, shortest
from qwen2tool.checkpoint.inventory import require_whole
from qwen2tool.checkpoint.view import read
from qwen2tool.convert.gguf_read import view_of_gguf
from qwen2tool.convert.gguf_tokenizer import side_files_of_gguf
from qwen2tool.errors import UserError
from tests.convert.gguf_files import (
    f32,
    gguf_bytes,
    small_metadata,
    small_tensors,
    string,
    strings,
    u32,
    write_small,
)  # fmt: skip


def test_the_whole_model_under_the_names_of_a_folder(tmp_path):
    checkpoint = open_checkpoint(write_small(tmp_path / "m.gguf"))
    assert checkpoint.format == "gguf" and checkpoint.shards == (tmp_path / "m.gguf",)
    assert {n: t.shape for n, t in checkpoint.tensors.items()} == expected_tensors(checkpoint.geometry)
    require_whole(checkpoint)


def test_config_says_what_the_metadata_say(tmp_path):
    config = open_gguf(write_small(tmp_path / "m.gguf")).config
    wanted = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "max_position_embeddings": 128, "tie_word_embeddings": False, "dtype": "float32", "torch_dtype": "float32",
        "eos_token_id": 11, "bos_token_id": 9, "use_sliding_window": False,
    }  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted
    assert "rope_scaling" not in config and "head_dim" not in config


def test_without_a_head_it_is_tied(tmp_path):
    tensors = small_tensors()
    del tensors["output.weight"]
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(small_metadata(), tensors))
    checkpoint = open_gguf(tmp_path / "m.gguf")
    assert checkpoint.config["tie_word_embeddings"] is True
    require_whole(checkpoint)


def test_yarn_and_linear_scaling(tmp_path):
    yarn = {
        "qwen2.rope.scaling.type": string("yarn"), "qwen2.rope.scaling.factor": f32(4.0),
        "qwen2.rope.scaling.original_context_length": u32(32), "qwen2.rope.scaling.yarn_beta_fast": f32(16.0),
    }  # fmt: skip
    found = open_gguf(write_small(tmp_path / "m.gguf", **yarn)).geometry.rope_scaling
    assert found == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0}
    linear = {"qwen2.rope.scaling.type": string("linear"), "qwen2.rope.scaling.factor": f32(2.0)}
    config = open_gguf(write_small(tmp_path / "m.gguf", **linear)).config
    assert config["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 2.0}


def test_a_llamafied_one_is_in_llamas_layout(tmp_path):
    path = write_small(tmp_path / "m.gguf", small_metadata("llama"))
    config = open_gguf(path).config
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert config["attention_bias"] is True
    plain = {name: tensor for name, tensor in small_tensors().items() if not name.endswith(".bias")}
    path.write_bytes(gguf_bytes(small_metadata("llama"), plain))
    assert open_gguf(path).config["attention_bias"] is False


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general.architecture": string("qwen3")}, "'qwen3'"),
        ({"general.architecture": u32(3)}, "neither 'qwen2'"),
        ({"qwen2.block_count": u32(0)}, "qwen2.block_count"),
        ({"qwen2.block_count": u32(99_999)}, "num_hidden_layers"),
        ({"qwen2.attention.head_count": strings(["2"])}, "a list of 1"),
        ({"qwen2.attention.layer_norm_rms_epsilon": f32(float("nan"))}, "rms_epsilon"),
        ({"qwen2.rope.freq_base": u32(10_000)}, "freq_base"),
        ({"qwen2.rope.dimension_count": u32(16)}, "dimension_count"),
        ({"qwen2.rope.scaling.type": string("longrope")}, "longrope"),
        ({"qwen2.rope.scaling.type": string("yarn")}, "scaling.factor is missing"),
        ({"qwen2.expert_count": u32(8)}, "mixture of experts"),
    ],
)
def test_metadata_that_are_no_qwen2_are_refused(tmp_path, changes, words):
    with pytest.raises(UserError) as caught:
        open_gguf(write_small(tmp_path / "m.gguf", **changes))
    assert words in caught.value.what, caught.value.what


def test_missing_metadata_are_named(tmp_path):
    metadata = small_metadata()
    del metadata["qwen2.embedding_length"]
    with pytest.raises(UserError, match="embedding_length is missing"):
        open_gguf(write_small(tmp_path / "m.gguf", metadata))


def test_yarn_settings_that_transformers_has_no_word_for(tmp_path):
    yarn = {"qwen2.rope.scaling.type": string("yarn"), "qwen2.rope.scaling.factor": f32(4.0)}
    key = "qwen2.rope.scaling.yarn_attn_factor"
    open_gguf(write_small(tmp_path / "m.gguf", **yarn, **{key: f32(1.0)}))
    with pytest.raises(UserError, match="yarn_attn_factor"):
        open_gguf(write_small(tmp_path / "m.gguf", **yarn, **{key: f32(0.5)}))


def test_the_table_is_bijective_and_strict():
    both = TOP_NAMES | LAYER_NAMES
    assert len(set(both.values())) == len(both)
    assert huggingface_name("blk.12.attn_q.bias") == "model.layers.12.self_attn.q_proj.bias"
    for odd in ("blk.01.attn_q.bias", "blk.-1.attn_q.bias", "blk.1.attn_x.bias", "xblk.1.attn_q.bias", "blk.1.attn_q"):
        assert huggingface_name(odd) == odd


@pytest.mark.parametrize("value", [1e-6, 1e-5, 1e6, 0.7, 123456.7])
def test_fp32_comes_back_as_the_number_that_was_meant(value):
    stored = struct.unpack("<f", struct.pack("<f", value))[0]
    assert shortest(stored) == value and (stored != value or value in (1e6,))


def test_stored_config_only_counts_while_it_describes_the_same_function(tmp_path):
    path = tmp_path / "m.gguf"
    config = open_gguf(write_small(path)).config | {"rms_norm_eps": 1.00000000001e-6, "a_note": "kept"}
    found = open_gguf(write_small(path, **{STORED_CONFIG: string(json.dumps(config))})).config
    assert found == config
    for wrong in ({"rms_norm_eps": 1e-5}, {"rope_parameters": {"rope_theta": 5e5}}, {"use_sliding_window": True,
                  "sliding_window": 8, "max_window_layers": 0}, {"hidden_size": "x"}):  # fmt: skip
        stored = string(json.dumps(config | wrong))
        found = open_gguf(write_small(path, **{STORED_CONFIG: stored})).config
        assert found["rms_norm_eps"] == 1e-6 and "a_note" not in found, wrong


def write_split(folder, tensors_a_part=4):
    writer = gguf.GGUFWriter(folder / "m.gguf", "qwen2", split_max_tensors=tensors_a_part)
    facts = {"block_count": 1, "context_length": 64, "embedding_length": 64, "feed_forward_length": 32}
    for key, value in (facts | {"attention.head_count": 2, "attention.head_count_kv": 1}).items():
        writer.add_uint32(f"qwen2.{key}", value)
    writer.add_float32("qwen2.attention.layer_norm_rms_epsilon", 1e-6)
    for name, (shape, _, data) in small_tensors().items():
        writer.add_tensor(name, np.frombuffer(data, dtype=np.float32).reshape(shape))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return sorted(folder.glob("m-*.gguf"))


def test_all_parts_of_a_split_file(tmp_path):
    parts = write_split(tmp_path)
    assert len(parts) == 4 and open_checkpoint(tmp_path).shards == tuple(parts)
    whole = open_gguf(write_small(tmp_path / "whole.gguf"))
    for part in (parts[0], parts[2]):
        checkpoint = open_gguf(part)
        assert checkpoint.shards == tuple(parts) and checkpoint.path == parts[0]
        require_whole(checkpoint)
        for name, info in whole.tensors.items():
            assert bool((read(checkpoint.tensors[name]) == read(info)).all())


def test_split_files_that_do_not_belong_together(tmp_path):
    parts = write_split(tmp_path)
    odd = tmp_path / "odd.gguf"
    odd.write_bytes(parts[1].read_bytes())
    with pytest.raises(UserError, match="which its name does not say"):
        open_gguf(odd)
    third = parts[2].read_bytes()
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(UserError, match="says it is part 1"):
        open_gguf(parts[0])
    parts[2].unlink()
    with pytest.raises(UserError, match=f"part {parts[2].name} is not there"):
        open_gguf(parts[0])
    parts[2].write_bytes(third)
    open_gguf(parts[0])


def test_opening_imports_no_torch(tmp_path):
    path = write_small(tmp_path / "m.gguf")
    code = f"import sys; from qwen2tool.checkpoint.gguf_file import open_gguf; open_gguf({str(path)!r}); "
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


EXTREMES = (0, 1, 2, 7, 8, 9, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)


def damaged(blob: bytes, dice: random.Random) -> bytes:
    """`blob` with a few bits, bytes or whole numbers of it changed, inserted or cut out."""
    data = bytearray(blob)
    for _ in range(dice.randint(1, 3)):
        place, size = dice.randrange(dice.choice((24, 600, len(data)))), dice.choice((4, 8))
        match dice.choice(("flip", "number", "number", "cut", "insert", "byte")):
            case "flip":
                data[place] ^= 1 << dice.randrange(8)
            case "byte":
                data[place] = dice.randrange(256)
            case "number":
                data[place : place + size] = (dice.choice(EXTREMES) % 2 ** (8 * size)).to_bytes(size, "little")
            case "cut":
                del data[place : place + dice.choice((1, 8, 100))]
            case "insert":
                data[place:place] = dice.randbytes(dice.choice((1, 8)))
    return bytes(data)


def use_everything(path) -> str:
    try:
        checkpoint = open_gguf(path)
        side_files_of_gguf(checkpoint)
        for tensor in view_of_gguf(checkpoint).tensors.values():
            if tensor.numel < 1 << 16:
                read(tensor)
    except UserError as error:
        assert error.what and error.fix and "\n" not in str(error)
        return "refused"
    return "passed"


def test_only_user_errors_come_out_of_damaged_files(tmp_path):
    blob = write_small(tmp_path / "good.gguf").read_bytes()
    header = open_gguf(tmp_path / "good.gguf").tensors["model.embed_tokens.weight"].start
    path, dice, refused, rounds = tmp_path / "bad.gguf", random.Random("qwen2tool gguf"), 0, 600
    tracemalloc.start()
    for _ in range(rounds):
        path.write_bytes(damaged(blob[:header], dice) + blob[header:])
        refused += use_everything(path) == "refused"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > rounds // 2 and peak < 100 * len(blob), (refused, peak, len(blob))
    assert use_everything(tmp_path / "good.gguf") == "passed"
