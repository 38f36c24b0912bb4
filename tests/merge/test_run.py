"""A merge is byte for byte PEFT's, touches nothing else, and is there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen2ForCausalLM

from qwen2tool.checkpoint.adapter import fingerprint
from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.errors import UserError
from qwen2tool.merge import run
from qwen2tool.merge.run import merge
from tests.merge.common import (
    INDEX,
    edit_json,
    logits,
    merged_by_peft,
    read_json,
    same_bytes,
    tensors_of,
    write_plain_adapter,
)
from tests.tiny import TARGETS, write_adapter, write_tiny

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = {
    "bf16": (BF16, 0, {}),
    "bf16, other seeds": (BF16, 11, {"rank": 5, "alpha": 9}),
    "fp16": (FP16, 1, {"rank": 8, "alpha": 3}),
    "fp32": (FP32, 2, {"rank": 3, "alpha": 48}),
    "rsLoRA": (BF16, 3, {"use_rslora": True, "rank": 6}),
    "patterns": (
        BF16,
        4,
        {
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, r"layers\.[02]\.mlp\.\w+": 7},
            "alpha_pattern": {"v_proj": 31, "up_proj": 5},
        },
    ),
    "few targets": (FP16, 5, {"target_modules": ["v_proj", "down_proj"]}),
    "one layer": (BF16, 6, {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]}),
    "head": (BF16, 7, {"target_modules": ["lm_head", "k_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_of_peft(case, tmp_path):
    dtype, seed, options = CASES[case]
    base = write_tiny(tmp_path / "base", seed=seed, dtype=dtype)
    adapter = without_base_weights(write_adapter(tmp_path / "adapter", base, seed=seed + 100, **options))
    report = merge(base, adapter, tmp_path / "out")
    before, after, truth = tensors_of(base), tensors_of(tmp_path / "out"), merged_by_peft(base, adapter)
    assert after.keys() == before.keys() == truth.keys()
    assert all(same_bytes(after[name], truth[name]) for name in truth)
    changed = {name for name in before if not same_bytes(before[name], after[name])}
    assert changed == set(report.survival) and changed  # the control: the base is another model
    assert len(changed) == len(load_file(adapter / "adapter_model.safetensors")) // 2


def without_base_weights(adapter):
    """PEFT saves the head's own weight beside an adapter that targets it; plain LoRA has none."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    plain = {name: tensor for name, tensor in tensors.items() if "base_layer" not in name}
    save_file(plain, adapter / "adapter_model.safetensors")
    return adapter


def test_bytes_are_those_of_peft_in_many_blocks(tmp_path, monkeypatch):
    """Rows of a product computed in blocks are the rows of the product: only while no block is a handful of rows."""
    base = write_tiny(tmp_path / "base", hidden_size=128, intermediate_size=515, num_hidden_layers=1)
    adapter = write_adapter(tmp_path / "adapter", base, rank=16, alpha=5)
    monkeypatch.setattr(run, "BLOCK_ELEMENTS", 1)
    merge(base, adapter, tmp_path / "out")
    after, truth = tensors_of(tmp_path / "out"), merged_by_peft(base, adapter)
    assert all(same_bytes(after[name], truth[name]) for name in truth)


def test_what_no_pair_touches_is_the_same_file_content(base_folder, adapter_folder, tmp_path):
    report = merge(base_folder, adapter_folder, tmp_path / "out")
    before, after = open_checkpoint(base_folder), open_checkpoint(tmp_path / "out")
    untouched = set(before.tensors) - set(report.survival)
    digest = {side.path: {name: sha256(info) for name, info in side.tensors.items()} for side in (before, after)}
    same = {name for name in before.tensors if digest[before.path][name] == digest[after.path][name]}
    assert same == untouched and report.byte_identical
    biases = {f"model.layers.{i}.self_attn.{p}_proj.bias" for i in range(3) for p in "qkv"}
    assert biases <= untouched
    assert (report.merged_tensors, report.untouched_tensors) == (21, len(before.tensors) - 21)


def sha256(info) -> str:
    with info.file.open("rb") as handle:
        handle.seek(info.start)
        return hashlib.sha256(handle.read(info.nbytes)).hexdigest()


