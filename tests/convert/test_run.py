"""The engine: bytes copied, dtypes changed without loss or not at all, shards, side files, manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.raw import raw_chunks
from qwen2tool.convert.run import Options, _files, convert
from qwen2tool.errors import UserError
from tests.checkpoint.edits import edit_config, load_state, put, rewrite
from tests.convert.common import config_of, hashes, logits, manifest_of
from tests.convert.qwen1_model import CONFIG, write_qwen1
from tests.tiny import write_shards, write_tiny


@pytest.mark.parametrize(("limit", "files"), [(10**9, 1), (150_000, 3), (1, 39)])
def test_shard_sizes_change_and_no_byte_does(base_folder, tmp_path, limit, files):
    report = convert(base_folder, tmp_path / "out", Options(max_shard_bytes=limit))
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == files and report.tensors == {"copied": 39}
    assert hashes(tmp_path / "out") == hashes(base_folder)
    assert open_checkpoint(tmp_path / "out").shards == tuple(shards)
    assert all(shard.stat().st_size < limit + 10_000 for shard in shards if files != 39)


@pytest.mark.parametrize("wide", ["float32"])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_widening_and_back_is_exact(tmp_path, wide, narrow):
    base = write_tiny(tmp_path / "base", dtype=narrow)
    convert(base, tmp_path / "wide", Options(dtype=wide))
    assert {tensor.dtype for tensor in load_state(tmp_path / "wide").values()} == {torch.float32}
    for name, tensor in load_state(tmp_path / "wide").items():
        assert torch.equal(tensor, load_state(base)[name].float())
    assert config_of(tmp_path / "wide")["torch_dtype"] == config_of(tmp_path / "wide")["dtype"] == "float32"
    convert(tmp_path / "wide", tmp_path / "back", Options(dtype=str(narrow)[6:]))
    assert hashes(tmp_path / "back") == hashes(base) and config_of(tmp_path / "back") == config_of(base)


def test_a_cast_that_rounds_is_refused(base_folder, tmp_path):
    """One number of one vector is enough."""
    wide = tmp_path / "wide"
    convert(base_folder, wide, Options(dtype="float32"))
    name = "model.layers.2.self_attn.v_proj.bias"
    put(wide, name, load_state(wide)[name] + torch.tensor([2**-20] + [0] * 31))
    with pytest.raises(UserError, match=f"{name}: BF16 would change 1 of 32 of its F32 numbers") as refused:
        convert(wide, tmp_path / "out", Options(dtype="bfloat16"))
    assert "--allow-lossy" in refused.value.fix and [path.name for path in tmp_path.iterdir()] == ["wide"]


@pytest.mark.parametrize("allow_lossy", [False, True])
def test_a_cast_that_overflows_is_refused_whatever_is_allowed(base_copy, tmp_path, allow_lossy):
    name = "model.layers.1.self_attn.k_proj.bias"
    put(base_copy, name, load_state(base_copy)[name] * 1e6)
    rewrite(base_copy, lambda state: [t.copy_(t.half().clamp(-6e4, 6e4)) for n, t in state.items() if n != name])
    with pytest.raises(UserError, match=f"{name}: holds .*beyond the range of F16"):
        convert(base_copy, tmp_path / "out", Options(dtype="float16", allow_lossy=allow_lossy))


def test_infinity_and_nan_pass_as_they_are(base_copy, tmp_path):
    """A damaged model is not made to look whole, and its values are not the cast's doing."""
    name = "model.layers.0.mlp.up_proj.weight"
    damaged = load_state(base_copy)[name]
    damaged[0, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    put(base_copy, name, damaged)
    convert(base_copy, tmp_path / "wide", Options(dtype="float32"))
    convert(tmp_path / "wide", tmp_path / "back", Options(dtype="bfloat16"))
    assert torch.equal(load_state(tmp_path / "back")[name], damaged) is False  # NaN equals nothing
    assert str(load_state(tmp_path / "back")[name][0, :3].tolist()) == "[inf, -inf, nan]"


def test_manifest(base_folder, tmp_path):
    """sha256 of every tensor, redone here from both files; no path of this machine."""
    convert(base_folder, tmp_path / "out", Options(to="llama"))
    manifest, source = manifest_of(tmp_path / "out"), open_checkpoint(base_folder)
    output = open_checkpoint(tmp_path / "out")
    assert manifest["tensors"].keys() == output.tensors.keys()
    for name, entry in manifest["tensors"].items():
        assert entry["sha256"] == hashlib.sha256(b"".join(raw_chunks(output.tensors[name]))).hexdigest()
        if name in source.tensors:
            assert (entry["how"], entry["from"]) == ("copied", [name])
            mine = hashlib.sha256(b"".join(raw_chunks(source.tensors[name]))).hexdigest()
            assert entry["source_sha256"] == mine
        else:
            assert entry["how"] == "zeros" and "source_sha256" not in entry
    assert manifest["source"]["name"] == "base" and len(manifest["source"]["fingerprint"]) == 64
    assert manifest["config"]["changed"]["model_type"] == ["qwen2", "llama"] and manifest["damage"] is None
    assert str(tmp_path) not in json.dumps(manifest) and str(base_folder.parent) not in json.dumps(manifest)


def test_unknown_keys_and_licences_come_along(base_copy, tmp_path):
    edit_config(base_copy, made_up={"a": [1]})
    for name in ("LICENSE", "LICENSE.txt", "NOTICE"):
        (base_copy / name).write_text(name)
    (base_copy / "README.md").write_text("the source's own card")
    report = convert(base_copy, tmp_path / "out")
    assert config_of(tmp_path / "out")["made_up"] == {"a": [1]}
    assert {"LICENSE", "LICENSE.txt", "NOTICE", "tokenizer.json"} <= set(report.side_files)
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "LICENSE.txt"
    assert not (tmp_path / "out" / "README.md").exists()


def test_bin_to_safetensors(base_folder, tmp_path):
    """The bytes of the tensors in torch's own file."""
    folder = write_tiny(tmp_path / "bin")
    state = load_state(folder)
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(state, folder / "pytorch_model.bin")
    report = convert(folder, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(base_folder) and report.tensors == {"copied": 39}


def test_nf4_and_back(base_folder, tmp_path):
    """Biases, norms and tables keep their bytes; the matrices come back as near as 4 bits are."""
    packed = convert(base_folder, tmp_path / "nf4", Options(to="nf4"))
    assert packed.damage is not None and packed.damage["exact"] == 18
    assert 0.05 < packed.damage["median_relative_error"] < 0.15
    report = convert(tmp_path / "nf4", tmp_path / "back")
    assert report.tensors == {"computed": 21, "copied": 18} and "do not come back" in report.lossy
    before, after = hashes(base_folder), hashes(tmp_path / "back")
    same = {name for name in before if before[name] == after[name]}
    assert len(same) == 18 and {name for name in before if name.endswith(("bias", "norm.weight"))} <= same
    assert manifest_of(tmp_path / "nf4")["tensors"]["model.layers.0.mlp.up_proj.weight"]["how"] == "packed as NF4"
    assert "quantization_config" not in config_of(tmp_path / "back")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options(to="llama", drop_biases=True), "--drop-biases makes another, far worse model"),
        (Options(drop_biases=True, allow_lossy=True), "goes with --to llama"),
        (Options(to="nf4", dtype="float16"), "--dtype does not go with --to nf4"),
        (Options(to="gguf", dtype="float16"), "--dtype does not go with --to gguf"),
        (Options(tie_head=True), "no GGUF"),
    ],
)
def test_options_that_do_not_go_together(base_folder, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        convert(base_folder, tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_was_guessed_is_refused(base_folder, tmp_path):
    save_file(load_state(base_folder), tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match="alone") as refused:
        convert(tmp_path / "alone.safetensors", tmp_path / "out")
    assert "config.json" in refused.value.fix


def test_outputs_that_would_replace_something(base_copy, tmp_path):
    (tmp_path / "taken").mkdir()
    for out, words in ((tmp_path / "taken", "already exists"), (tmp_path / "no" / "out", "no such folder")):
        with pytest.raises(UserError, match=words):
            convert(base_copy, out)
    with pytest.raises(UserError, match="would delete"):
        convert(base_copy, base_copy, overwrite=True)
    convert(base_copy, tmp_path / "taken", overwrite=True)
    assert hashes(tmp_path / "taken") == hashes(base_copy)


def test_a_table_stored_beside_a_tied_head_stays(tmp_path):
    """Redundant, but stored: nothing is lost."""
    base: Path = write_tiny(tmp_path / "base", tie_word_embeddings=True)
    state = load_state(base)
    for file in base.glob("model*"):
        file.unlink()
    write_shards(base, {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()})
    convert(base, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(base)


def test_qwen1_with_its_tokenizer(tmp_path, base_folder):
    """Thirds of c_attn are copied as they lie; the manifest names them; beyond the trained length it is said."""
    source = write_qwen1(tmp_path / "qwen1")
    report = convert(source, tmp_path / "out")
    assert set(report.tensors) == {"copied"} and report.read_as == "Qwen 1"
    entry = manifest_of(tmp_path / "out")["tensors"]["model.layers.1.self_attn.k_proj.bias"]
    assert entry["from"] == ["transformer.h.1.attn.c_attn.bias[1/3]"]
    fused = load_state(source)["transformer.h.1.attn.c_attn.bias"]
    third = len(fused) // 3
    expected = fused[third : 2 * third].view(torch.uint8).numpy().tobytes()
    assert entry["sha256"] == entry["source_sha256"] == hashlib.sha256(expected).hexdigest()
    convert(tmp_path / "out", tmp_path / "llama", Options(to="llama"))
    assert torch.equal(logits(tmp_path / "llama"), logits(tmp_path / "out"))
    with pytest.raises(UserError, match=r"no Qwen \(1\), so config.json says its length"):
        convert(base_folder, tmp_path / "long", Options(max_length=64))


def test_qwen1_beyond_its_length(tmp_path):
    source = write_qwen1(tmp_path / "qwen1", use_dynamic_ntk=True, use_logn_attn=True)
    trained = CONFIG["seq_length"]
    with pytest.raises(UserError, match=f"beyond {trained} positions"):
        convert(source, tmp_path / "out", Options(max_length=trained + 1))
    assert f"exact up to {trained} positions" in convert(source, tmp_path / "out").lossy
    convert(source, tmp_path / "short", Options(max_length=trained // 2))
    assert config_of(tmp_path / "short")["max_position_embeddings"] == trained // 2


def test_a_folder_that_holds_no_checkpoint_is_never_replaced(base_copy, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"letters: holds thesis\.txt, and is no checkpoint"):
        convert(base_copy, tmp_path / "letters", overwrite=True)
    assert [file.name for file in (tmp_path / "letters").iterdir()] == ["thesis.txt"]
    (tmp_path / "letters" / "config.json").write_text('{"editor": "vi"}')
    with pytest.raises(UserError, match=r"letters: holds config\.json, thesis\.txt, and is no"):
        convert(base_copy, tmp_path / "letters", overwrite=True)
    (tmp_path / "letters" / "config.json").write_text('{"model_type": "qwen2"}')
    convert(base_copy, tmp_path / "letters", overwrite=True)
    assert hashes(tmp_path / "letters") == hashes(base_copy)


def test_the_config_beside_a_single_file_is_part_of_what_a_resumed_run_must_share(tmp_path):
    base = write_tiny(tmp_path / "base")
    save_file(load_state(base), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_of(base)))
    before = _files(open_checkpoint(tmp_path / "model.safetensors"))
    edit_config(tmp_path, rms_norm_eps=1e-5)
    assert _files(open_checkpoint(tmp_path / "model.safetensors")) != before
