"""inspect of packed checkpoints: their linears may be packed in any known way, their biases never are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.inventory import take_inventory
from qwen2tool.checkpoint.report import inspect_checkpoint
from tests.checkpoint.edits import drop, edit_config, put, rewrite

K1 = "model.layers.1.self_attn.k_proj.bias"
UP1 = "model.layers.1.mlp.up_proj"
BNB = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def packed_by_bitsandbytes(base_folder, tmp_path_factory) -> dict[str, Path]:
    """kind -> a folder that transformers and bitsandbytes wrote."""
    root = tmp_path_factory.mktemp("bnb")
    for kind, settings in BNB.items():
        model = AutoModelForCausalLM.from_pretrained(base_folder, quantization_config=BitsAndBytesConfig(**settings))
        model.save_pretrained(root / kind)
    return {kind: root / kind for kind in BNB}


@pytest.fixture(params=BNB)
def bnb_copy(request, packed_by_bitsandbytes, tmp_path) -> Path:
    return Path(shutil.copytree(packed_by_bitsandbytes[request.param], tmp_path / request.param))


def wrong(folder: Path) -> str:
    report = inspect_checkpoint(folder)
    assert report.exit_code == bool(report.findings)
    return " ".join(report.findings)


def test_bitsandbytes_checkpoints_are_whole(bnb_copy, base_folder):
    report = inspect_checkpoint(bnb_copy)
    assert (report.verdict, report.findings, report.exit_code) == ("qwen2", (), 0)
    found = report.to_json()
    assert found["quantization"]["evidence"] == {f"bitsandbytes {bnb_copy.name}": 21}
    assert found["biases"]["dtypes"] == {"BF16": 9} and found["tensors"]["extra"] == []
    assert found["biases"]["stats"] == inspect_checkpoint(base_folder).to_json()["biases"]["stats"]
    assert found["parameters"] == inspect_checkpoint(base_folder).to_json()["parameters"]


def test_a_bias_that_packing_lost(bnb_copy):
    drop(bnb_copy, K1)
    assert "1 of 9 q/k/v biases are missing beside packed weights" in wrong(bnb_copy) and K1 in wrong(bnb_copy)


def test_a_packed_weight_needs_what_unpacks_it(bnb_copy):
    part = f"{UP1}.SCB" if bnb_copy.name == "int8" else f"{UP1}.weight.absmax"
    drop(bnb_copy, part)
    assert wrong(bnb_copy) == f"1 tensor is missing, the first is {part}"


def test_a_packed_weight_itself(bnb_copy):
    drop(bnb_copy, f"{UP1}.weight")
    assert wrong(bnb_copy) == f"1 tensor is missing, the first is {UP1}.weight"


def test_a_quant_state_is_a_part(packed_by_bitsandbytes, tmp_path):
    folder = Path(shutil.copytree(packed_by_bitsandbytes["nf4"], tmp_path / "copy"))
    drop(folder, f"{UP1}.weight.quant_state.bitsandbytes__nf4")
    assert wrong(folder) == f"1 tensor is missing, the first is {UP1}.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_a_bias_stored_as_integers(bnb_copy, dtype):
    put(bnb_copy, K1, torch.ones(32, dtype=dtype))
    name = {torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32"}[dtype]
    assert f"1 q/k/v biases are stored as {name}" in wrong(bnb_copy)
    assert inspect_checkpoint(bnb_copy).headline.endswith(f"1 of them as {name}, which is no bias that can be added")


def test_zero_biases_are_seen_beside_packed_weights(bnb_copy):
    rewrite(bnb_copy, lambda state: [t.zero_() for name, t in state.items() if name.endswith("_proj.bias")])
    assert "they were re-initialised" in wrong(bnb_copy)


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv"])
def test_fp8_weights(base_copy, scale):
    def change(state):
        for name in [name for name in state if name.endswith("_proj.weight")]:
            state[name] = torch.ones(state[name].shape).to(torch.float8_e4m3fn)
            state[f"{name.removesuffix('weight')}{scale}"] = torch.ones(1)

    rewrite(base_copy, change)
    edit_config(base_copy, quantization_config={"quant_method": "fp8"})
    assert wrong(base_copy) == ""
    drop(base_copy, f"{UP1}.{scale}")
    assert f"{UP1}.weight_scale" in wrong(base_copy)
    put(base_copy, K1, torch.ones(32).to(torch.float8_e4m3fn))
    assert "1 q/k/v biases are stored as F8_E4M3" in wrong(base_copy)


def test_compressed_tensors(base_copy):
    pack(base_copy, "weight_packed", "weight_scale", "weight_shape")
    edit_config(base_copy, quantization_config={"quant_method": "compressed-tensors"})
    assert wrong(base_copy) == ""
    assert inspect_checkpoint(base_copy).to_json()["quantization"]["evidence"] == {"compressed-tensors": 21}
    drop(base_copy, f"{UP1}.weight_scale")
    assert f"{UP1}.weight_scale" in wrong(base_copy)


def test_a_packed_head(base_copy):
    pack(base_copy, "qweight", "scales")
    put(base_copy, "lm_head.qweight", torch.ones(4, 4, dtype=torch.int32))
    put(base_copy, "lm_head.scales", torch.ones(4))
    drop(base_copy, "lm_head.weight")
    edit_config(base_copy, quantization_config={"quant_method": "gptq", "bits": 4, "lm_head": True})
    assert wrong(base_copy) == ""
    drop(base_copy, "lm_head.qweight")
    assert "lm_head.weight is absent" in wrong(base_copy)


def test_a_plain_weight_among_packed_ones_keeps_its_shape(base_copy):
    pack(base_copy, "qweight", "scales")
    edit_config(base_copy, quantization_config={"quant_method": "awq", "bits": 4})
    drop(base_copy, f"{UP1}.qweight", f"{UP1}.scales")
    put(base_copy, f"{UP1}.weight", torch.ones(100, 64))
    assert take_inventory(open_checkpoint(base_copy)).misshapen == {}
    put(base_copy, f"{UP1}.weight", torch.ones(100, 63))
    assert list(take_inventory(open_checkpoint(base_copy)).misshapen) == [f"{UP1}.weight"]


def test_trained_biases_where_no_qwen2_has_any(base_copy):
    pack(base_copy, "qweight", "scales")
    edit_config(base_copy, quantization_config={"quant_method": "gptq", "bits": 4})
    put(base_copy, "model.layers.0.mlp.up_proj.bias", torch.full((100,), 0.5))
    assert "1 biases beside q, k and v are not zero (model.layers.0.mlp.up_proj.bias first)" in wrong(base_copy)


def pack(folder: Path, *parts: str) -> None:
    """Every linear as GPTQ or AWQ store it: int32 words in place of the weight."""

    def change(state):
        for name in [name for name in state if name.endswith("_proj.weight")]:
            del state[name]
            state |= {f"{name.removesuffix('weight')}{part}": torch.ones(4, 4, dtype=torch.int32) for part in parts}

    rewrite(folder, change)


def test_a_quantised_checkpoint(base_copy):
    whole = inspect_checkpoint(base_copy).to_json()["parameters"]
    pack(base_copy, "qweight", "qzeros", "scales", "g_idx")
    assert "config.json does not say so" in " ".join(inspect_checkpoint(base_copy).findings)
    edit_config(base_copy, quantization_config={"quant_method": "gptq", "bits": 4})
    report = inspect_checkpoint(base_copy)
    assert (report.verdict, report.findings) == ("qwen2", ())
    assert report.to_json()["quantization"]["evidence"]["GPTQ"] == 21
    assert report.to_json()["parameters"] == whole
    drop(base_copy, "model.layers.1.mlp.up_proj.qweight")
    assert wrong(base_copy) == f"1 tensor is missing, the first is {UP1}.weight"


def test_zero_biases_of_gptq_writers_are_noted(base_copy):
    pack(base_copy, "qweight", "scales", "g_idx")
    edit_config(base_copy, quantization_config={"quant_method": "gptq", "bits": 4})
    put(base_copy, "model.layers.0.mlp.up_proj.bias", torch.zeros(100))
    report = inspect_checkpoint(base_copy)
    assert report.findings == () and any("GPTQ writers" in note for note in report.notes)


def test_a_quantization_config_without_packed_tensors(base_copy):
    edit_config(base_copy, quantization_config={"quant_method": "awq", "bits": 4})
    assert wrong(base_copy) == "config.json has a quantization_config, but no tensor is stored packed"
