"""The fused layers on a checkpoint of one's own: right ones pass in every dtype, and each planted fault is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

import qwen2tool.kernels.lora
import qwen2tool.routing.examine
import qwen2tool.routing.layer
import qwen2tool.routing.operands
from qwen2tool.checkpoint.adapter import open_adapter
from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.load import load_model
from qwen2tool.errors import UserError
from qwen2tool.routing.offline import plan_checkpoint
from qwen2tool.verify.gradients import relative_error
from qwen2tool.verify.route_report import Errors, LayerReport, decide_routes
from qwen2tool.verify.route_show import print_routes
from qwen2tool.verify.routes import ragged, verify_routes
from qwen2tool.verify.single import LINEARS, dequantise, embed, layer_pairs, load_layer, misread, put_lora, random_pairs
from tests.cli_runner import run
from tests.tiny import write_adapter, write_tiny
from tests.verify.common import random_samples, variant, without

ALL = 2 + 2 * len(LINEARS)


def with_k_norm(norm: float):
    """A change that gives every k bias this norm, its direction kept."""

    def change(state):
        for name, tensor in state.items():
            if name.endswith("k_proj.bias"):
                tensor.mul_(norm / tensor.float().norm())

    return change


@pytest.fixture(scope="module")
def strong_folder(tmp_path_factory, base_folder) -> Path:
    """k biases of norm 400, as real models have: scores pass 1,000."""
    return variant(base_folder, tmp_path_factory.mktemp("strong") / "k400", with_k_norm(400))


@pytest.mark.parametrize("nf4", [False, True], ids=["16bit", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("own", [False, True], ids=["random lora", "adapter"])
def test_right_layers_are_equivalent(base_folder, adapter_folder, dtype, nf4, own):
    adapter = adapter_folder if own else None
    report = verify_routes(base_folder, random_samples(), adapter=adapter, nf4=nf4, dtype=dtype)
    assert (report.verdict, report.exit_code, report.fused) == ("equivalent", 0, 3), report.reason
    assert report.lengths == (48, 47, 46)
    assert [len(layer.errors) for layer in report.layers] == [ALL] * 3
    largest = {"float32": 1e-5, "bfloat16": 0.1}[dtype]
    assert all(0 < x < largest for layer in report.layers for errors in layer.errors.values() for x in errors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_k_biases_of_norm_400(strong_folder, dtype):
    report = verify_routes(strong_folder, random_samples(), dtype=dtype)
    assert (report.verdict, report.fused) == ("equivalent", 3), report.reason
    q = [layer.linear("self_attn.q_proj") for layer in report.layers]
    assert all(routed < reference for reference, routed in q), "centred keys cost less"


def without_qk_bias(monkeypatch):
    monkeypatch.setattr(qwen2tool.routing.layer, "_qk_bias", lambda spec: None)


def without_v_bias(monkeypatch):
    monkeypatch.setattr(qwen2tool.kernels.lora, "_bias", lambda projections, x: None)


def with_wrong_scaling(monkeypatch):
    right = qwen2tool.routing.examine._examine_adapter

    def wrong(name, module, adapter):
        found = right(name, module, adapter)
        return found._replace(scale=found.scale * 1.25) if name == "down_proj" else found

    monkeypatch.setattr(qwen2tool.routing.examine, "_examine_adapter", wrong)


def gradient_becomes(value):
    """The gradient of o_proj's A, which comes first in its group, turned into something else."""

    def plant(monkeypatch):
        right = qwen2tool.routing.operands.adapter_grads

        def wrong(dy, x, group, bits=None):
            found = right(dy, x, group, bits)
            return [value(found[0]), *found[1:]] if len(group.projections) == 1 and group.stream % 4 == 1 else found

        monkeypatch.setattr(qwen2tool.routing.operands, "adapter_grads", wrong)

    return plant


