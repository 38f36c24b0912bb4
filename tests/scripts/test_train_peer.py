"""One trainer in one process: flags, the adapter's start, and on the CPU the losses of transformers and of ours."""

from __future__ import annotations

import io
import json
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks import train_peer
from benchmarks.train_peer import Job
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = write_tiny(tmp_path_factory.mktemp("peer") / "model")
    return Job(
        peer="hf", model=str(folder), batch=2, length=16, rank=4, alpha=12, quantize="none", accumulation=2, steps=4,
        warmup=1, device="cpu",
    )  # fmt: skip


def flags(job: Job) -> list[str]:
    return [word for name, value in asdict(job).items() for word in (f"--{name}", str(value))]


def test_flags_are_read_back(job):
    changed = replace(job, dropout=0.05, budget_gb=42.0, recompute="auto")
    assert train_peer.parse(flags(changed)) == (changed, False)
    assert train_peer.parse(flags(job)) != (changed, False)


def test_unknown_peer_is_refused(job):
    with pytest.raises(SystemExit):
        train_peer.parse(flags(replace(job, peer="nobody")))


@pytest.fixture(scope="module")
def results(job):
    return {peer: train_peer.run(replace(job, peer=peer)) for peer in ("hf", "ours")}


@pytest.mark.parametrize("peer", ["hf", "ours"])
def test_a_pass_with_the_adapter_off_changes_no_loss(results, job, peer, monkeypatch):
    """It comes once a micro-batch, and not where nobody asks for it."""
    off, switch = [], PeftModel.disable_adapter
    monkeypatch.setattr(PeftModel, "disable_adapter", lambda model: (off.append(1), switch(model))[1])
    for passes in (0, 1):
        found = train_peer.run(replace(job, peer=peer, reference_pass=passes))
        assert len(off) == passes * job.steps * job.accumulation
        assert found["losses"] == pytest.approx(results[peer]["losses"], rel=1e-6)


def test_result_has_what_the_table_needs(results, job):
    found = results["hf"]
    assert found["steps_counted"] == 3 and len(found["losses"]) == len(found["step_ms"]) == 4
    assert found["min_ms"] <= found["ms"] == sorted(found["step_ms"][1:])[1]
    assert found["micro_batch_ms"] == pytest.approx(found["ms"] / 2, abs=0.01)
    assert found["tokens_per_s"] == pytest.approx(1e3 * 64 / found["ms"], abs=1)
    linears = 2 * (64 + 64) + 2 * (64 + 32) + 2 * (64 + 100) + (100 + 64)  # q, o; k, v; gate, up; down
    assert found["trainable"] == 3 * 4 * linears
    assert {"torch", "transformers", "peft"} <= set(found["versions"])
    assert 0 < found["imported_s"] <= found["ready_s"] <= found["first_step_s"]


def test_ours_and_transformers_lose_alike(results, job, tmp_path):
    """All train the same function from the same start; another model's losses are the negative control."""
    torch.testing.assert_close(torch.tensor(results["ours"]["losses"]), torch.tensor(results["hf"]["losses"]), **CLOSE)
    other = train_peer.run(replace(job, model=str(write_tiny(tmp_path / "other", seed=5)), steps=2))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(torch.tensor(other["losses"]), torch.tensor(results["hf"]["losses"][:2]), **CLOSE)


def test_hf_fp32_rounds_nothing(results, job):
    """Its first loss is that of the bare model in float64; in bf16 it is not."""
    found = train_peer.run(replace(job, peer="hf_fp32"))
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float64)
    batches = train_peer.token_batches(job, model.config.vocab_size)[: job.accumulation]
    with torch.no_grad():
        wanted = sum(float(model(input_ids=ids, labels=ids).loss) for ids in batches) / job.accumulation
    assert abs(found["losses"][0] - wanted) < 2e-5 < 1e-4 < abs(results["hf"]["losses"][0] - wanted)
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(results["hf"]["losses"]), **CLOSE)


CLOSE = {"rtol": 0, "atol": 0.01}
"""bf16 at a loss of 6.5 in a model of 3 layers; the seeds' losses lie 0.1 and more apart."""


