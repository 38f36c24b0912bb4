"""Tables of the speed measurements: their text from a sample, and what stands there before anything was measured."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import measured  # noqa: E402
import readme_tables  # noqa: E402
import speed_tables  # noqa: E402

MADE_BY = {
    "command": "python benchmarks/train_step.py --settings seed", "commit": "abc",
    "machine": {"gpu": "H100", "torch": "2.11", "transformers": "5.17", "peft": "0.21", "bitsandbytes": "0.50"},
}  # fmt: skip
SETTING = {
    "made_by": MADE_BY, "geometry": "qwen1.5-7b", "batch": 1, "length": 1024, "rank": 64, "alpha": 16, "dropout": 0.05,
    "quantize": "nf4", "recompute": "all", "budget_gb": 0.0, "accumulation": 16, "layers": None,
    "ceilings": {"copy_bytes_per_s": 2.98e12, "flops_per_s": 771e12},
    "peers": {
        "ours": {"ms": 1600.4, "micro_batch_ms": 100.0, "memory_gb": {"peak_allocated": 9.44}, "floor_fraction": 0.714,
                 "times_unsloth": 3.98, "losses": [14.0, 13.0, 12.5]},
        "unsloth": {"ms": 6370.0, "micro_batch_ms": 398.1, "memory_gb": {"peak_allocated": 8.78},
                    "losses": [14.001, 12.98, 12.51]},
        "hf_kbit": {"error": "OutOfMemoryError: CUDA out of memory. Tried to allocate"},
    },
    "runs": [
        {"peer": "ours", "versions": {"torch": "2.11"}},
        {"peer": "unsloth", "versions": {"unsloth": "2026.10.9"}},
        {"peer": "hf_kbit", "error": "OutOfMemoryError: ..."},
    ],
}  # fmt: skip
KERNELS = {
    "made_by": MADE_BY,
    "rows": [
        {"op": "swiglu_forward", "shape": "8192 x 11008", "bytes_per_s": 2.69e12, "of_copy": 0.902,
         "microseconds": {"ours": 201.4, "liger": 250.0, "torch": 512.6}},
        {"op": "head, both", "shape": "s", "of_products": 0.88,
         "microseconds": {"ours": 30_111.0, "products": 26_000.2}},
        {"op": "keep_bits", "shape": "t", "microseconds": {"ours": 9.96, "liger": "ImportError: none"}},
        {"op": "broken", "shape": "u", "microseconds": {"ours": "RuntimeError: no"}},
    ],
}  # fmt: skip


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["speed", "kernels"])
def test_before_the_first_measurement(results, name):
    assert readme_tables.TABLES[name]() == "Not measured yet."


def test_speed_table(results):
    (results / "train_step.json").write_text(json.dumps({"seed": SETTING}))
    assert speed_tables.speed().splitlines() == [
        "|  | qwen2tool | Unsloth | HF + PEFT, kbit | times Unsloth | of the floor | losses apart |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| seed: qwen1.5-7b, 16 x 1 x 1024, nf4, r 64, dropout 0.05 | 1,600 ms, 9.4 GB | 6,370 ms, 8.8 GB |"
        " OutOfMemoryError | 3.98x | 71% | 0.020 |",
        "| seed: one micro-batch of it | 100 ms, 9.4 GB | 398 ms, 8.8 GB | OutOfMemoryError | 3.98x | 71% | 0.020 |",
        "",
        "`python benchmarks/train_step.py --settings seed` at abc; H100; torch 2.11, transformers 5.17, peft 0.21,"
        " bitsandbytes 0.50. Unsloth 2026.10.9; copy 2.98 TB/s, products 771 TFLOP/s.",
    ]


def test_settings_without_ours_or_accumulation_and_with_a_budget():
    part = deepcopy(SETTING) | {"accumulation": 1, "quantize": "none", "layers": 4}
    part |= {"budget_gb": 42.0, "recompute": "none"}
    part["peers"]["ours"] = {"error": "stopped after 300 s"}
    rows = speed_tables.speed_table({"seed": SETTING, "big": part}).splitlines()
    assert len(rows) == 5
    assert rows[-1] == (
        "| big: qwen1.5-7b, 4 layers, 1 x 1024, 16 bit, r 64, dropout 0.05, 42 GB, no checkpointing |"
        " stopped after 300 s | 6,370 ms, 8.8 GB | OutOfMemoryError | - | - | - |"
    )
    dpo = speed_tables.speed_table({"dpo": part | {"reference_pass": 1}}).splitlines()[-1]
    assert "no checkpointing, a pass with the adapter off before |" in dpo
    small = speed_tables.speed_table({"small": part | {"recompute": "all", "budget_gb": 5.3}}).splitlines()[-1]
    assert "dropout 0.05, 5.3 GB |" in small


def test_losses_are_held_against_hf_where_it_has_run():
    part = deepcopy(SETTING)
    part["peers"]["hf"] = {"ms": 900.0, "micro_batch_ms": 9.0, "memory_gb": {"peak_allocated": 20.0},
                           "losses": [14.0, 13.003, 12.5]}  # fmt: skip
    rows = speed_tables.speed_table({"seed": part}).splitlines()[2:]
    assert len(rows) == 2 and all(row.endswith("| 0.003 |") for row in rows)
    for word in (float("nan"), "nan", "inf"):  # as it is measured, and as files have it
        part["peers"]["ours"]["losses"] = [14.0, word, 12.5]
        assert speed_tables.speed_table({"seed": part}).splitlines()[2].endswith("| not finite |")
    del part["peers"]["ours"]["losses"]
    assert speed_tables.speed_table({"seed": part}).splitlines()[2].endswith("| - |")


def test_everybody_s_distance_from_fp32_where_that_ran(results):
    part = deepcopy(SETTING)
    ours, unsloth = part["peers"]["ours"]["losses"], part["peers"]["unsloth"]["losses"]
    part["peers"]["hf_fp32"] = part["peers"]["unsloth"] | {"losses": [ours[0], ours[1] + 0.0004, *ours[2:]]}
    (results / "train_step.json").write_text(json.dumps({"half": part, "seed": SETTING}))
    largest = max(abs(a - b) for a, b in zip(unsloth, part["peers"]["hf_fp32"]["losses"], strict=True))
    assert largest > 0.01
    lines = [line for line in speed_tables.speed().splitlines() if "fp32" in line]
    assert lines == [
        "half, the largest of 3 distances from the losses of HF + PEFT in fp32:"
        f" qwen2tool 0.0004, Unsloth {largest:.4f}."
    ]


def test_measurements_of_one_call_are_named_once(results):
    (results / "train_step.json").write_text(json.dumps({"seed": SETTING, "small": SETTING}))
    assert speed_tables.speed().count("at abc") == 1
    other = SETTING | {"made_by": MADE_BY | {"commit": "def"}}
    (results / "train_step.json").write_text(json.dumps({"seed": SETTING, "small": other}))
    assert [speed_tables.speed().count(f"at {commit}") for commit in ("abc", "def")] == [1, 1]


def test_kernel_table(results):
    (results / "kernels.json").write_text(json.dumps({"kernels": KERNELS}))
    assert speed_tables.kernels().splitlines()[:6] == [
        "| op | shape | ours | liger | torch | products | of copy | of products |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| swiglu_forward | 8192 x 11008 | 201 us | 250 us | 513 us | - | 2,690 GB/s, 90% | - |",
        "| head, both | s | 30,111 us | - | - | 26,000 us | - | 88% |",
        "| keep_bits | t | 10.0 us | ImportError | - | - | - | - |",
        "| broken | u | RuntimeError | - | - | - | - | - |",
    ]


def line(what: str, dtype: str, seed: int, mean: float, largest: float) -> dict:
    return {"what": what, "dtype": dtype, "seed": seed, "steps": 50, "mean": mean, "max": largest}


def trained(dtype: str, routes: str, seed: int, *, steps: int = 50, skipped: tuple = (), finite: bool = True) -> dict:
    return {
        "dtype": dtype, "routes": routes, "seed": seed, "losses": [1.0] * steps, "finite": finite,
        "skipped": len(skipped), "skipped_at": list(skipped),
    }  # fmt: skip


TRAJECTORIES = {
    "made_by": MADE_BY,
    "runs": [
        trained("bfloat16", "auto", 1), trained("bfloat16", "auto", 2), trained("bfloat16", "reference", 1),
        trained("float16", "auto", 1, skipped=(1,)), trained("float16", "auto", 2, skipped=(1, 4)),
        trained("float16", "reference", 1), trained("float16", "reference", 2, steps=11, finite=False),
    ],
    "comparisons": [
        line(readme_tables.DISTANCES[0], "bfloat16", 1, 0.01, 0.05),
        line(readme_tables.DISTANCES[0], "bfloat16", 2, 0.03, 0.04),
        line(readme_tables.DISTANCES[1], "bfloat16", 1, 0.002, 0.003) | {"steps": 0},
        line(readme_tables.DISTANCES[2], "float16", 1, 0.002, 0.003),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ["trajectories", "gradients"])
def test_proof_before_the_first_measurement(results, name):
    assert readme_tables.TABLES[name]() == "Not measured yet."


def test_trajectory_table(results):
    (results / "trajectories.json").write_text(json.dumps({"real": TRAJECTORIES}))
    assert readme_tables.trajectories().splitlines()[:4] == [
        "|  | dtype | routed - reference | routed - fp32 | reference - fp32 | routed | reference |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| real | bfloat16 | 0.02 (0.05) | - | - | finite | finite |",
        "| real | float16 | - | - | 0.002 (0.003) | finite, 2 of 50 skipped, the last at 4 | not finite at step 12 |",
    ]
    assert readme_tables.trajectories().count("at abc") == 1


ERRORS = {"all": 0.0123, "q_proj_all": 0.02, "k_proj_all": 0.03, "v_proj_all": 0.04, "q_proj": [0.1, 0.25]}
NORM = ("q_proj", "median", "worst")


def norms(*errors: float) -> dict:
    return dict(zip(NORM, errors, strict=True))


GRADIENTS = {
    "made_by": MADE_BY, "model": "real", "tokens": 1400, "data": "file.json", "answer_tokens": 900,
    "setting": {"rank": 16},
    "errors": {
        "bfloat16": {"ours": ERRORS, "unsloth": {"error": "ModuleNotFoundError: No module"}},
        "float16": {"hf sdpa": dict.fromkeys(ERRORS, "nan") | {"q_proj": ["nan", "nan"]}},
    },
    "k_bias": {"norms": [0, 100.0], "errors": {"float16": {
        "ours": [norms(0.002, 0.0021, 0.003), norms(0.0025, 0.0024, 0.0031)],
        "hf sdpa": [norms(0.002, 0.0022, 0.003), dict.fromkeys(NORM, "nan")],
    }}},
}  # fmt: skip


def test_gradient_tables(results):
    (results / "gradients.json").write_text(json.dumps({"real": GRADIENTS}))
    lines = readme_tables.gradients().splitlines()
    assert lines[:8] == [
        "|  | dtype | all | q_proj | k_proj | v_proj | q of layer 0 | q of layer 1 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| qwen2tool | bfloat16 | 1.23% | 2.00% | 3.00% | 4.00% | 10.00% | 25.00% |",
        "| Unsloth | bfloat16 | ModuleNotFoundError | - | - | - | - | - |",
        "| HF sdpa | float16 | not finite | not finite | not finite | not finite | not finite | not finite |",
        "",
        "real: 1400 tokens of file.json, 900 of them scored, LoRA r 16 on all linears; errors against fp32 with plain"
        " attention.",
        "",
    ]
    assert lines[8:12] == [
        "| q_proj, norm of k biases | dtype | 0 | 100 |",
        "| --- | --- | --- | --- |",
        "| qwen2tool | float16 | 0.20% (0.21%, 0.30%) | 0.25% (0.24%, 0.31%) |",
        "| HF sdpa | float16 | 0.20% (0.22%, 0.30%) | not finite |",
    ]


def peer_run(rate=None, **changes):
    """An SFT run of benchmarks/trl_peer.py; without a rate as results of old have it."""
    run = {"losses": [2.0, 1.9], "grad_norms": ["0.3", "0.4"], "median_step_seconds": 1.5, "peak_memory_bytes": 1.19e9,
           "held_out": {"sft": {"nll": 1.6}}}  # fmt: skip
    return run | ({"useful_tokens_per_s": rate} if rate else {}) | changes


def our_run(rate=None):
    report = {"eval_before": {"nll": 1.7}, "eval_after": {"nll": 1.5}, "step_seconds": 0.4, "peak_memory": 1.1e9}
    scores = {"accuracy": 0.75, "margin": 0.1}
    return {
        "sft": {"report": report, **({"useful_tokens_per_s": rate} if rate else {})},
        "dpo": {"report": {"eval_after": scores}},
    }


def test_training_table_with_useful_tokens():
    peers = {
        "sft, cudnn on": peer_run(2500.0, grad_norms=["0.3", "nan"], held_out={"sft": {"nll": "nan"}}),
        "sft, cudnn off": peer_run(5000.0),
        "dpo, cudnn off": {"held_out": {"dpo": {"accuracy": 0.5, "margin": 0.2}}},
        "sft, unsloth": {"error": "Traceback\n  File\nImportError: no", "held_out": {"error": "no adapter was saved"}},
    }
    assert readme_tables.training_table(our_run(20_000.0), peers).splitlines()[2:] == [
        "| qwen2tool | 1.700 | 1.500 | finite | 0.750 | 0.100 | 0.40 s | 20,000 | 1.00x | 1.10 GB |",
        "| TRL, cuDNN attention forbidden | 1.700 | 1.600 | finite | 0.500 | 0.200 | 1.50 s |"
        " 5,000 | 4.00x | 1.19 GB |",
        "| TRL, cuDNN attention on (the default) | 1.700 | NaN | NaN from step 2, loss logged as 0 | - | - | 1.50 s |"
        " 2,500 | 8.00x | 1.19 GB |",
        "| TRL on Unsloth | 1.700 | ImportError | - | - | - | - | - | - | - |",
    ]


def test_a_later_run_of_one_task_stands_in_for_that_task_alone(results):
    later = MADE_BY | {"command": "later"}
    parts = {
        "train": {"made_by": MADE_BY, **our_run(1.0)},
        "train_sft": {"made_by": later, "sft": our_run(20_000.0)["sft"]},
        "peers": {"made_by": MADE_BY, "sft, cudnn on": peer_run(2500.0), "sft, cudnn off": peer_run(1.0)},
        "peers_sft": {"made_by": later, "sft, cudnn off": peer_run(5000.0)},
    }
    (results / "real_model.json").write_text(json.dumps(parts))
    text = readme_tables.training()
    assert "| 20,000 | 1.00x |" in text and "| 0.750 | 0.100 |" in text
    assert "| 5,000 | 4.00x |" in text and "| 2,500 | 8.00x |" in text
    assert text.count("`later` at abc") == 1 and text.count(f"`{MADE_BY['command']}` at abc") == 1


def test_training_table_of_results_without_rates():
    ours = our_run()
    del ours["dpo"]
    header, _, *rows = readme_tables.training_table(ours, {"sft, cudnn off": peer_run()}).splitlines()
    assert "useful" not in header
    assert rows == [
        "| qwen2tool | 1.700 | 1.500 | finite | - | - | 0.40 s |",
        "| TRL, cuDNN attention forbidden | 1.700 | 1.600 | finite | - | - | 1.50 s |",
    ]


def test_a_peer_whose_adapter_could_not_be_saved_keeps_its_speed():
    run = peer_run(5000.0, error="OSError: full", held_out={"error": "no adapter was saved"})
    row = readme_tables.training_table(our_run(10_000.0), {"sft, unsloth": run}).splitlines()[-1]
    assert row == "| TRL on Unsloth | 1.700 | - | finite | - | - | 1.50 s | 5,000 | 2.00x | 1.19 GB |"