EVERYWHERE = "48 of 48 tensors in 3 of 3 layers are beyond their bar, outputs are among them"
ALONE = "3 of 48 tensors in 3 of 3 layers are beyond their bar, the outputs agree"
FAULTS = {
    "q and k biases dropped": (without_qk_bias, "gradient of self_attn.", EVERYWHERE),
    "v bias dropped": (without_v_bias, "is off by", EVERYWHERE),
    "scaling of one adapter": (
        with_wrong_scaling,
        ("gradient of mlp.down_proj.lora_A is off by 0.25,", "gradient of mlp.down_proj.lora_B is off by 0.25,"),
        "outputs are among",
    ),
    "one gradient zero": (gradient_becomes(torch.zeros_like), "of self_attn.o_proj.lora_A is off by 1,", ALONE),
    "one gradient lost": (gradient_becomes(lambda g: None), "of self_attn.o_proj.lora_A is off by 1,", ALONE),
    "one gradient NaN": (gradient_becomes(lambda g: g * torch.nan), "of self_attn.o_proj.lora_A is not finite,", ALONE),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named(base_folder, monkeypatch, fault, dtype):
    plant, words, extent = FAULTS[fault]
    plant(monkeypatch)
    report = verify_routes(base_folder, random_samples(), dtype=dtype)
    assert (report.verdict, report.exit_code, report.fused) == ("different", 1, 3)
    either = (words,) if isinstance(words, str) else words  # A and B are off alike: the last digits decide who leads
    assert report.reason.startswith("layer ") and any(word in report.reason for word in either), report.reason
    assert extent in report.reason, report.reason


def test_the_layers_are_those_of_the_whole_model(base_folder):
    """Single layers one after another against transformers' whole model, which shares no loading code with them."""
    whole = Qwen2ForCausalLM.from_pretrained(base_folder, dtype=torch.float32).model
    ids = torch.tensor([random_samples(1)[0].ids])
    wanted = whole(ids, output_hidden_states=True).hidden_states
    checkpoint = open_checkpoint(base_folder)
    x = embed(checkpoint, ids[0].tolist()).float()
    assert torch.equal(x, wanted[0][0])
    for index in range(3):
        single = load_layer(checkpoint, index, dtype=torch.float32, device="cpu")
        normed = single(inputs_embeds=wanted[index], use_cache=False)[0]
        last = index == 2
        assert torch.equal(normed, wanted[3] if last else whole.norm(wanted[index + 1]))
    assert relative_error(normed, wanted[2]) > 1e-2, "another layer's output would show"


def test_nf4_layers_are_those_of_the_loader(base_folder):
    checkpoint = open_checkpoint(base_folder)
    whole = load_model(checkpoint, dtype="bfloat16", nf4=True)
    single = load_layer(checkpoint, 1, dtype=torch.bfloat16, device="cpu", nf4=True).layers[0]
    for name in LINEARS:
        mine, theirs = single.get_submodule(name), whole.model.layers[1].get_submodule(name)
        assert type(mine) is type(theirs) and torch.equal(mine.weight.data, theirs.weight.data)
        one, other = (m.weight.quant_state.as_dict(packed=True) for m in (mine, theirs))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
        assert mine.compute_dtype == theirs.compute_dtype
    assert not torch.equal(single.mlp.up_proj.weight.data, whole.model.layers[0].mlp.up_proj.weight.data)


PATTERNS = {"rank_pattern": {"layers.1.mlp.up_proj": 7}, "alpha_pattern": {"layers.2.self_attn.q_proj": 5}}


def test_lora_is_put_on_as_on_the_whole_model(base_folder, tmp_path):
    """Ranks, scaling and tensors as PeftModel has them, under patterns that name a layer by its number."""
    from peft import PeftModel

    folder = write_adapter(tmp_path / "a", base_folder, use_rslora=True, **PATTERNS)
    whole = PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(base_folder), folder)
    checkpoint, adapter = open_checkpoint(base_folder), open_adapter(folder)
    scalings = set()
    for index in range(3):
        layer = load_layer(checkpoint, index, dtype=torch.float32, device="cpu").layers[0]
        put_lora(layer, index, layer_pairs(adapter, index), adapter, dtype=torch.float32)
        for name in LINEARS:
            mine, theirs = layer.get_submodule(name), whole.base_model.model.model.layers[index].get_submodule(name)
            assert mine.scaling == theirs.scaling
            assert torch.equal(mine.lora_A["default"].weight, theirs.lora_A["default"].weight)
            assert torch.equal(mine.lora_B["default"].weight, theirs.lora_B["default"].weight)
            scalings.add(mine.scaling["default"])
    assert len(scalings) == 3, "both patterns matched"