def test_adapters_start_alike_by_name(job):
    models = [train_peer.load(replace(job, peer=peer))[0].model for peer in ("hf", "ours")]
    a, b = ({n[n.index("layers.") :]: p for n, p in model.named_parameters() if "lora_" in n} for model in models)
    assert a.keys() == b.keys() and len(a) == 2 * 7 * 3
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(not p.any() for name, p in a.items() if "lora_B" in name)
    k, v = (a[f"layers.0.self_attn.{name}_proj.lora_A.default.weight"] for name in "kv")
    assert k.shape == v.shape and not torch.equal(k, v)
    assert float(k.detach().std()) == pytest.approx(64**-0.5, rel=0.2)


def test_a_missing_adapter_is_an_error(job):
    model = train_peer.load(job)[0].model
    with pytest.raises(RuntimeError, match="0 adapters of rank 8 were found, not 21"):
        train_peer.seed_adapter(model, 8)


def test_batches_go_round_and_have_no_special_tokens(job):
    batches = train_peer.token_batches(job, 384)
    assert len(batches) == 4 and all(batch.shape == (2, 16) for batch in batches)
    assert max(int(batch.max()) for batch in batches) < 384 * 9 // 10
    assert not torch.equal(batches[0], batches[1])
    assert all(torch.equal(*pair) for pair in zip(batches, train_peer.token_batches(job, 384), strict=True))


def test_failure_is_a_result(job, monkeypatch, capsys, tmp_path):
    line = ["train_peer.py", *flags(replace(job, model=str(tmp_path / "nowhere")))]
    monkeypatch.setattr("sys.argv", line)
    assert train_peer.main() == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert list(found) == ["error"] and ": " in found["error"]


def wait_for(text: str, monkeypatch, capsys, peer: str = "hf") -> tuple[int, list[str]]:
    """The exit code and the lines of a process that reads `text` as its job."""
    monkeypatch.setattr("sys.argv", ["train_peer.py", "--peer", peer, "--wait"])
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    code = train_peer.main()
    return code, [line for line in capsys.readouterr().out.splitlines() if line.startswith(("READY ", "RESULT "))]


def test_a_job_is_read_after_the_imports(job, monkeypatch, capsys, results, tmp_path):
    code, (ready, result) = wait_for(json.dumps(asdict(job)) + "\n", monkeypatch, capsys)
    assert code == 0 and ready.startswith("READY hf after ")
    found = json.loads(result.removeprefix("RESULT "))
    assert found["losses"] == results["hf"]["losses"]
    code, lines = wait_for(
        json.dumps(asdict(replace(job, model=str(tmp_path / "nowhere")))) + "\n", monkeypatch, capsys
    )
    assert code == 1 and '"error"' in lines[1]


def test_without_a_job_nothing_is_run_and_nothing_said(monkeypatch, capsys):
    code, lines = wait_for("", monkeypatch, capsys)
    assert code == 0 and [line.split()[0] for line in lines] == ["READY"]


def test_a_peer_that_is_not_installed_is_a_result_before_any_job(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "unsloth", None)
    code, (line,) = wait_for("", monkeypatch, capsys, peer="unsloth")
    assert code == 1 and line.startswith('RESULT {"error": "ModuleNotFoundError: ')


def test_the_wait_is_in_no_figure(job, monkeypatch):
    """The process began 5000 s ago and its imports took 1000 s; without a wait all 5000 s are its imports."""
    monkeypatch.setattr(train_peer, "STARTED", time.perf_counter() - 5000)
    start = time.perf_counter()
    found = train_peer.run(job, imported=1000.0)
    longest = time.perf_counter() - start + 0.1
    assert found["imported_s"] == 1000
    assert 1000 <= found["ready_s"] <= found["first_step_s"] <= 1000 + longest
    assert train_peer.run(job)["imported_s"] >= 5000


def test_nothing_to_count_is_refused(job, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_peer.py", *flags(replace(job, warmup=4))])
    with pytest.raises(SystemExit, match="--warmup 4"):
        train_peer.main()
