"""What careless tools and hands leave: a config.json that no reader takes, names of wrappers, packed or 8-bit weights,
another model altogether. None may be called equivalent, each is named, and nothing ends in a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2tool.checkpoint.adapter import open_adapter
from qwen2tool.checkpoint.names import difference, find_renamed
from qwen2tool.checkpoint.report import inspect_checkpoint
from qwen2tool.convert.run import Options, convert
from qwen2tool.errors import UserError
from qwen2tool.verify.page import render
from qwen2tool.verify.patterns.adapters import label_of
from qwen2tool.verify.report import Report
from qwen2tool.verify.run import verify
from qwen2tool.verify.statistics import format_ratio
from tests.cli_runner import run as command
from tests.tiny import write_tiny
from tests.verify.common import State, random_samples, variant

SAMPLES = random_samples()
LAYER = "model.layers.1."
UP, K_BIAS = f"{LAYER}mlp.up_proj.weight", f"{LAYER}self_attn.k_proj.bias"
UNKNOWN_ROPE = {"rope_scaling": {"type": "nonsense", "factor": 2.0}, "rope_parameters": None}


def run(reference: Path, candidate: Path, **options: Any) -> Report:
    return verify(reference, candidate, SAMPLES, **options)


def codes(report: Report) -> list[str]:
    return [diagnosis.code for diagnosis in report.diagnoses]


# config.json


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (UNKNOWN_ROPE, "the type 'nonsense'"),
        ({"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": None}, "yarn without factor"),
        ({"layer_types": ["full_attention"] * 2}, "2 entries for 3 layers"),
        ({"layer_types": ["sliding_attention"] * 3, "use_sliding_window": True, "sliding_window": None}, "no window"),
        ({"hidden_act": "bent"}, "bent"),
        ({"rms_norm_eps": 1}, "rms_norm_eps"),
        ({"use_cache": "sometimes"}, "use_cache"),
    ],
)
def test_a_config_that_readers_refuse(tmp_path: Path, base_folder: Path, config: dict[str, Any], words: str) -> None:
    """Byte-identical tensors, and a folder that cannot be loaded."""
    refused = variant(base_folder, tmp_path / "refused", config=config)
    report = run(base_folder, refused)
    assert (report.verdict, codes(report)) == ("different", ["config_unusable"])
    assert words in report.diagnoses[0].sentence and report.figures is None
    with pytest.raises(UserError, match=r"the reference's config\.json cannot be used"):
        run(refused, base_folder)


@pytest.mark.parametrize(
    "config",
    [
        {"num_key_value_heads": 4},
        {"head_dim": 32},
        {"vocab_size": 400},
        {"hidden_size": 128},
        {"num_hidden_layers": 4, "layer_types": None},
    ],
)
def test_a_config_that_does_not_fit_the_tensors(tmp_path: Path, base_folder: Path, config: dict[str, Any]) -> None:
    report = run(base_folder, variant(base_folder, tmp_path / "lied", config=config))
    assert (report.verdict, codes(report)) == ("different", ["config_unfit"])
    (name, value), *_ = config.items()
    assert f"{name} {value}, the reference" in report.diagnoses[0].sentence


def test_a_llama_config_that_does_not_fit(tmp_path: Path, base_folder: Path) -> None:
    convert(base_folder, tmp_path / "llama", Options(to="llama"))
    assert run(base_folder, tmp_path / "llama").verdict == "equivalent"
    report = run(base_folder, variant(tmp_path / "llama", tmp_path / "lied", config={"head_dim": 32}))
    assert (report.verdict, codes(report)) == ("different", ["config_unfit"])


def test_a_quantisation_that_is_yet_to_happen(tmp_path: Path, base_folder: Path) -> None:
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    report = run(base_folder, variant(base_folder, tmp_path / "promised", config=config))
    assert (report.verdict, report.reason) == (
        "different",
        "config.json has quantization_config bitsandbytes, the reference none",
    )
    convert(base_folder, tmp_path / "packed", Options(to="nf4"))
    assert "quantization_config" not in run(base_folder, tmp_path / "packed").inventory.config


def test_rope_scaling_is_said_once_and_in_words(tmp_path: Path, base_folder: Path) -> None:
    config = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}
    report = run(base_folder, variant(base_folder, tmp_path / "linear", config=config))
    assert report.reason == "config.json has rope_scaling rope_type linear factor 2.0, the reference none"


def test_a_gguf_has_metadata_and_no_config(tmp_path: Path, base_folder: Path) -> None:
    other = variant(base_folder, tmp_path / "theta", config={"rope_theta": 1e4, "rope_parameters": None})
    convert(other, tmp_path / "theta.gguf", Options(to="gguf", gguf_type="f16"))
    report = run(base_folder, tmp_path / "theta.gguf")
    sentence = report.diagnoses[0].sentence
    assert "the GGUF's metadata has rope_theta 10000" in sentence and "make the file again" in sentence
    assert "config.json" not in sentence + report.reason
    assert "config.json" in run(base_folder, other).reason


def test_what_leaves_no_trace_in_tensors_is_noted(tmp_path: Path, base_folder: Path) -> None:
    renamed = variant(base_folder, tmp_path / "class", config={"architectures": ["LlamaForCausalLM"]})
    tokens = json.loads((renamed / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    one, other = [*vocabulary][100:102]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (renamed / "tokenizer.json").write_text(json.dumps(tokens))
    report = run(base_folder, renamed)
    assert report.verdict == "equivalent"
    assert any("architectures says LlamaForCausalLM" in note for note in report.notes)
    assert any(note.startswith("the tokenizers differ: 2 tokens with another id") for note in report.notes)
    assert run(base_folder, base_folder).notes == ()


@pytest.mark.parametrize(
    ("file", "text"),
    [("tokenizer.json", "[]"), ("tokenizer_config.json", '{"a'), ("generation_config.json", "[1]")],
)
def test_a_damaged_file_beside_the_candidates_weights_is_noted(
    tmp_path: Path, base_folder: Path, file: str, text: str
) -> None:
    """The weights are the same function; whoever loads the folder meets the damage all the same."""
    damaged = variant(base_folder, tmp_path / "damaged")
    (damaged / file).write_text(text)
    report = run(base_folder, damaged)
    assert report.verdict == "equivalent"
    (note,) = report.notes
    assert note.startswith(f"{damaged}: {file} is damaged")


def test_a_tie_that_config_json_has_lost(tmp_path: Path, tied_folder: Path) -> None:
    untied = variant(tied_folder, tmp_path / "untied", config={"tie_word_embeddings": False})
    report = run(tied_folder, untied)
    assert (report.verdict, codes(report)) == ("different", ["tie_lost"])
    assert not any("heads were compared" in note for note in report.notes)


# names


WRAPPED: dict[str, Callable[[str], str]] = {
    "with base_model.model": lambda name: f"base_model.model.{name}",
    "with _orig_mod": lambda name: f"_orig_mod.{name}",
    "with base_layer": lambda name: name.replace("_proj.", "_proj.base_layer."),
    "with language_model": lambda name: name.replace("model.", "model.language_model."),
    "without model": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("words", WRAPPED)
def test_names_of_a_wrapper(tmp_path: Path, base_folder: Path, words: str) -> None:
    def wrap(state: State) -> State:
        return {WRAPPED[words](name): tensor for name, tensor in state.items()}

    wrapped = variant(base_folder, tmp_path / "wrapped", wrap)
    report = run(base_folder, wrapped)
    assert (report.verdict, codes(report)) == ("different", ["tensor_renamed"])
    assert f"({words})" in report.diagnoses[0].sentence and "missing" not in report.reason
    found = inspect_checkpoint(wrapped)
    assert found.exit_code == 1 and words in found.verdict + " ".join(found.findings)
    assert not any("--biases-from" in note for note in found.notes)


def test_a_name_that_only_resembles_is_missing() -> None:
    assert find_renamed(["model.a.weight"], ["module.model.a.weight"]) == {"model.a.weight": "module.model.a.weight"}
    assert find_renamed(["model.a.weight"], ["model.b.weight", "my.a.weight"]) == {}
    assert find_renamed(["model.a.weight"], ["module.a.weight", "base_model.a.weight"]) == {}  # which of the two?
    assert difference("model.a.weight", "base_model.model.model.a.base_layer.weight") == (
        "with base_model.model.base_layer"
    )


# what tensors hold


def as_dtype(ending: str, dtype: torch.dtype) -> Callable[[State], State]:
    return lambda state: {n: t.to(dtype) if n.endswith(ending) else t for n, t in state.items()}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("ending", ["_proj.weight", "k_proj.bias"])
def test_eight_bits_are_no_rounding(tmp_path: Path, base_folder: Path, ending: str, dtype: torch.dtype) -> None:
    report = run(base_folder, variant(base_folder, tmp_path / "eight", as_dtype(ending, dtype)))
    assert report.verdict == "different" and report.diagnoses
    assert {t.name for t in report.tensors if t.kind == "different"} == {
        t.name for t in report.tensors if t.name.endswith(ending)
    }


def without_config(folder: Path, state: State) -> State:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]
    file.write_text(json.dumps(config))
    return state


def eight_bit(folder: Path, state: State) -> State:
    """As bitsandbytes stores LLM.int8, without a word in config.json."""
    found: State = {}
    for name, tensor in state.items():
        if name.endswith("_proj.weight"):
            largest = tensor.float().abs().amax(1)
            found[name] = (tensor.float() / largest[:, None] * 127).round().to(torch.int8)
            found[f"{name.removesuffix('weight')}SCB"] = largest
        else:
            found[name] = tensor
    return found


def without_states(folder: Path, state: State) -> State:
    return {name: tensor for name, tensor in state.items() if ".quant_state." not in name}


@pytest.mark.parametrize(
    ("to", "change", "more"),
    [("nf4", without_config, []), ("qwen2", eight_bit, ["quantised_weights"]), ("nf4", without_states, ["config"])],
)
def test_packed_weights_that_nobody_can_unpack(
    tmp_path: Path, base_folder: Path, to: Any, change: Callable[[Path, State], State], more: list[str]
) -> None:
    packed = base_folder
    if to == "nf4":
        packed = tmp_path / "packed"
        convert(base_folder, packed, Options(to="nf4"))
    damaged = tmp_path / "damaged"
    variant(packed, damaged)
    state = change(damaged, load_file(damaged / "model.safetensors"))
    save_file(state, damaged / "model.safetensors", metadata={"format": "pt"})
    report = run(base_folder, damaged)
    assert report.verdict == "different" and set(codes(report)) == {"packing_unsaid", *more}
    assert inspect_checkpoint(damaged).exit_code == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {n: t for n, t in s.items() if not n.endswith("up_proj.weight.quant_map")},
        lambda s: s | {UP: s[UP][:100].clone()},
    ],
)
def test_inspect_sees_packed_weights_that_cannot_be_whole(tmp_path: Path, base_folder: Path, change: Any) -> None:
    convert(base_folder, tmp_path / "packed", Options(to="nf4"))
    assert inspect_checkpoint(tmp_path / "packed").exit_code == 0
    assert inspect_checkpoint(variant(tmp_path / "packed", tmp_path / "damaged", change)).exit_code == 1


@pytest.mark.parametrize("shape", [(), (0,), (1, 32)])
def test_a_bias_of_no_shape(tmp_path: Path, base_folder: Path, shape: tuple[int, ...]) -> None:
    odd = variant(base_folder, tmp_path / "odd", lambda s: s | {K_BIAS: torch.zeros(shape, dtype=torch.bfloat16)})
    report = run(base_folder, odd)
    assert (report.verdict, codes(report)) == ("different", ["shape"])


def test_another_model(tmp_path: Path, base_folder: Path) -> None:
    wider = run(base_folder, write_tiny(tmp_path / "wider", seed=3, hidden_size=96, num_attention_heads=6))
    assert (wider.verdict, codes(wider)) == ("different", ["other_model"])
    assert "hidden_size 96, the reference 64" in wider.diagnoses[0].sentence
    stranger = run(base_folder, write_tiny(tmp_path / "stranger", seed=5))
    assert (stranger.verdict, codes(stranger)) == ("different", ["other_model"])

    def train(state: State) -> State:
        noise = torch.Generator().manual_seed(1)
        return {n: (t + 0.3 * t.std() * torch.randn(t.shape, generator=noise)).bfloat16() for n, t in state.items()}

    assert "other_model" not in codes(run(base_folder, variant(base_folder, tmp_path / "trained", train)))


# sentences


def test_a_mistake_that_does_little_is_named_once(tmp_path: Path, base_folder: Path) -> None:
    def edit(state: State) -> None:
        state[UP][3, 4] += 0.02

    report = run(base_folder, variant(base_folder, tmp_path / "edited", edit))
    assert (report.verdict, codes(report)) == ("different", ["entry_changed"])
    assert report.reason.startswith("the tensors show a mistake, which the diagnosis names, however little it does; ")
    assert "[3, 4]" not in report.reason and "[3, 4]" in report.diagnoses[0].sentence


@pytest.mark.parametrize(("rslora", "words"), [(True, "alpha were divided by the rank, not its square"), (False, "")])
def test_where_half_an_adapter_comes_from(
    tmp_path: Path, base_folder: Path, adapter_folder: Path, merged_folder: Path, rslora: bool, words: str
) -> None:
    """Rank 4: half of it is what is left without rsLoRA's root, and half of it is half of it."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = json.loads((adapter_folder / "adapter_config.json").read_text())
    config |= {"use_rslora": True} if rslora else {"lora_alpha": 24}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file(load_file(adapter_folder / "adapter_model.safetensors"), adapter / "adapter_model.safetensors")
    report = run(base_folder, merged_folder, adapter=adapter)
    assert codes(report) == ["adapter_scaling"]
    sentence = report.diagnoses[0].sentence
    assert "hold 0.5 times the adapter" in sentence and words in sentence and ("as if" in sentence) == rslora


