"""`inspect` of an adapter: PEFT's own numbers, every variant shown, every loss found."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

from qwen2tool.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_FILE, delta, fingerprint, open_adapter
from qwen2tool.checkpoint.adapter_parts import is_adapter
from qwen2tool.checkpoint.adapter_report import inspect_adapter
from qwen2tool.checkpoint.adapter_show import print_adapter
from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.errors import UserError
from tests.checkpoint.edits import put
from tests.checkpoint.files import edit_json
from tests.tiny import TARGETS, write_adapter, write_tiny

Q2 = "base_model.model.model.layers.2.self_attn.q_proj"


@pytest.fixture
def copy(adapter_folder, tmp_path):
    return shutil.copytree(adapter_folder, tmp_path / "adapter")


def edit(folder, change) -> None:
    tensors = load_file(folder / ADAPTER_FILE)
    change(tensors)
    save_file(tensors, folder / ADAPTER_FILE)


def test_a_sound_adapter(adapter_folder, base_folder):
    report = inspect_adapter(adapter_folder, values=True)
    assert (report.verdict, report.exit_code, report.findings) == ("lora adapter", 0, ())
    sections = report.sections
    assert tuple(sections["targets"]) == TARGETS and sections["base"]["name"] == str(base_folder)
    assert sections["targets"]["k_proj"] == {
        "modules": 3, "layers": [0, 1, 2], "missing": [], "ranks": [4], "alphas": [12], "scalings": [3.0],
        "shapes": ["32 x 64"], "dtypes": ["F32"], "numbers": 3 * (4 * 64 + 32 * 4),
    }  # fmt: skip
    stored = load_file(adapter_folder / ADAPTER_FILE)
    assert sections["tensors"]["numbers"] == sum(t.numel() for t in stored.values())
    assert sections["tensors"]["kinds"] == {"lora": 42} and sections["merge"]["possible"]
    assert sections["values"]["zero"] == {"A": [], "B": []} and sections["layers"] == {"count": 3, "covered": [0, 1, 2]}
    assert json.loads(json.dumps(report.to_json()))["schema_version"] == 1


def test_norms_are_those_of_the_updates(adapter_folder):
    found = inspect_adapter(adapter_folder, values=True).sections["values"]["updates"]
    norms: dict[str, list[float]] = {}
    for module, pair in open_adapter(adapter_folder).pairs.items():
        norms.setdefault(module.rpartition(".")[2], []).append(float(delta(pair).double().norm()))
    assert found.keys() == norms.keys()
    for target, sizes in norms.items():
        assert found[target]["mean"] == pytest.approx(sum(sizes) / 3, rel=1e-5)
        assert found[target]["largest"] == pytest.approx(max(sizes), rel=1e-5)
        assert found[target]["layer"] == sizes.index(max(sizes))


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_and_rank_are_those_of_peft(rslora, base_folder, tmp_path):
    patterns = {"rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\..*": 3}, "alpha_pattern": {"o_proj": 5}}
    folder = write_adapter(tmp_path / "adapter", base_folder, use_rslora=rslora, **patterns)
    report = inspect_adapter(folder)
    model = PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(base_folder, dtype=torch.float32), folder)
    wanted: dict[str, dict[str, set]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            entry = wanted.setdefault(name.rpartition(".")[2], {"ranks": set(), "scalings": set()})
            entry["ranks"].add(module.r["default"]), entry["scalings"].add(module.scaling["default"])
    for name, entry in wanted.items():
        target = report.sections["targets"][name]
        assert (set(target["ranks"]), set(target["scalings"])) == (entry["ranks"], entry["scalings"]), name
    assert report.exit_code == 0 and any("scaled differently" in note for note in report.notes)


VARIANTS = {
    "magnitude": ({"use_dora": True}, "DoRA", 21),
    "lora_bias": ({"lora_bias": True, "target_modules": ["q_proj"]}, "biases beside lora_B", 3),
    "bias": ({"bias": "all"}, "biases of the base were trained", 9),
    "full": ({"modules_to_save": ["lm_head"]}, "whole modules were trained", 1),
    "tokens": ({"trainable_token_indices": [1, 2]}, "rows of the embedding were trained", 1),
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, "an embedding is adapted", 2),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_variants_are_shown_and_said_not_to_merge(kind, base_folder, tmp_path):
    changes, words, count = VARIANTS[kind]
    report = inspect_adapter(write_adapter(tmp_path / "adapter", base_folder, **changes), values=True)
    assert report.sections["tensors"]["kinds"][kind] == count and "other" not in report.sections["tensors"]["kinds"]
    assert any(words in note for note in report.notes) and report.verdict.startswith("lora adapter with ")
    with pytest.raises(UserError) as refusal:
        open_adapter(tmp_path / "adapter")
    assert f"`qwen2tool merge` refuses it: {refusal.value.what}" in report.notes
    assert (report.exit_code, report.findings) == (0, ())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{Q2}.lora_B.weight"), r"layers\.2\.self_attn\.q_proj: no lora_B: it is lost"),
        (lambda t: t.pop(f"{Q2}.lora_A.weight"), r"q_proj: no lora_A"),
        (lambda t: (t.pop(f"{Q2}.lora_A.weight"), t.pop(f"{Q2}.lora_B.weight")), "q_proj is adapted in 2 of 3 layers"),
        (lambda t: [t.pop(n) for n in list(t) if "v_proj" in n], "targets v_proj, but no tensor adapts it"),
        (lambda t: t.update({f"{Q2}.lora_A.weight": torch.ones(3, 64)}), "rank 3 and 4, adapter_config.json says 4"),
        (lambda t: t.update({f"{Q2}.lora_A.weight": torch.ones(0)}), "A or B is no matrix"),
        (
            lambda t: t.update({f"{Q2}.lora_B.weight": torch.ones(65, 4)}),
            "adapted as 65 x 64, in the base it is of shape",
        ),
        (lambda t: t[f"{Q2}.lora_B.weight"].__setitem__((3, 1), float("nan")), "NaN or Inf in 1 tensor, the first is"),
        (lambda t: [m.zero_() for n, m in t.items() if "lora_B" in n], "lora_B is all zero in every module"),
        (lambda t: t.clear(), "it holds no tensors"),
    ],
)
def test_what_is_wrong_is_found(change, words, copy):
    assert inspect_adapter(copy, values=True).exit_code == 0
    edit(copy, change)
    report = inspect_adapter(copy, values=True)
    assert report.exit_code == 1
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(report.findings)


def test_faults_of_one_kind_are_one_sentence(copy):
    edit_json(copy / ADAPTER_CONFIG, r=7)
    (finding,) = inspect_adapter(copy).findings
    assert "(and 20 more modules): rank 4, adapter_config.json says 7" in finding
    edit_json(copy / ADAPTER_CONFIG, r=4, lora_alpha="12")
    (finding,) = inspect_adapter(copy).findings
    assert "no usable lora_alpha" in finding


def test_one_idle_module_is_a_note(copy):
    edit(copy, lambda tensors: tensors[f"{Q2}.lora_B.weight"].zero_())
    report = inspect_adapter(copy, values=True)
    assert report.exit_code == 0 and any("lora_B is all zero in 1 of 21 modules" in note for note in report.notes)
    assert inspect_adapter(copy).sections["values"] is None


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_to_transform": [0, 2]},
        {"target_modules": r".*layers\.[02]\.self_attn\.q_proj"},
        {"target_modules": ["layers.0.self_attn.q_proj", "layers.2.self_attn.q_proj"]},
    ],
)
def test_layers_that_the_config_leaves_out_are_no_fault(changes, base_folder, tmp_path):
    options = {"target_modules": ["q_proj"]} | changes
    report = inspect_adapter(write_adapter(tmp_path / "adapter", base_folder, **options))
    assert report.exit_code == 0 and report.sections["targets"]["q_proj"]["missing"] == [1]
    assert "q_proj is adapted in layers 0, 2 only, as its config picks them" in report.notes


def test_last_layers_are_missed_where_the_base_is_here(copy):
    edit(copy, lambda t: [t.pop(name) for name in list(t) if "layers.2." in name])
    report = inspect_adapter(copy)
    assert len(report.findings) == 7 and "in 2 of 3 layers, not in layer 2," in report.findings[0]
    edit_json(copy / ADAPTER_CONFIG, base_model_name_or_path="owner/name")
    assert inspect_adapter(copy).exit_code == 0  # nobody says how many layers there are


def test_fingerprint_of_the_base(base_copy, copy):
    edit_json(copy / ADAPTER_CONFIG, base_model_name_or_path=str(base_copy))
    (copy / "qwen2tool.json").write_text(json.dumps({"base_fingerprint": fingerprint(open_checkpoint(base_copy))}))
    report = inspect_adapter(copy, values=True)
    assert report.sections["base"]["matches"] is True and report.exit_code == 0
    assert inspect_adapter(copy).sections["base"]["matches"] is None
    put(base_copy, "model.norm.weight", torch.ones(64))
    report = inspect_adapter(copy, values=True)
    assert report.sections["base"]["matches"] is False and "is not the one it was trained on" in report.findings[0]


def test_bin_adapter(adapter_folder, copy):
    torch.save(load_file(copy / ADAPTER_FILE), copy / "adapter_model.bin")
    assert any("adapter_model.bin is there as well" in note for note in inspect_adapter(copy).notes)
    (copy / ADAPTER_FILE).unlink()
    report, whole = inspect_adapter(copy, values=True), inspect_adapter(adapter_folder, values=True)
    assert report.sections["targets"] == whole.sections["targets"] and report.sections["tensors"]["bytes"]
    assert report.sections["values"] == whole.sections["values"] and not report.sections["merge"]["possible"]


def test_other_methods_and_old_names(copy):
    edit(copy, lambda t: [t.update({n.replace(".weight", ".default.weight"): t.pop(n)}) for n in list(t)])
    assert inspect_adapter(copy).sections["tensors"]["kinds"] == {"lora": 42}
    edit_json(copy / ADAPTER_CONFIG, peft_type="IA3")
    report = inspect_adapter(copy)
    assert (report.verdict, report.exit_code) == ("not a lora adapter (peft_type is 'IA3')", 1)


def test_what_is_an_adapter(adapter_folder, base_folder, copy):
    assert is_adapter(adapter_folder) and is_adapter(str(adapter_folder / ADAPTER_FILE))
    assert not is_adapter(base_folder) and not is_adapter(base_folder / "config.json") and not is_adapter("no/such")
    assert inspect_adapter(adapter_folder / ADAPTER_FILE).path == adapter_folder
    shutil.copyfile(copy / ADAPTER_FILE, copy / "model.safetensors")
    assert not is_adapter(copy)


def test_what_cannot_be_inspected(base_folder, copy):
    with pytest.raises(UserError, match="not a PEFT adapter"):
        inspect_adapter(base_folder)
    (copy / ADAPTER_FILE).write_bytes(b"")
    with pytest.raises(UserError, match="no safetensors header"):
        inspect_adapter(copy)
    (copy / ADAPTER_FILE).unlink()
    with pytest.raises(UserError, match="but no weights"):
        inspect_adapter(copy)


def test_a_damaged_record_of_our_trainer_hides_nothing(copy):
    whole = inspect_adapter(copy)
    assert whole.exit_code == 0
    (copy / "qwen2tool.json").write_bytes(b"{")
    report = inspect_adapter(copy)
    assert (report.verdict, report.exit_code, report.sections["targets"]) == (
        whole.verdict, 1, whole.sections["targets"]
    )  # fmt: skip
    assert report.findings == ("qwen2tool.json: not valid JSON (it ends early); repair the file or copy it again",)


WEIRD = (
    None,
    True,
    0,
    -1,
    2**70,
    0.5,
    float("nan"),
    "",
    "x",
    "(",
    "\0",
    [],
    [0],
    ["q_proj", 3],
    {},
    {"(": 1},
    {"q": []},
)


READ = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "layers_to_transform",
        "exclude_modules", "modules_to_save", "base_model_name_or_path", "use_dora", "bias")  # fmt: skip


@pytest.mark.parametrize("key", READ)
def test_no_config_is_too_odd_to_be_shown(key, copy, capsys):
    config = json.loads((copy / ADAPTER_CONFIG).read_text())
    for value in WEIRD:
        (copy / ADAPTER_CONFIG).write_text(json.dumps(config | {key: value}))
        report = inspect_adapter(copy)
        assert json.dumps(report.to_json()) and report.exit_code in (0, 1)
    print_adapter(report)
    assert "verdict: " in capsys.readouterr().out


@pytest.mark.parametrize("pattern", ["(.+)+x", "(a|.)*x", "(.|.){40}x", ".*.*.*.*.*.*.*.*.*x"])
def test_patterns_that_would_never_end(pattern, copy):
    edit_json(copy / ADAPTER_CONFIG, rank_pattern={pattern: 4})
    start = time.perf_counter()
    (finding,) = inspect_adapter(copy).findings
    assert "adapter_config.json says nothing usable" in finding and time.perf_counter() - start < 2
    with pytest.raises(UserError, match="not a positive number"):
        open_adapter(copy)


def test_shown(adapter_folder, base_folder, tmp_path, capsys):
    print_adapter(inspect_adapter(adapter_folder, values=True))
    text = capsys.readouterr().out
    for words in (
        "4 and 12",
        str(base_folder),
        "3 of 3",
        "q_proj      0-2",
        "norm of the update",
        "verdict: lora adapter",
    ):
        assert words in text, words
    other = write_adapter(tmp_path / "a", write_tiny(tmp_path / "b"), use_dora=True, layers_to_transform=[1])
    print_adapter(inspect_adapter(other))
    text = capsys.readouterr().out
    assert "kind magnitude" in text and "1, not 0, 2" in text and "note: DoRA" in text and "refused" in text
