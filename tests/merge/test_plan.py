"""Everything that must stop a merge stops it before a byte is written, by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2tool.checkpoint.adapter import fingerprint
from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.errors import UserError
from qwen2tool.merge.plan import plan_merge
from qwen2tool.merge.run import merge
from tests.merge.common import edit_json, tensors_of, write_plain_adapter
from tests.tiny import TARGETS, write_adapter, write_shards, write_tiny

WEIGHTS = "adapter_model.safetensors"
DOWN = "base_model.model.model.layers.2.mlp.down_proj"
FIRST = "model-00001-of-00002.safetensors"


@pytest.fixture
def adapter_copy(tmp_path, adapter_folder):
    return shutil.copytree(adapter_folder, tmp_path / "adapter")


def change_adapter(adapter, change) -> None:
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS)


def refused(base, adapter, tmp_path, words, **options) -> None:
    with pytest.raises(UserError, match=words) as caught:
        merge(base, adapter, tmp_path / "out", **options)
    assert caught.value.fix and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_every_pair_has_its_one_slot(base_folder, adapter_folder):
    plan = plan_merge(base_folder, adapter_folder, "keep", False)
    slots = [slot.name for shard in plan.shards.values() for slot in shard]
    expected = {f"model.layers.{i}.{r}.{t}.weight" for i in range(3) for t in TARGETS for r in [room(t)]}
    assert set(plan.pairs) == expected
    assert sorted(slots) == sorted(plan.base.tensors) and expected < set(slots)


def room(target: str) -> str:
    return "mlp" if target in ("gate_proj", "up_proj", "down_proj") else "self_attn"


def test_pair_that_matches_nothing(base_folder, adapter_copy, tmp_path):
    def rename(tensors) -> None:
        for side in "AB":
            tensors[f"{DOWN.replace('2', '5')}.lora_{side}.weight"] = tensors.pop(f"{DOWN}.lora_{side}.weight")

    change_adapter(adapter_copy, rename)
    refused(base_folder, adapter_copy, tmp_path, "adapts model.layers.5.mlp.down_proj, which .* does not have")


def test_half_a_pair(base_folder, adapter_copy, tmp_path):
    change_adapter(adapter_copy, lambda tensors: tensors.pop(f"{DOWN}.lora_B.weight"))
    refused(base_folder, adapter_copy, tmp_path, "model.layers.2.mlp.down_proj has no lora_B")


@pytest.mark.parametrize("name", ["base_model.model.lm_head.weight", "stray", "base_model.model.x.lora_embedding_A"])
def test_tensor_that_is_no_pair(name, base_folder, adapter_copy, tmp_path):
    change_adapter(adapter_copy, lambda tensors: tensors.update({name: torch.ones(2, 2)}))
    refused(base_folder, adapter_copy, tmp_path, f"{name} is no LoRA A or B matrix")


def test_adapter_for_another_shape(adapter_folder, tmp_path):
    other = write_tiny(tmp_path / "other", intermediate_size=104)
    refused(other, adapter_folder, tmp_path, r"mlp\.\w+ is for a weight of shape \[.*100.*\], .* has \[.*104.*\]")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("side", "AB")
def test_adapter_that_is_not_finite(value, side, base_folder, adapter_copy, tmp_path):
    change_adapter(adapter_copy, lambda tensors: tensors[f"{DOWN}.lora_{side}.weight"].view(-1)[5:6].fill_(value))
    refused(base_folder, adapter_copy, tmp_path, rf"{DOWN}.lora_{side}.weight holds NaN or Inf")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "use_dora is set"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias is set"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is set"),
        ({"target_modules": ["embed_tokens"]}, "is no LoRA A or B matrix"),
        ({"target_modules": ["lm_head"]}, "lm_head.base_layer.weight is no LoRA A or B matrix"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    ],
)
def test_what_is_no_plain_lora(options, words, base_folder, tmp_path):
    """As PEFT itself writes these adapters."""
    refused(base_folder, write_adapter(tmp_path / "adapter", base_folder, **options), tmp_path, words)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_tied_head_is_no_target(tmp_path):
    base = write_tiny(tmp_path / "base", tie_word_embeddings=True)
    head = {"lm_head": (torch.ones(2, 64), torch.ones(384, 2))}
    edit_json(base / "config.json", tie_word_embeddings=False)
    write_shards(base, tensors := tensors_of(base) | {"lm_head.weight": torch.ones(384, 64, dtype=torch.bfloat16)})
    adapter = write_plain_adapter(tmp_path / "adapter", head)
    plan_merge(base, adapter, "keep", False)  # the control: an untied head is a linear as any other
    edit_json(base / "config.json", tie_word_embeddings=True)
    assert "lm_head.weight" in tensors
    refused(base, adapter, tmp_path, "adapts lm_head, which shares its table")


def test_adapter_of_another_base(base_folder, adapter_copy, tmp_path):
    other = write_tiny(tmp_path / "other", seed=3)
    (adapter_copy / "qwen2tool.json").write_text(json.dumps({"base_fingerprint": fingerprint(open_checkpoint(other))}))
    refused(base_folder, adapter_copy, tmp_path, "was trained on another base")
    assert merge(base_folder, adapter_copy, tmp_path / "out", allow_other_base=True).merged_tensors == 21
    assert merge(other, adapter_copy, tmp_path / "right").notes == ()


def test_unknown_origin_is_noted(base_folder, adapter_folder):
    assert any(
        "does not say which base" in note for note in plan_merge(base_folder, adapter_folder, "keep", False).notes
    )


def test_quantised_base(base_copy, adapter_folder, tmp_path):
    edit_json(base_copy / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refused(base_copy, adapter_folder, tmp_path, "is quantised")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_packed_weights_without_a_word_in_the_config(dtype, base_copy, adapter_folder, tmp_path):
    tensors = load_file(base_copy / FIRST)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, base_copy / FIRST, metadata={"format": "pt"})
    refused(base_copy, adapter_folder, tmp_path, f"{name} is stored as")


def test_base_that_lost_a_bias(base_copy, adapter_folder, tmp_path):
    tensors = tensors_of(base_copy)
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    write_shards(base_copy, tensors)
    refused(base_copy, adapter_folder, tmp_path, "1 of 9 q/k/v biases are missing.*layers.1.self_attn.k_proj.bias")


def test_adapter_that_changes_nothing_is_noted(base_folder, adapter_copy, tmp_path):
    change_adapter(adapter_copy, lambda tensors: tensors[f"{DOWN}.lora_B.weight"].zero_())
    assert (
        "1 of 21 pairs change nothing: A or B is all zero" in plan_merge(base_folder, adapter_copy, "keep", False).notes
    )
    change_adapter(adapter_copy, lambda tensors: [t.zero_() for name, t in tensors.items() if "lora_B" in name])
    report = merge(base_folder, adapter_copy, tmp_path / "out")
    assert report.notes[0] == "the adapter changes nothing: A or B of every pair is all zero"
    before, after = tensors_of(base_folder), tensors_of(tmp_path / "out")
    assert all(before[name].equal(after[name]) for name in before)


def notes_about_files(base, adapter) -> list[str]:
    return [note for note in plan_merge(base, adapter, "keep", False).notes if "only shapes" not in note]


def test_files_of_the_adapter_are_never_chosen_in_silence(base_copy, adapter_copy):
    settings = json.loads((base_copy / "tokenizer_config.json").read_text())
    shutil.copyfile(base_copy / "tokenizer.json", adapter_copy / "tokenizer.json")
    shutil.copyfile(base_copy / "tokenizer_config.json", adapter_copy / "tokenizer_config.json")
    (adapter_copy / "chat_template.jinja").write_text(settings["chat_template"])
    assert notes_about_files(base_copy, adapter_copy) == []  # the same template, spelled in a file of its own
    (adapter_copy / "chat_template.jinja").write_text("{{ messages }}")
    assert notes_about_files(base_copy, adapter_copy) == [
        "the chat template of the adapter differs from the base's; the base's is kept"
    ]
    (adapter_copy / "chat_template.jinja").unlink()
    (adapter_copy / "tokenizer.json").write_text("{}")
    (adapter_copy / "vocab.json").write_text("{}")
    assert notes_about_files(base_copy, adapter_copy) == [
        "tokenizer.json of the adapter differs from the base's; the base's is kept",
        "vocab.json of the adapter is left out: the base has none",
    ]