def test_an_adapter_is_named_once(base_folder: Path, adapter_folder: Path, merged_folder: Path) -> None:
    """The adapter's folder as a side is its base with it: with --adapter too, it would be twice in the truth."""
    assert run(adapter_folder, merged_folder).verdict == "equivalent"
    for options in ({"adapter": adapter_folder}, {"adapter": [adapter_folder / ".." / adapter_folder.name]}):
        with pytest.raises(UserError, match="named twice for one side"):
            run(adapter_folder, merged_folder, **options)
    with pytest.raises(UserError, match="named twice for one side"):
        run(base_folder, adapter_folder, candidate_adapter=adapter_folder)
    assert run(base_folder, adapter_folder, adapter=adapter_folder).verdict == "equivalent"


def test_two_adapters_of_one_name_are_told_apart(adapter_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(adapter_folder, tmp_path / adapter_folder.name))
    both = [open_adapter(folder) for folder in (adapter_folder, copy)]
    assert label_of(both[0], both[:1]) == "the adapter"
    assert [label_of(adapter, both) for adapter in both] == [f"the adapter {adapter_folder}", f"the adapter {copy}"]


def test_an_adapter_beside_the_weights_is_noted(tmp_path: Path, base_folder: Path) -> None:
    beside = variant(base_folder, tmp_path / "beside")
    (beside / "adapter_config.json").write_text("{}")
    assert any("adapter_config.json lies beside the weights" in note for note in run(base_folder, beside).notes)


