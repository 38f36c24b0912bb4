"""A folder opens only where its index and its files tell the same story."""

from __future__ import annotations

import json
import shutil
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

from qwen2tool.checkpoint.folder import open_checkpoint, require_safetensors, resolve
from qwen2tool.errors import UserError
from tests.checkpoint.files import FIRST, INDEX, SECOND, edit_json
from tests.checkpoint.torch_files import as_bins
from tests.cli_runner import run
from tests.tiny import write_tiny


def weight_map(folder) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def set_weight_map(folder, **changes) -> None:
    edit_json(folder / INDEX, weight_map=weight_map(folder) | changes)


def refused(folder, words) -> None:
    with pytest.raises(UserError, match=words) as caught:
        open_checkpoint(folder)
    assert caught.value.fix


def test_every_tensor_of_transformers(base_folder):
    checkpoint = open_checkpoint(base_folder)
    state = Qwen2ForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16).state_dict()
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
        n: tuple(t.shape) for n, t in state.items()
    }
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in state.values())
    assert [shard.name for shard in checkpoint.shards] == [FIRST, SECOND] and checkpoint.leftovers == ()


def test_single_file(tmp_path):
    checkpoint = open_checkpoint(write_tiny(tmp_path / "one", shards=1))
    assert [shard.name for shard in checkpoint.shards] == [
        "model.safetensors"
    ] and "lm_head.weight" in checkpoint.tensors


def test_missing_shard(base_copy):
    (base_copy / SECOND).unlink()
    refused(base_copy, f"names shard {SECOND} .for .*, which is not there")


def test_shard_that_is_a_folder(base_copy):
    (base_copy / SECOND).unlink()
    (base_copy / SECOND).mkdir()
    refused(base_copy, f"names shard {SECOND}")


def test_truncated_shard(base_copy):
    with (base_copy / SECOND).open("r+b") as handle:
        handle.truncate((base_copy / SECOND).stat().st_size - 1)
    refused(base_copy, rf"{SECOND}: truncated: .* is cut")


def test_tensor_that_the_index_does_not_know(base_copy):
    save_file(load_file(base_copy / FIRST) | {"stray": torch.ones(2)}, base_copy / FIRST)
    refused(base_copy, f"{FIRST}: holds tensor stray, but the index does not know it")


def test_tensor_that_the_shard_does_not_hold(base_copy):
    tensors = load_file(base_copy / FIRST)
    del tensors["model.layers.0.self_attn.q_proj.bias"]
    save_file(tensors, base_copy / FIRST)
    refused(base_copy, rf"says that model\.layers\.0\.self_attn\.q_proj\.bias is in {FIRST}, which does not hold it")


def test_tensor_in_another_shard_than_the_index_says(base_copy):
    set_weight_map(base_copy, **{"model.norm.weight": FIRST})
    refused(base_copy, f"holds tensor model.norm.weight, but the index puts it in {FIRST}")


@pytest.mark.parametrize("value", ["../base/x", "/etc/hostname", "a/b", "", ".", "..", "\0", "\ud800", None, 3, ["a"]])
def test_index_that_names_no_file(value, base_copy):
    set_weight_map(base_copy, **{"model.norm.weight": value})
    refused(base_copy, "no usable weight_map")