def test_shards_index_and_order_are_the_bases(base_folder, adapter_folder, tmp_path):
    edited = shutil.copytree(base_folder, tmp_path / "base")
    index = read_json(edited / INDEX)
    edit_json(edited / INDEX, metadata=index["metadata"] | {"total_parameters": 17})
    merge(edited, adapter_folder, tmp_path / "out")
    assert read_json(tmp_path / "out" / INDEX) == read_json(edited / INDEX)
    shards = sorted(path.name for path in edited.glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == shards
    for shard in shards:
        with safe_open(edited / shard, "pt") as one, safe_open(tmp_path / "out" / shard, "pt") as other:
            assert one.offset_keys() == other.offset_keys() and one.metadata() == other.metadata() == {"format": "pt"}


def test_a_single_file_stays_one(tmp_path):
    base = write_tiny(tmp_path / "base", shards=1)
    edit_metadata(base / "model.safetensors", {"format": "pt", "made_by": "somebody"})
    merge(base, write_adapter(tmp_path / "adapter", base), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as merged:
        assert merged.metadata()["made_by"] == "somebody"


def edit_metadata(file, metadata) -> None:
    save_file(load_file(file), file, metadata=metadata)


def test_four_equalities_and_an_inequality(tmp_path):
    """adapter on the base == merged by PEFT == unmerged again == our merge as loaded; merged != base."""
    base = write_tiny(tmp_path / "base", dtype=FP32)
    adapter = write_adapter(tmp_path / "adapter", base)
    merge(base, adapter, tmp_path / "out")
    plain = logits(Qwen2ForCausalLM.from_pretrained(base, dtype=FP32))
    model = PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(base, dtype=FP32), adapter)
    adapted, ours = logits(model), logits(Qwen2ForCausalLM.from_pretrained(tmp_path / "out", dtype=FP32))
    model.merge_adapter()
    merged = logits(model)
    model.unmerge_adapter()
    noise = 1e-4 * plain.std()
    assert ours.equal(merged)
    assert (ours - adapted).abs().max() < noise
    assert (logits(model) - adapted).abs().max() < noise
    assert (ours - plain).abs().max() > 1000 * noise


def test_tied_base_stays_tied(tmp_path):
    base = write_tiny(tmp_path / "base", tie_word_embeddings=True)
    adapter = write_adapter(tmp_path / "adapter", base)
    merge(base, adapter, tmp_path / "out")
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    model = Qwen2ForCausalLM.from_pretrained(tmp_path / "out", dtype=BF16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    truth = merged_by_peft(base, adapter)
    assert all(same_bytes(tensor, truth[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("name", "dtype"), [("float32", FP32), ("float16", FP16), ("bfloat16", BF16)])
def test_another_dtype_rounds_once(name, dtype, base_folder, adapter_folder, tmp_path):
    report = merge(base_folder, adapter_folder, tmp_path / "out", dtype=name)
    model = PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(base_folder, dtype=FP32), adapter_folder)
    truth = model.merge_and_unload().state_dict()
    after = tensors_of(tmp_path / "out")
    assert all(same_bytes(after[key], truth[key].to(dtype)) for key in truth)
    config = read_json(tmp_path / "out" / "config.json")
    assert config["dtype"] == config["torch_dtype"] == name
    assert read_json(tmp_path / "out" / INDEX)["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    assert report.byte_identical == (dtype == BF16)


def test_a_stored_position_table_keeps_its_digits(base_folder, adapter_folder, tmp_path):
    base = shutil.copytree(base_folder, tmp_path / "base")
    name, shard = "model.layers.0.self_attn.rotary_emb.inv_freq", "model-00001-of-00002.safetensors"
    table = torch.logspace(0, -6, 8)
    save_file(load_file(base / shard) | {name: table}, base / shard, metadata={"format": "pt"})
    edit_json(base / INDEX, weight_map=read_json(base / INDEX)["weight_map"] | {name: shard})
    merge(base, adapter_folder, tmp_path / "out", dtype="float16")
    after = tensors_of(tmp_path / "out")
    assert same_bytes(after[name], table) and after["model.norm.weight"].dtype == FP16


def test_config_is_edited_and_not_saved_anew(base_folder, adapter_folder, tmp_path):
    base = shutil.copytree(base_folder, tmp_path / "base")
    edit_json(base / "config.json", invented_key={"kept": [1, 2]})
    merge(base, adapter_folder, tmp_path / "out")
    before, after = read_json(base / "config.json"), read_json(tmp_path / "out" / "config.json")
    assert after == before and after["invented_key"] == {"kept": [1, 2]}
    config = read_json(base / "config.json")
    for key in ("rope_theta", "torch_dtype"):  # as transformers 5 writes it
        config.pop(key)
    (base / "config.json").write_text(json.dumps(config))
    merge(base, adapter_folder, tmp_path / "again")
    after = read_json(tmp_path / "again" / "config.json")
    assert after["rope_theta"] == 1e6 and after["torch_dtype"] == "bfloat16"
    assert AutoConfig.from_pretrained(tmp_path / "again").rope_parameters["rope_theta"] == 1e6


def test_side_files_are_the_bases(base_folder, adapter_folder, tmp_path):
    report = merge(base_folder, adapter_folder, tmp_path / "out")
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    assert set(report.side_files) == set(names)
    assert all((tmp_path / "out" / name).read_bytes() == (base_folder / name).read_bytes() for name in names)


def test_sidecar_says_what_was_merged_without_a_path(base_folder, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base_folder, rank=4, alpha=12, rank_pattern={"q_proj": 2})
    merge(base_folder, adapter, tmp_path / "out")
    found = read_json(tmp_path / "out" / run.SIDECAR)
    assert found["base_fingerprint"] == fingerprint(open_checkpoint(base_folder))
    assert (found["base_model"], found["adapter"], found["merged_onto"]) == ("base", "adapter", "16-bit")
    assert (found["adapted_modules"], found["ranks"], found["scalings"]) == (21, [2, 4], [3.0, 6.0])
    assert found["trained_on_this_base"] is None and set(found["versions"]) == {"qwen2tool", "torch"}
    text = (tmp_path / "out" / run.SIDECAR).read_text()
    assert str(tmp_path) not in text and str(base_folder.parent) not in text


@pytest.mark.parametrize("same", [True, False])
def test_the_hub_id_of_the_adapter_counts_for_its_own_base_only(same, base_folder, adapter_folder, tmp_path):
    adapter = shutil.copytree(adapter_folder, tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="Qwen/Qwen2-Tiny")
    trained_on = base_folder if same else write_tiny(tmp_path / "other", seed=9)
    (adapter / "qwen2tool.json").write_text(f'{{"base_fingerprint": "{fingerprint(open_checkpoint(trained_on))}"}}')
    merge(base_folder, adapter, tmp_path / "out", allow_other_base=not same)
    found = read_json(tmp_path / "out" / run.SIDECAR)
    assert found["base_model"] == ("Qwen/Qwen2-Tiny" if same else "base") and found["trained_on_this_base"] is same


def test_existing_output(base_folder, adapter_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        merge(base_folder, adapter_folder, tmp_path / "out")
    with pytest.raises(UserError, match=r"out: holds mine\.txt, and is no checkpoint"):
        merge(base_folder, adapter_folder, tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "out" / "config.json").write_text('{"model_type": "qwen2"}')
    merge(base_folder, adapter_folder, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine.txt").exists() and (tmp_path / "out" / INDEX).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_never_replaces_what_is_read(base_copy, adapter_folder, tmp_path):
    adapter = shutil.copytree(adapter_folder, tmp_path / "adapter")
    (tmp_path / "trainer_state.json").write_text("{}")  # a folder that could be replaced, did it not hold them
    for out in (base_copy, adapter, tmp_path):
        with pytest.raises(UserError, match="replacing it would delete"):
            merge(base_copy, adapter, out, overwrite=True)
    assert open_checkpoint(base_copy) and (adapter / "adapter_config.json").is_file()


Q = "model.layers.1.self_attn.q_proj"


def test_beyond_fp16(base_folder, tmp_path):
    """300 * 300 = 90,000 > 65,504; bf16 holds it."""
    adapter = write_plain_adapter(tmp_path / "adapter", {Q: (torch.full((1, 64), 300.0), torch.full((64, 1), 300.0))})
    with pytest.raises(UserError, match=rf"{Q}.weight: holds values beyond the range of F16"):
        merge(base_folder, adapter, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    merge(base_folder, adapter, tmp_path / "out")
    assert tensors_of(tmp_path / "out")[f"{Q}.weight"].float().mean() == pytest.approx(90000, rel=0.01)


def test_untouched_tensor_beyond_fp16(base_copy, adapter_folder, tmp_path):
    name, shard = "model.embed_tokens.weight", "model-00001-of-00002.safetensors"
    tensors = load_file(base_copy / shard)
    tensors[name][5, 5] = 1e5
    save_file(tensors, base_copy / shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{name}: holds values beyond the range of F16"):
        merge(base_copy, adapter_folder, tmp_path / "out", dtype="float16")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_base_that_is_not_finite(value, base_copy, adapter_folder, tmp_path):
    shard = "model-00001-of-00002.safetensors"
    tensors = load_file(base_copy / shard)
    tensors["model.layers.0.self_attn.v_proj.weight"][3, 3] = value
    save_file(tensors, base_copy / shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"v_proj\.weight: the result holds NaN or Inf"):
        merge(base_copy, adapter_folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_survival_by_hand(base_copy, tmp_path):
    """At 1.0 the bf16 grid is 1/128 apart: 1/1024 is rounded away, 3/512 becomes 4/512, fp32 keeps both."""
    shard = "model-00001-of-00002.safetensors"
    tensors = load_file(base_copy / shard)
    other = "model.layers.0.self_attn.o_proj"
    for module in (Q, other):
        tensors[f"{module}.weight"].fill_(1.0)
    save_file(tensors, base_copy / shard, metadata={"format": "pt"})
    ones = torch.ones(1, 64)
    pairs = {Q: (ones / 1024, ones.T), other: (ones * 3 / 512, ones.T)}
    adapter = write_plain_adapter(tmp_path / "adapter", pairs)
    report = merge(base_copy, adapter, tmp_path / "out")
    assert report.survival[f"{Q}.weight"] == (1.0, 1.0)
    assert report.survival[f"{other}.weight"] == (pytest.approx(1 / 3), 0.0)
    assert (report.worst, report.median_survival.relative_error) == (f"{Q}.weight", pytest.approx(2 / 3))
    exact = merge(base_copy, adapter, tmp_path / "exact", dtype="float32")
    assert exact.survival[f"{Q}.weight"] == exact.survival[f"{other}.weight"] == (0.0, 0.0)


def test_all_targets_are_covered_by_the_cases():
    assert set(TARGETS) | {"lm_head"} == {
        target for _, _, options in CASES.values() for target in options.get("target_modules", TARGETS)
    }