def test_names_of_tensors_keep_their_letters(tmp_path: Path, base_folder: Path) -> None:
    report = run(base_folder, variant(base_folder, tmp_path / "more", lambda s: s | {"foo": torch.ones(3)}))
    assert report.diagnoses[0].sentence.startswith("foo is not in the reference")


def test_an_adapter_with_nan_is_the_adapters_fault(
    tmp_path: Path, base_folder: Path, adapter_folder: Path, merged_folder: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text((adapter_folder / "adapter_config.json").read_text())
    state = load_file(adapter_folder / "adapter_model.safetensors")
    state = {n: t * torch.nan if ".1.mlp.up_proj.lora_A" in n else t for n, t in state.items()}
    save_file(state, adapter / "adapter_model.safetensors")
    report = run(base_folder, merged_folder, adapter=adapter)
    assert (report.verdict, codes(report)) == ("undecided", ["adapter_not_finite"])
    assert not report.diagnoses[0].is_fault and "up_proj.weight of layer 1" in report.diagnoses[0].sentence


def test_the_tie_says_nothing_where_heads_are_equal(tmp_path: Path, base_folder: Path) -> None:
    """The control of the notes: a flag that no tensor bears out is noted, and is no fault."""
    report = run(base_folder, variant(base_folder, tmp_path / "tied", config={"tie_word_embeddings": True}))
    assert report.verdict == "equivalent" and report.notes == (
        "tie_word_embeddings differs; the heads were compared by what they hold",
    )


# --routes, and what a page says


def test_routes_of_what_cannot_be_trained(tmp_path: Path, base_folder: Path) -> None:
    convert(base_folder, tmp_path / "whole.gguf", Options(to="gguf", gguf_type="f16"))
    outcome = command("verify-equivalence", tmp_path / "whole.gguf", "--routes")
    assert outcome.code == 2 and "a file without a config.json" in outcome.error
    refused = variant(base_folder, tmp_path / "refused", config=UNKNOWN_ROPE)
    outcome = command("verify-equivalence", refused, "--routes")
    assert outcome.code == 2 and "the type 'nonsense'" in outcome.error


def test_a_page_of_a_config_is_for_readers(tmp_path: Path, base_folder: Path) -> None:
    page = render(run(base_folder, variant(base_folder, tmp_path / "refused", config=UNKNOWN_ROPE)))
    assert "rope_type nonsense factor 2.0" in page and "{'rope_type'" not in page
    lied = render(run(base_folder, variant(base_folder, tmp_path / "lied", config={"vocab_size": 400})))
    assert "<p>config.json has vocab_size 400" in lied


def test_a_ratio_that_is_no_number_is_said_in_words() -> None:
    assert format_ratio(float("nan"), float("nan")) == "not finite"
    assert format_ratio(1.5, 0.25) == "1.50 ± 0.25"