@pytest.mark.parametrize("value", ["model-00003-of-00003.safetensors", "z", "n" * 300])
def test_index_that_names_an_absent_file(value, base_copy):
    set_weight_map(base_copy, stray=value)
    refused(base_copy, f"names shard {value} .for stray., which is not there")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', "\x00", '{"weight_map"'])
def test_index_that_is_no_index(text, base_copy):
    (base_copy / INDEX).write_text(text)
    refused(base_copy, INDEX)


def test_index_that_lists_nothing(base_copy):
    edit_json(base_copy / INDEX, weight_map={})
    assert open_checkpoint(base_copy).tensors == {}  # `require_whole` says what is missing


def test_single_file_beside_an_index_of_others(base_copy, tmp_path):
    """transformers reads model.safetensors alone: another model than the index describes."""
    single = write_tiny(tmp_path / "single", seed=8, shards=1)
    shutil.copyfile(single / "model.safetensors", base_copy / "model.safetensors")
    refused(base_copy, r"holds model\.safetensors and an index of other shards")
    read = Qwen2ForCausalLM.from_pretrained(base_copy, dtype=torch.bfloat16).state_dict()
    stale = load_file(single / "model.safetensors")
    assert all(read[name].equal(stale[name]) for name in stale)


def test_single_file_with_its_own_index(tmp_path):
    folder = write_tiny(tmp_path / "one", shards=1)
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    assert open_checkpoint(folder).tensors.keys() == names.keys()


def test_leftovers(base_copy):
    shutil.copyfile(base_copy / FIRST, base_copy / "consolidated.safetensors")
    checkpoint = open_checkpoint(base_copy)
    assert [path.name for path in checkpoint.leftovers] == ["consolidated.safetensors"]


def test_adapter_is_no_checkpoint(adapter_folder, base_folder, tmp_path):
    refused(adapter_folder, "a PEFT adapter, not a whole checkpoint")
    refused(adapter_folder / "adapter_model.safetensors", "a PEFT adapter, not a whole checkpoint")
    both = shutil.copytree(adapter_folder, tmp_path / "both")
    shutil.copyfile(base_folder / "config.json", both / "config.json")
    refused(both, "a PEFT adapter, not a whole checkpoint")


def test_folder_without_config(base_copy):
    (base_copy / "config.json").unlink()
    refused(base_copy, "not a checkpoint .no config.json.")


def test_folder_without_weights(base_copy):
    for file in (FIRST, SECOND, INDEX):
        (base_copy / file).unlink()
    refused(base_copy, r"not a checkpoint \(no model")


def test_safetensors_come_before_bins(base_copy):
    """transformers reads them first as well."""
    (base_copy / "pytorch_model.bin").write_bytes(b"")
    checkpoint = open_checkpoint(base_copy)
    assert (checkpoint.format, checkpoint.leftovers) == ("safetensors", ())


def test_leftovers_of_bins(base_copy, tmp_path):
    as_bins(base_copy, 2)
    torch.save({"stray": torch.ones(2)}, base_copy / "pytorch_model-00003-of-00003.bin")
    torch.save({}, base_copy / "training_args.bin")
    save_file({"stray": torch.ones(2)}, base_copy / "other.safetensors")
    left = [path.name for path in open_checkpoint(base_copy).leftovers]
    assert left == ["other.safetensors", "pytorch_model-00003-of-00003.bin"]


def test_bins_and_their_index_agree(base_copy):
    as_bins(base_copy, 2)
    first = next(base_copy.glob("pytorch_model-00001*"))
    state = torch.load(first)
    torch.save(state | {"stray": torch.ones(2)}, first)
    refused(base_copy, "holds tensor stray, but the index does not know it")
    del state["model.embed_tokens.weight"]
    torch.save(state, first)
    refused(base_copy, r"says that model\.embed_tokens\.weight is in .*, which does not hold it")
    first.unlink()
    refused(base_copy, f"names shard {first.name}")


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors", "weights.bin", "weights.pth", "weights.pt"])
def test_a_single_file(name, tmp_path):
    folder = write_tiny(tmp_path / "one", shards=1)
    file, state = folder / name, load_file(folder / "model.safetensors")
    if file.suffix == ".safetensors":
        (folder / "model.safetensors").rename(file)
    else:
        torch.save(state, file)
    checkpoint = open_checkpoint(file)
    assert (checkpoint.path, checkpoint.shards, checkpoint.folder) == (file, (file,), folder)
    assert checkpoint.tensors.keys() == state.keys() and checkpoint.assumed == ()
    assert checkpoint.geometry == open_checkpoint(folder).geometry if name.startswith("model") else checkpoint.geometry
    assert checkpoint.size_of(file) == file.stat().st_size


def test_one_shard_is_no_checkpoint(base_folder):
    refused(base_folder / FIRST, "one of 2 shards")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_file_that_holds_no_weights(name, base_folder):
    refused(base_folder / name, "not a folder, nor a kind of file that holds a checkpoint")


def test_what_training_merging_and_pushing_take(base_copy, base_folder):
    require_safetensors(open_checkpoint(base_folder))
    single = write_tiny(base_copy.parent / "one", shards=1) / "model.safetensors"
    for checkpoint in (open_checkpoint(as_bins(base_copy)), open_checkpoint(single)):
        with pytest.raises(UserError, match="this needs a folder of safetensors") as caught:
            require_safetensors(checkpoint)
        assert "qwen2tool convert" in caught.value.fix


@pytest.mark.parametrize(
    "command", [("merge", "{base}", "{adapter}", "{out}"), ("push", "{base}", "me/x", "--dry-run")]
)
def test_commands_refuse_bins(command, base_copy, adapter_folder, tmp_path):
    words = {"base": as_bins(base_copy), "adapter": adapter_folder, "out": tmp_path / "out"}
    outcome = run(*(part.format(**words) for part in command))
    assert outcome.code == 2 and "stored as bin" in outcome.error and not (tmp_path / "out").exists()


def test_a_lone_gguf_and_several(tmp_path, monkeypatch):
    opened = []
    module = types.ModuleType("qwen2tool.checkpoint.gguf_file")
    module.open_gguf = opened.append
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    open_checkpoint(tmp_path), open_checkpoint(tmp_path / "a.gguf")
    assert opened == [tmp_path / "a.gguf"] * 2
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    refused(tmp_path, r"holds 2 \.gguf files \(a\.gguf, b\.gguf")


@pytest.mark.parametrize("name", ["/no/such/folder", "no-such-folder", "./runs/x", "a/b/c"])
def test_path_that_is_not_there(name):
    with pytest.raises(UserError, match="no such file or folder"):
        resolve(name)


@pytest.mark.parametrize("name", ["owner/double--dash", "owner/two..dots"])
def test_what_the_hub_calls_no_name(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="the Hub has no model of such a name"):
        resolve(name)


def test_a_path_has_no_revision(base_folder):
    with pytest.raises(UserError, match="has no revision 'main'"):
        open_checkpoint(base_folder, revision="main")


def test_links_that_lead_nowhere_are_named(base_copy):
    """What copying a snapshot of the Hub's cache without its blobs leaves."""
    (base_copy / "training_args.bin").symlink_to(base_copy / "blobs" / "0")
    assert open_checkpoint(base_copy).tensors, "nothing that the checkpoint is made of"
    for name in (FIRST, "config.json"):
        shutil.move(base_copy / name, base_copy / f"{name}.away")
        (base_copy / name).symlink_to(base_copy / "blobs" / "1")
        refused(base_copy, f"{name}: a link to a file that is not there" if name != FIRST else "a link to a file")
    for file in base_copy.glob("*.safetensors*"):
        file.unlink()
    (base_copy / "config.json").unlink()
    shutil.move(base_copy / "config.json.away", base_copy / "config.json")
    (base_copy / "model.safetensors").symlink_to(base_copy / "blobs" / "2")
    refused(base_copy, r"model\.safetensors: a link to a file that is not there")


def test_shards_without_their_index_are_an_unfinished_download(base_copy):
    (base_copy / INDEX).unlink()
    refused(base_copy, f"holds {FIRST}, but no {INDEX}")
    (base_copy / FIRST).unlink()
    refused(base_copy, f"holds {SECOND}, but no {INDEX}")