def test_an_adapter_of_some_layers_and_linears(base_folder, tmp_path, capsys):
    folder = write_adapter(tmp_path / "a", base_folder, target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
    report = verify_routes(base_folder, random_samples(), adapter=folder, dtype="bfloat16")
    assert (report.verdict, report.fused) == ("equivalent", 3)
    assert [len(layer.errors) for layer in report.layers] == [2, 6, 2]
    print_routes(report)
    assert [line.split()[7:10] for line in capsys.readouterr().out.splitlines() if line.startswith("0 ")] == [["-"] * 3]


def test_settings_and_tensors_of_an_adapter_that_disagree(base_folder, adapter_folder, tmp_path):
    import shutil

    folder = Path(shutil.copytree(adapter_folder, tmp_path / "a"))
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())
    settings["target_modules"].remove("v_proj")
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.v_proj and 2 more modules, which .* does not target"):
        verify_routes(base_folder, random_samples(), adapter=folder)
    shutil.copyfile(adapter_folder / "adapter_config.json", file)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({n: t for n, t in tensors.items() if "v_proj" not in n}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"disagree on layer 0, self_attn.v_proj"):
        verify_routes(base_folder, random_samples(), adapter=folder)


def test_layers_that_are_not_fused_say_why_as_the_plan_does(tmp_path, base_folder):
    sliding = variant(
        base_folder, tmp_path / "s", config={"use_sliding_window": True, "sliding_window": 32, "layer_types": None}
    )
    report = verify_routes(sliding, random_samples(), dtype="bfloat16")
    assert (report.verdict, report.fused) == ("equivalent", 1), report.reason
    assert report.reason.startswith("1 of 3 layers are fused")
    routes = {route.module: route for route in plan_checkpoint(open_checkpoint(sliding)).routes}
    for layer in report.layers:
        planned = routes[f"model.layers.{layer.index}"]
        assert layer.not_fused == (planned.reason if planned.implementation == "reference" else None)
    full = verify_routes(base_folder, random_samples(), dtype="bfloat16")
    assert report.layers[1].errors != full.layers[1].errors, "the window was looked through"


def test_no_layer_is_fused(tmp_path, base_folder):
    gelu = variant(base_folder, tmp_path / "g", config={"hidden_act": "gelu"})
    report = verify_routes(gelu, random_samples())
    assert (report.verdict, report.fused) == ("equivalent", 0)
    assert report.reason.startswith("no layer is fused (the activation is GELUActivation, not SiLU)")


def test_a_reference_that_overflows_decides_nothing(tmp_path, base_folder):
    def enlarge(state):
        state["model.layers.1.mlp.down_proj.weight"].mul_(1e5)

    loud = variant(base_folder, tmp_path / "loud", enlarge)
    report = verify_routes(loud, random_samples(), dtype="float16")
    assert (report.verdict, report.exit_code) == ("undecided", 2)
    assert "layer 1: transformers' own gives NaN or Inf in float16" in report.reason
    text = json.dumps(report.to_json(), allow_nan=False)
    assert "null" in text
    assert verify_routes(loud, random_samples(), dtype="bfloat16").verdict == "equivalent"


def layer_with(reference: float, routed: float, **changes) -> LayerReport:
    errors = {"output": Errors(4e-3, 4e-3), "mlp.up_proj.lora_B": Errors(reference, routed)}
    return LayerReport(**{"index": 4, "not_fused": None, "finite": True, "errors": errors} | changes)


