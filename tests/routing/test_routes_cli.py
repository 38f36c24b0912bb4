"""`qwen2tool routes`: the table, the JSON, errors in one line, and the price of a 72B."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from qwen2tool.assets import TINY_QWEN2
from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.geometry import expected_tensors, geometry
from qwen2tool.routing.offline import plan_checkpoint
from tests.checkpoint.edits import drop
from tests.checkpoint.files import edit_json
from tests.cli_runner import run
from tests.tiny import write_adapter, write_tiny


def test_the_table(base_folder, adapter_folder):
    seen = run("routes", base_folder, "--adapter", adapter_folder, "--quantize", "nf4")
    assert seen.code == 0 and seen.err == ""
    lines = [line.split() for line in seen.out.splitlines()]
    assert lines[0] == ["module", "runs", "why"]
    assert "\nlayers.0-2 " in seen.out and "\n  self_attn.q_proj, k_proj " in seen.out
    assert seen.out.count("4-bit base, LoRA rank 4") == 4
    assert seen.out.splitlines()[-1] == "3 of 3 layers fused, in training with the base frozen"
    plain = run("routes", base_folder).out
    assert "4-bit" not in plain and "rank" not in plain and "bfloat16 base, no adapter" in plain


def test_json_has_every_module(base_folder, adapter_folder):
    seen = run("routes", base_folder, "--adapter", adapter_folder, "--json")
    found = json.loads(seen.out)
    assert found["layers"] == {"fused layer": 3}
    assert found["modules"] == plan_checkpoint(open_checkpoint(base_folder), adapter_folder).to_json()
    assert len(found["modules"]) == 3 + 3 * 8
    assert {"module", "implementation", "reason"} == set(found["modules"][0])


def test_a_reference_layer_is_no_fault(base_folder, tmp_path):
    adapter = write_adapter(tmp_path / "dora", base_folder, use_dora=True)
    seen = run("routes", base_folder, "--adapter", adapter)
    assert seen.code == 0 and "0 of 3 layers fused" in seen.out and "DoraLinearVariant" in seen.out


def test_errors_are_one_line(base_folder, base_copy, adapter_folder, tmp_path):
    other = write_tiny(tmp_path / "other", num_hidden_layers=2)
    nowhere = run("routes", tmp_path / "nowhere")
    assert nowhere.code == 2 and "no such file or folder" in nowhere.error
    misfit = run("routes", other, "--adapter", adapter_folder)
    assert misfit.code == 2 and "layers.2." in misfit.error and str(adapter_folder) in misfit.error
    no_adapter = run("routes", base_folder, "--adapter", base_folder)
    assert no_adapter.code == 2 and "not a PEFT adapter" in no_adapter.error
    choice = run("routes", base_folder, "--quantize", "int3")
    assert choice.code == 2 and "--quantize is 'int3'. Give one of none, nf4." in choice.error
    drop(base_copy, "model.layers.2.self_attn.v_proj.bias")
    damaged = run("routes", base_copy)
    assert damaged.code == 1 and "1 of 9 q/k/v biases are missing" in damaged.error
    edit_json(base_copy / "config.json", model_type="llama")
    llama = run("routes", base_copy)
    assert llama.code == 2 and "model_type is 'llama', not 'qwen2'" in llama.error
    assert all(not outcome.out for outcome in (nowhere, misfit, no_adapter, choice, damaged, llama))


def test_help_says_what_it_is_for():
    seen = run("routes", "--help")
    assert seen.code == 0 and all(flag in seen.out for flag in ("--adapter", "--quantize", "--json"))
    assert "routes" in run("--help").out


def test_a_wrong_model_type_is_told_before_torch_is_imported(base_copy):
    edit_json(base_copy / "config.json", hidden_size="wide")
    check = (
        "import sys; sys.path.insert(0, '.'); from tests.cli_runner import run; "
        f"o = run('routes', {str(base_copy)!r}); print(o.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]


BIG = {
    "model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
    "torch_dtype": "bfloat16", "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 80,
}  # fmt: skip


@pytest.fixture
def hollow_72b(tmp_path):
    """The headers of a 72B over 145 GB of nothing: a file with a hole."""
    folder, header, end = tmp_path / "72b", {}, 0
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BIG))
    for name, shape in expected_tensors(geometry(BIG)).items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def test_a_72b_takes_little_more_than_the_imports(hollow_72b, adapter_folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copy(adapter_folder / "adapter_config.json", adapter)
    script = (
        "from qwen2tool.checkpoint.folder import open_checkpoint; from pathlib import Path; "
        "from qwen2tool.routing.offline import plan_checkpoint; from qwen2tool.console import resident_peak; "
        "import bitsandbytes, peft, torch, transformers.models.qwen2.modeling_qwen2; before = resident_peak(); "
        f"plan = plan_checkpoint(open_checkpoint({str(hollow_72b)!r}), Path({str(adapter)!r}), nf4=True); "
        "print(plan.counts['fused layer'], len(plan.routes), resident_peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    layers, routes, peak = map(int, done.stdout.split())
    assert (layers, routes) == (80, 3 + 80 * 8)
    assert peak < 0.6e9 and open_checkpoint(hollow_72b).nbytes > 140e9


def test_the_bundled_model():
    assert "5 of 5 layers fused" in run("routes", TINY_QWEN2).out


def test_the_memory_plan(tmp_path, base_folder):
    seen = run("routes", base_folder, "--memory-budget", "1", "--tokens", "256")
    last = seen.out.splitlines()[-1]
    assert last.startswith("memory: kept 3 x all; about ") and last.endswith("LoRA of rank 64 on all seven linears")
    *_, plan, verdict = run("routes", base_folder, "--memory-budget", "0.000001", "--tokens", "256").out.splitlines()
    assert verdict.startswith("1e-06 GB are too little for the smallest plan;")
    named = plan.split("; about ")[1].split()[0]
    again = run("routes", base_folder, "--memory-budget", named, "--tokens", "256").out
    assert "too little" not in again and "too little" not in seen.out, "what it names is enough"
    found = json.loads(run("routes", base_folder, "--memory-budget", "0.000001", "--json").out)["memory"]
    assert found["keep"]["input"] == 3 and found["embedding_on_host"] and found["estimated_bytes"] > 1000
    assert "memory" not in json.loads(run("routes", base_folder, "--json").out)
