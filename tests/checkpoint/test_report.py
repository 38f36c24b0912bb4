"""inspect's verdict, findings and notes on whole checkpoints and each kind of damage; numbers against transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen2tool.checkpoint.report import Report, inspect_checkpoint
from qwen2tool.checkpoint.show import print_report
from tests.checkpoint.edits import INDEX, QKV_BIASES, drop, edit_config, edit_json, load_state, put, rewrite
from tests.tiny import write_tiny

K1 = "model.layers.1.self_attn.k_proj.bias"


def section(folder: Path, name: str):
    return inspect_checkpoint(folder).to_json()[name]


def assert_wrong(report: Report, verdict: str, *words: str) -> None:
    assert (report.verdict, report.exit_code) == (verdict, 1)
    assert len(report.findings) == 1, report.findings
    assert all(word in report.findings[0] for word in words), report.findings


def test_a_whole_checkpoint(base_folder):
    report = inspect_checkpoint(base_folder)
    assert (report.verdict, report.findings, report.exit_code) == ("qwen2", (), 0)
    assert report.to_json()["schema_version"] == 2
    assert json.loads(json.dumps(report.to_json())) == report.to_json()


def test_facts_are_those_of_transformers(base_folder):
    model = Qwen2ForCausalLM.from_pretrained(base_folder)
    found = inspect_checkpoint(base_folder).to_json()
    assert found["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    tables = model.lm_head.weight.numel() + model.model.embed_tokens.weight.numel()
    assert found["parameters"]["without_embedding"] == found["parameters"]["total"] - tables
    assert found["tensors"]["count"] == len(model.state_dict()) == 39
    assert found["tensors"]["dtypes"] == {"BF16": {"tensors": 39, "numbers": found["parameters"]["total"]}}
    assert found["geometry"]["head_dim"] == model.model.layers[0].self_attn.head_dim == 16
    assert found["geometry"]["group_size"] == model.model.layers[0].self_attn.num_key_value_groups == 2
    assert found["files"]["bytes"] == sum(f.stat().st_size for f in base_folder.glob("*.safetensors"))
    assert found["files"]["declared_bytes"] == found["files"]["tensor_bytes"] == 2 * found["parameters"]["total"]
    counted = {key: found["biases"][key] for key in ("expected", "present", "missing", "extra", "dtypes", "zero")}
    assert counted == {"expected": 9, "present": 9, "missing": 0, "extra": [], "dtypes": {"BF16": 9}, "zero": []}
    rope = {key: found["rope"][key] for key in ("theta", "scaling", "disagreement")}
    assert rope == {"theta": 1e6, "scaling": None, "disagreement": None}
    assert found["files"]["shards"][0]["metadata"] == {"format": "pt"}
    assert (found["chat_template"], found["generation"]["file"]) == ("tokenizer_config.json", True)
    assert found["quantization"] == {"config": None, "evidence": {}}


def test_one_missing_bias_is_named(base_copy):
    drop(base_copy, K1)
    report = inspect_checkpoint(base_copy)
    assert_wrong(report, "qwen2 with missing biases", "1 of 9", K1)
    biases = report.to_json()["biases"]
    assert biases["layers"]["1"] == {"q": "present", "k": "missing", "v": "present"}
    assert biases["layers"]["0"]["k"] == "present" and biases["missing"] == 1


def test_all_biases_missing(base_copy):
    drop(base_copy, *QKV_BIASES)
    assert_wrong(inspect_checkpoint(base_copy), "qwen2 with missing biases", "9 of 9")


def test_a_llama_layout_with_the_biases(base_copy):
    edit_config(base_copy, model_type="llama", attention_bias=True)
    report = inspect_checkpoint(base_copy)
    assert (report.verdict, report.exit_code, report.findings) == ("llama layout with qwen2 biases", 1, ())
    assert any("3 o_proj biases" in note for note in report.notes)


def test_a_llama_layout_that_will_drop_the_biases(base_copy):
    edit_config(base_copy, model_type="llama")
    report = inspect_checkpoint(base_copy)
    assert_wrong(report, "llama layout with qwen2 biases", "attention_bias", "9 q/k/v biases")
    assert report.judgement.state == "WRONG" and "attention_bias" in report.headline and "drop" in report.headline
    edit_config(base_copy, attention_bias=True)
    assert inspect_checkpoint(base_copy).judgement.state == "sound"


@pytest.mark.parametrize(("value", "words"), [(0.0, "converted back to Qwen2 without loss"), (1.0, "no way back")])
def test_a_llama_layout_with_an_o_bias(base_copy, value, words):
    """Zeros are what a lossless conversion adds; a trained one has no place in a Qwen2."""
    edit_config(base_copy, model_type="llama", attention_bias=True)
    fresh = {f"model.layers.{i}.self_attn.o_proj.bias": torch.zeros(64) for i in range(3)}
    fresh["model.layers.2.self_attn.o_proj.bias"][5] = value
    rewrite(base_copy, lambda state: state.update(fresh))
    report = inspect_checkpoint(base_copy)
    assert report.findings == () and report.to_json()["biases"]["extra"] == ["0.o", "1.o", "2.o"]
    assert [words in note for note in report.notes if "that no Qwen2 has" in note] == [True]
    assert report.judgement.biases_sound and report.exit_code == 1


def test_a_llama_layout_without_biases(base_copy):
    edit_config(base_copy, model_type="llama")
    drop(base_copy, *QKV_BIASES)
    report = inspect_checkpoint(base_copy)
    assert (report.verdict, report.exit_code, report.findings) == ("llama layout without biases", 1, ())


def test_a_llama_layout_that_lost_some_biases(base_copy):
    edit_config(base_copy, model_type="llama", attention_bias=True)
    drop(base_copy, K1)
    assert_wrong(inspect_checkpoint(base_copy), "llama layout with qwen2 biases", K1)


def test_another_architecture(base_copy):
    edit_config(base_copy, model_type="mistral")
    report = inspect_checkpoint(base_copy)
    assert (report.verdict, report.exit_code) == ("not qwen2 (model_type is 'mistral')", 1)


def test_other_names_are_not_qwen2_whatever_config_says(base_copy):
    def rename(state):
        for name in list(state):
            state[name.replace("model.layers.", "transformer.h.")] = state.pop(name)

    rewrite(base_copy, rename)
    report = inspect_checkpoint(base_copy)
    assert report.verdict == "not qwen2 (model_type is 'qwen2', but no tensor is named model.layers.*)"


def test_a_missing_weight(base_copy):
    drop(base_copy, "model.layers.2.mlp.up_proj.weight")
    assert_wrong(inspect_checkpoint(base_copy), "qwen2", "1 tensor is missing", "model.layers.2.mlp.up_proj.weight")


def test_a_misshapen_bias(base_copy):
    put(base_copy, K1, torch.ones(16))
    assert_wrong(inspect_checkpoint(base_copy), "qwen2", K1, "[16]", "[32]")


def test_an_extra_bias(base_copy):
    put(base_copy, "model.layers.0.self_attn.o_proj.bias", torch.ones(64))
    report = inspect_checkpoint(base_copy)
    assert_wrong(report, "qwen2", "1 tensor is there that no such model has", "o_proj.bias")
    assert report.to_json()["biases"]["extra"] == ["0.o"]


def test_a_tied_head(tmp_path):
    folder = write_tiny(tmp_path / "tied", tie_word_embeddings=True)
    model = Qwen2ForCausalLM.from_pretrained(folder)
    report = inspect_checkpoint(folder)
    assert report.to_json()["head"] == {"tied": True, "lm_head": "absent"}
    assert report.to_json()["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    put(folder, "lm_head.weight", model.model.embed_tokens.weight.detach().bfloat16().clone())
    stored = inspect_checkpoint(folder)
    assert stored.to_json()["head"] == {"tied": True, "lm_head": "present"} and stored.exit_code == 0
    assert stored.to_json()["parameters"] == report.to_json()["parameters"]


SLIDING = [
    ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, [1, 2]),
    ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3}, []),
    ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 70}, []),
    ({"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 1}, []),
]


@pytest.mark.parametrize(("flags", "layers"), SLIDING, ids=["below", "at the layers (QwQ)", "above", "flag off"])
def test_sliding_layers_are_those_of_transformers(base_copy, flags, layers):
    edit_config(base_copy, layer_types=None, **flags)
    truth = Qwen2Config.from_dict(json.loads((base_copy / "config.json").read_text())).layer_types
    report = inspect_checkpoint(base_copy)
    assert report.to_json()["sliding"] == {**flags, "layer_types": False, "layers": layers}
    assert layers == [i for i, kind in enumerate(truth) if kind == "sliding_attention"]
    assert any("sliding_window 32 is set but unused" in note for note in report.notes) == (not layers)
    assert report.exit_code == 0


def test_rope_scaling_in_either_spelling(base_copy):
    scaling = {"factor": 4.0, "original_max_position_embeddings": 128}
    wanted = {"rope_type": "yarn", **scaling}
    edit_config(base_copy, rope_parameters=None, rope_scaling={"type": "yarn", **scaling})
    rope = section(base_copy, "rope")
    assert (rope["theta"], rope["scaling"], rope["spelled_in"], rope["disagreement"]) == (
        1e6, wanted, ["rope_theta"], None
    )  # fmt: skip
    assert set(rope["readers"]) == {"transformers 5", "transformers 4", "older"}
    assert all(found == {"theta": 1e6, "scaling": wanted} for found in rope["readers"].values())
    edit_config(base_copy, rope_scaling=None, rope_theta=None, rope_parameters={"rope_theta": 1e6, **wanted})
    report = inspect_checkpoint(base_copy)
    assert report.to_json()["rope"]["scaling"] == wanted
    assert report.exit_code == 0 and any("transformers 4 will read 10000" in note for note in report.notes)
    readers = report.to_json()["rope"]["readers"]
    assert readers["transformers 5"] == {"theta": 1e6, "scaling": wanted}
    assert readers["transformers 4"] == readers["older"] == {"theta": 10000.0, "scaling": None}


def test_readers_of_before_rope_type_need_the_old_word(base_copy):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    edit_config(base_copy, rope_parameters=None, rope_scaling=scaling)
    report = inspect_checkpoint(base_copy)
    readers = report.to_json()["rope"]["readers"]
    assert readers["transformers 4"]["scaling"] == scaling and readers["older"]["scaling"] is None
    assert any("no `type` beside `rope_type`" in note for note in report.notes)


@pytest.mark.parametrize("theta", [1e6, 5e6])
def test_the_theta_of_transformers_5_is_that_of_transformers(base_copy, theta):
    edit_config(base_copy, rope_theta=None, rope_parameters={"rope_theta": theta, "rope_type": "default"})
    truth = Qwen2Config.from_pretrained(base_copy).rope_parameters["rope_theta"]
    assert section(base_copy, "rope")["readers"]["transformers 5"]["theta"] == truth == theta


def test_two_thetas_that_disagree_are_wrong(base_copy):
    edit_config(base_copy, rope_theta=10000.0)
    assert_wrong(inspect_checkpoint(base_copy), "qwen2", "10000", "readers will disagree")


def test_no_theta_at_all_is_noted(base_copy):
    edit_config(base_copy, rope_theta=None, rope_parameters=None)
    report = inspect_checkpoint(base_copy)
    assert "config.json names no rope_theta: readers take 10000" in report.notes


def test_leftovers_and_a_wrong_sum_are_notes(base_copy):
    before = inspect_checkpoint(base_copy)
    (base_copy / "consolidated.safetensors").write_bytes(b"anything")
    edit_json(base_copy / INDEX, lambda index: index["metadata"].update(total_size=5_000_000))
    report = inspect_checkpoint(base_copy)
    left = {"name": "consolidated.safetensors", "tensors": None, "repeated": None}
    assert report.exit_code == 0 and report.to_json()["files"]["leftovers"] == [left]
    fresh = set(report.notes) - set(before.notes)
    assert len(fresh) == 2 and any("consolidated" in n for n in fresh) and any("declares 5.0 MB" in n for n in fresh)


def test_a_leftover_is_opened_to_see_whether_it_repeats(base_copy):
    names = list(load_state(base_copy))
    save_file({names[0]: torch.ones(2), names[1]: torch.ones(2)}, base_copy / "consolidated.safetensors")
    save_file({names[0]: torch.ones(2), "stray": torch.ones(2)}, base_copy / "model-00009-of-00009.safetensors")
    report = inspect_checkpoint(base_copy)
    counts = {left["name"]: (left["tensors"], left["repeated"]) for left in report.to_json()["files"]["leftovers"]}
    assert counts == {"consolidated.safetensors": (2, 2), "model-00009-of-00009.safetensors": (2, 1)}
    assert any("consolidated" in note and "a second time, and can go" in note for note in report.notes)
    assert any("00009" in note and "1 of the tensors a second time, and 1 others" in note for note in report.notes)


def test_a_header_without_format_is_noted(base_copy):
    assert not any("format: pt" in note for note in inspect_checkpoint(base_copy).notes)
    state = load_state(base_copy)
    rewrite(base_copy, lambda state: None)
    save_file(state, base_copy / "model.safetensors")
    assert any("format: pt" in note for note in inspect_checkpoint(base_copy).notes)


def test_an_untied_head_that_is_absent(base_copy):
    drop(base_copy, "lm_head.weight")
    assert_wrong(inspect_checkpoint(base_copy), "qwen2", "head is not tied", "lm_head.weight is absent")
    edit_config(base_copy, tie_word_embeddings=True)
    assert inspect_checkpoint(base_copy).findings == ()


def test_tokenizer_against_the_rows(base_copy):
    report = inspect_checkpoint(base_copy)
    tokens = report.to_json()["tokenizer"]
    assert tokens["vocabulary_rows"] == 384 and tokens["rows_needed"] < 384
    assert tokens["padded_rows"] == 384 - tokens["rows_needed"]
    padded = [note for note in report.notes if f"{tokens['padded_rows']} of 384 rows belong to no token" in note]
    assert len(padded) == 1 and "do not resize" in padded[0]
    extra = {"id": 384, "content": "<|one_too_many|>", "special": True}
    edit_json(base_copy / "tokenizer.json", lambda t: t["added_tokens"].append(extra))
    assert_wrong(inspect_checkpoint(base_copy), "qwen2", "highest id is 384", "only 384 rows")


def test_absent_side_files_are_notes(base_copy):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (base_copy / name).unlink()
    report = inspect_checkpoint(base_copy)
    assert report.exit_code == 0 and {"there is no tokenizer", "there is no generation_config.json"} <= set(
        report.notes
    )
    assert report.to_json()["chat_template"] is None


def test_heads_that_do_not_divide(base_copy):
    edit_config(base_copy, num_attention_heads=3, head_dim=16)
    assert any("evenly" in finding for finding in inspect_checkpoint(base_copy).findings)


def test_printed_report(base_copy, capsys):
    print_report(inspect_checkpoint(base_copy))
    whole = capsys.readouterr().out
    assert whole.startswith("biases sound: all 9 q/k/v biases are there, none of them empty (norms ")
    assert "9 of 9 present" in whole and "verdict: qwen2\n" in whole and "WRONG" not in whole
    assert "missing" not in whole
    drop(base_copy, K1)
    print_report(inspect_checkpoint(base_copy))
    damaged = capsys.readouterr().out
    assert damaged.startswith("biases WRONG: 1 of 9 q/k/v biases are MISSING\n1 finding, the first: 1 of 9 q/k/v")
    rows = [line.split() for line in damaged.splitlines()]
    assert ["0,", "2", "present", "present", "present"] in rows and ["1", "present", "missing", "present"] in rows
    assert f"WRONG: 1 of 9 q/k/v biases are missing, the first is {K1}" in damaged


def test_each_reader_is_printed_where_they_differ(base_copy, capsys):
    print_report(inspect_checkpoint(base_copy))
    assert "theta 1,000,000, no scaling (for every reader)" in capsys.readouterr().out
    edit_config(base_copy, rope_theta=None, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    print_report(inspect_checkpoint(base_copy))
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("RoPE"))
    old = "transformers 4, older readers: theta 10,000, no scaling"
    assert f"transformers 5: theta 1,000,000, no scaling; {old}" in row


@pytest.mark.parametrize("values", [False, True])
def test_neither_headers_nor_values_need_torch(base_folder, values):
    code = (
        "import sys; from qwen2tool.checkpoint.report import inspect_checkpoint; "
        "from qwen2tool.checkpoint.show import print_report; "
        f"print_report(inspect_checkpoint(sys.argv[1], values={values})); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, base_folder], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_lost_biases_come_with_their_remedy(base_copy):
    def remedies() -> list[str]:
        return [note for note in inspect_checkpoint(base_copy).notes if "--biases-from ORIGINAL" in note]

    assert remedies() == []
    put(base_copy, K1, torch.zeros(32))
    assert len(remedies()) == 1
    drop(base_copy, *QKV_BIASES)
    assert len(remedies()) == 1
    edit_config(base_copy, model_type="llama")
    assert len(remedies()) == 1


def test_an_adapter_in_the_models_own_folder_is_wrong(base_copy, adapter_folder):
    """transformers loads both: what it makes of this folder is another function than the files hold."""
    name = "model.layers.0.self_attn.q_proj.lora_B.default.weight"
    assert name not in dict(Qwen2ForCausalLM.from_pretrained(base_copy).named_parameters())
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter_folder / file, base_copy)
    assert name in dict(Qwen2ForCausalLM.from_pretrained(base_copy).named_parameters())
    assert_wrong(inspect_checkpoint(base_copy), "qwen2", "adapter_config.json", "transformers adds that adapter")