@pytest.mark.parametrize(
    ("layer", "tokens", "verdict", "words"),
    [
        (layer_with(0.01, 0.0157), 99, "equivalent", "all 2 outputs and gradients"),
        (layer_with(0.01, 0.0159), 99, "undecided", "up_proj.lora_B is off by 0.016, where"),
        (layer_with(0.01, 0.0315), 99, "undecided", "try a longer one"),
        (layer_with(0.01, 0.0317), 99, "different", "layer 4: the gradient of mlp.up_proj.lora_B is off by 0.032"),
        (layer_with(0.01, float("inf")), 99, "different", "is not finite"),
        (layer_with(float("inf"), 0.01), 99, "undecided", "NaN or Inf"),
        (layer_with(0.01, 0.01, finite=False), 99, "undecided", "NaN or Inf"),
        (layer_with(0.01, 0.01), 31, "undecided", "31 tokens"),
        (layer_with(0.01, 0.01, not_fused="why"), 99, "equivalent", "no layer is fused (why)"),
    ],
)
def test_the_rule(layer, tokens, verdict, words):
    """bfloat16: 1.5 times the reference's error and 8e-4 pass, up to twice that is not decided."""
    found, reason = decide_routes([layer], "bfloat16", tokens)
    assert found == verdict and words in reason, reason


def test_a_fault_outranks_a_dark_layer():
    layers = [layer_with(float("inf"), 1.0), layer_with(0.01, 1.0)]
    assert decide_routes(layers, "bfloat16", 99)[0] == "different"


@pytest.mark.parametrize(
    ("lengths", "wanted"),
    [
        ([9, 9, 9, 9], [9, 8, 7]),
        ([5, 9], [5, 4, 3]),
        ([10], [5, 2, 3]),
        ([1], [1]),
        ([], []),
    ],
)
def test_three_sequences_of_different_lengths(lengths, wanted):
    assert [len(sequence) for sequence in ragged([list(range(n)) for n in lengths])] == wanted


def test_relative_error_by_hand():
    truth = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(2), torch.zeros(2)) == float("inf")
    assert relative_error(torch.tensor([3.0, float("nan")]), truth) == float("inf")


def test_random_lora_is_the_same_every_time_and_another_for_each_layer(base_folder):
    checkpoint = open_checkpoint(base_folder)
    one, again, other = (random_pairs(checkpoint, index) for index in (0, 0, 1))
    assert all(torch.equal(x, y) for name in LINEARS for x, y in zip(one[name], again[name], strict=True))
    assert all(not torch.equal(one[name][0], other[name][0]) and one[name][1].any() for name in LINEARS)


def test_on_the_command_line(base_folder, adapter_folder, monkeypatch):
    command = ("verify-equivalence", base_folder, "--routes", "--dtype", "bfloat16", "--device", "cpu")
    outcome = run(*command, "--adapter", adapter_folder, "--quantize", "nf4", "--json")
    found = json.loads(outcome.out)
    assert (outcome.code, found["verdict"], found["fused"], found["quantize"]) == (0, "equivalent", 3, "nf4")
    assert found["layers"][2]["errors"]["self_attn.k_proj.lora_A"].keys() == {"reference", "routed", "ratio"}
    without_v_bias(monkeypatch)
    outcome = run(*command)
    lines = outcome.out.splitlines()
    assert outcome.code == 1 and lines[0].startswith("different: layer ") and EVERYWHERE in lines[0]
    assert "layers: 3 fused" in lines and max(map(len, lines[1:])) <= 100
    assert [line.split()[0] for line in lines if line.count(" > ") == 5] == ["0", "1", "2", "mean", "most"]
    assert "LoRA is random" in outcome.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "CANDIDATE is missing"),
        (("BASE", "--routes"), "Leave CANDIDATE out"),
        (("BASE", "--quantize", "nf4"), "--adapter-on nf4"),
        (("--routes", "--adapter-on", "nf4"), "--quantize nf4"),
        (("--routes", "--quantize", "int3"), "--quantize is 'int3'"),
        (("--routes", "--adapter", "nowhere"), "not a PEFT adapter"),
    ],
)
def test_flags_that_do_not_go_together(base_folder, flags, words):
    outcome = run("verify-equivalence", base_folder, *(base_folder if flag == "BASE" else flag for flag in flags))
    assert outcome.code == 2 and words in outcome.error


def test_a_model_without_biases_is_refused(tmp_path, base_folder):
    broken = variant(base_folder, tmp_path / "b", without("k_proj.bias"))
    with pytest.raises(UserError, match="not whole") as caught:
        verify_routes(broken, random_samples())
    assert caught.value.exit_code == 2


def test_a_tied_model_in_one_file(tmp_path):
    folder = write_tiny(tmp_path / "t", shards=1, tie_word_embeddings=True, dtype=torch.float32)
    report = verify_routes(folder, random_samples(2, 20), dtype="bfloat16")
    assert (report.verdict, report.lengths) == ("equivalent", (20, 10, 9)), report.reason


def test_nf4_rows_that_are_no_multiple_of_a_block(tmp_path, monkeypatch):
    """bitsandbytes' CPU kernel unpacks those of 96 wrongly: the layer is judged by what was quantised all the same."""
    folder = write_tiny(tmp_path / "odd", intermediate_size=96)
    checkpoint = open_checkpoint(folder)
    packed, plain = (load_layer(checkpoint, 0, dtype=torch.float32, device="cpu", nf4=nf4) for nf4 in (True, False))
    weight, before = plain.layers[0].mlp.down_proj.weight, plain.layers[0].mlp.down_proj.weight.clone()
    dequantise(plain.layers[0], packed.layers[0])
    assert 0.05 < relative_error(weight, before) < 0.12, "what NF4 costs numbers in blocks of 64"
    theirs = packed.layers[0].mlp.down_proj(torch.eye(96)).T
    wrong = ["mlp.down_proj"] if relative_error(theirs, weight) > 1e-5 else []
    assert misread(packed.layers[0]) == wrong
    for dtype in ("float32", "bfloat16"):
        report = verify_routes(folder, random_samples(), nf4=True, dtype=dtype)
        assert report.verdict == "equivalent", report.reason
        assert [note for note in report.notes if "mlp.down_proj" in note] == [*report.notes[: len(wrong)]]
    without_v_bias(monkeypatch)
    assert verify_routes(folder, random_samples(), nf4=True).verdict == "different"


@pytest.mark.gpu
@pytest.mark.parametrize("nf4", [False, True], ids=["16bit", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_on_a_gpu(strong_folder, adapter_folder, dtype, nf4):
    """Triton kernels and fused attention; "float32" leaves the plain kernel to both sides.

    One text in four or five is not decided in fp32 (on an H100 the worst gradient of NF4 was at 0.66, 0.78, 0.85 and
    1.01 times its bar, plain PyTorch in our kernels' place at 0.67 to 0.95): hence three texts, of which two decide.
    """
    options = {"adapter": adapter_folder, "nf4": nf4, "dtype": dtype, "device": "cuda"}
    reports = [verify_routes(strong_folder, random_samples(4, 100, seed=seed), **options) for seed in range(3)]
    verdicts = sorted(report.verdict for report in reports)
    assert verdicts[:2] == ["equivalent"] * 2 and "different" not in verdicts, [report.reason for report in reports]
    assert {report.fused for report in reports} == {3}


@pytest.mark.gpu
def test_a_planted_fault_on_a_gpu(base_folder, monkeypatch):
    without_v_bias(monkeypatch)
    report = verify_routes(base_folder, random_samples(), device="cuda")
    assert report.verdict == "different" and EVERYWHERE in report.reason, report.reason
