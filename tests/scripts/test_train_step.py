"""The comparison's bookkeeping: turns, failures, deadlines, floors and ratios, with one real process on the CPU."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from contextlib import closing

import pytest

from benchmarks import ceilings, train_step
from benchmarks.processes import Ahead
from benchmarks.train_step import Deadline, Setting
from tests.tiny import write_tiny

LIMITS = {"flops_per_s": 1e12, "copy_bytes_per_s": 1e11, "products": {}}
SETTING = Setting(geometry="qwen2-0.5b", batch=2, length=16, rank=4, quantize="none", peers=("ours", "unsloth", "hf"))


@pytest.fixture
def options(tmp_path):
    """What `parse` gives, with the tiny checkpoint standing where qwen2-0.5b would be made."""
    write_tiny(tmp_path / "qwen2-0.5b")
    return argparse.Namespace(
        work=tmp_path, peers=None, once=[], rounds=2, steps=2, peer_seconds=120, recompute=None, budget_gb=None,
        layers=None, tokenizer=None, device="cpu",
    )  # fmt: skip


def fake_run(ms: float) -> dict:
    return {
        "ms": ms, "min_ms": ms - 1, "micro_batch_ms": ms, "tokens_per_s": 1000, "first_step_s": 5.0, "imported_s": 2.0,
        "losses": [2.0, 1.0], "memory_gb": {"peak_allocated": ms / 100, "peak_reserved": ms / 50},
    }  # fmt: skip


@pytest.fixture
def processes(monkeypatch):
    """Stands in for the peers' processes: ours 100 ms and then 104, hf 200, Unsloth fails; what happened to them."""
    happened: list[str] = []
    answers = {"ours": [fake_run(100), fake_run(104)], "hf": [fake_run(200), fake_run(200)]}

    class Process:
        def __init__(self, peer, work):
            self.peer = peer
            happened.append(f"start {peer}")

        def result(self, seconds, told):
            assert json.loads(told)["peer"] == self.peer and told.endswith("\n")
            happened.append(f"run {self.peer}")
            return answers[self.peer].pop(0) if self.peer in answers else {"error": "ModuleNotFoundError: no unsloth"}

        def stop(self):
            happened.append(f"stop {self.peer}")

    monkeypatch.setattr(train_step, "start_peer", Process)
    return happened


def measure(options, deadline=None, after=None):
    """All parts of SETTING, over processes of `start_peer`."""
    with closing(Ahead(lambda peer: train_step.start_peer(peer, options.work))) as ahead:
        return list(train_step.measure(SETTING, options, deadline or Deadline(None), LIMITS, ahead, after))


def runs(happened: list[str]) -> list[str]:
    return [text.removeprefix("run ") for text in happened if text.startswith("run ")]


def test_peers_take_turns_and_a_failure_is_kept_and_not_repeated(options, processes):
    parts = measure(options)
    assert runs(processes) == ["ours", "unsloth", "hf", "ours", "hf"]
    assert [len(part["runs"]) for part in parts] == [1, 2, 3, 4, 5]  # the file is whole after every process
    peers = parts[-1]["peers"]
    assert peers["unsloth"] == {"error": "ModuleNotFoundError: no unsloth"}
    assert (peers["ours"]["ms"], peers["ours"]["min_ms"], peers["ours"]["rounds"]) == (102, 99, 2)
    assert peers["ours"]["memory_gb"]["peak_allocated"] == 1.04
    assert (peers["ours"]["first_step_s"], peers["ours"]["load_to_first_step_s"]) == (5, 3)
    assert "times_unsloth" not in peers["ours"]


def test_a_peer_may_have_one_turn_alone(options, processes):
    options.once = ["hf"]
    measure(options)
    assert runs(processes) == ["ours", "unsloth", "hf", "ours"]
    assert processes.count("start hf") == 1


def test_the_next_process_starts_when_the_present_one_gets_its_job(options, processes):
    """One ahead and no more; the last run has none beside it unless another setting comes."""
    one = "start ours, start unsloth, run ours, start hf, run unsloth, start ours, run hf, start hf, run ours, run hf"
    measure(options)
    assert ", ".join(processes) == one


def test_the_next_setting_is_prepared_during_the_last_run(options, processes):
    options.rounds = 1
    measure(options, after="unsloth")
    assert processes[-3:] == ["start unsloth", "run hf", "stop unsloth"]  # nobody took it


def test_a_process_whose_turn_does_not_come_is_stopped(options, processes):
    options.peers = ["unsloth"]
    measure(options)
    assert processes == ["start unsloth", "start unsloth", "run unsloth", "stop unsloth"]


def test_memory_of_the_device_counts_for_a_process_by_itself(options, monkeypatch):
    class Process:
        def __init__(self, peer, work):
            self.found = fake_run(100)

        def result(self, seconds, told):
            self.found["memory_gb"]["device_used"] = 7.0
            return self.found

    monkeypatch.setattr(train_step, "start_peer", Process)
    part = measure(options)[-1]
    assert [run["memory_gb"].get("device_used") for run in part["runs"]] == [None] * 5 + [7.0]
    assert part["peers"]["hf"]["memory_gb"]["device_used"] == 7
    assert "device_used" not in part["peers"]["ours"]["memory_gb"]
    assert part["overlapped_imports"] is True


def test_floor_is_that_of_the_checkpoint(options, processes):
    part = measure(options)[-1]
    config = json.loads((options.work / "qwen2-0.5b" / "config.json").read_text())
    shape = {"batch": 2, "length": 16, "rank": 4, "quantised": False}
    assert part["floor_ms"] == ceilings.floor(config, LIMITS, **shape)["ms"]
    assert part["floor_without_recompute_ms"] < part["floor_ms"]
    assert part["peers"]["hf"]["floor_fraction"] == part["floor_ms"] / 200


def test_ratio_to_unsloth():
    both = [{"peer": peer, "round": 1, **fake_run(ms)} for peer, ms in (("ours", 100.0), ("unsloth", 250.0))]
    assert train_step.summary(both, 50.0)["ours"]["times_unsloth"] == 2.5
    assert train_step.summary(both, 50.0)["ours"]["floor_fraction"] == 0.5


def test_what_does_not_fit_is_kept_as_not_started(options, processes):
    part = measure(options, Deadline(5))[-1]
    assert processes == []
    assert {record["error"] for record in part["peers"].values()} == {train_step.OUT_OF_TIME}
    assert all(run["skipped"] for run in part["runs"])


def test_a_checkpoint_that_cannot_be_made_fails_every_peer(options, processes, monkeypatch):
    shutil.rmtree(options.work / "qwen2-0.5b")
    monkeypatch.setattr(
        train_step, "run_script", lambda *_: {"exit_code": 2, "error": "Traceback\nOSError: disk full\n"}
    )
    part = measure(options)[-1]
    assert processes == []
    assert {record["error"] for record in part["peers"].values()} == {"no checkpoint: OSError: disk full"}


def test_a_budget_is_the_memory_plan_of_ours_alone(options):
    setting = train_step.SETTINGS["large_42gb"]
    ours, unsloth = (train_step.job(setting, peer, options.work, options) for peer in ("ours", "unsloth"))
    assert (ours.recompute, ours.budget_gb, unsloth.recompute, unsloth.budget_gb) == ("auto", 42, "none", 0)
    plain = train_step.job(train_step.SETTINGS["large"], "ours", options.work, options)
    assert (plain.recompute, plain.budget_gb) == ("all", 0)
    before = [{"peer": peer, **fake_run(ms)} for peer, ms in (("hf", 100.0), ("unsloth", 1040.0))]
    large, small = (
        [train_step.job(train_step.SETTINGS[name], peer, options.work, options, before) for peer in ("ours", "liger")]
        for name in ("large", "small")
    )
    assert [(j.recompute, j.budget_gb) for j in large] == [("auto", 10.4), ("all", 0)], "what Unsloth peaked at"
    assert [(j.recompute, j.budget_gb) for j in small] == [("auto", 5.3), ("all", 0)], "its own budget comes first"


def test_at_least_eight_steps_are_counted(options):
    options.steps = 0
    for setting in train_step.SETTINGS.values():
        job = train_step.job(setting, "hf", options.work, options)
        assert job.steps - job.warmup >= 8
        assert setting.peers[:2] == ("unsloth", "ours")


def test_transformers_in_a_process_of_its_own(options):
    options.peers, options.rounds = ["hf"], 1
    (part,) = measure(options)
    (run,) = part["runs"]
    assert "error" not in run, run
    assert run["steps_counted"] == 2 and math.isfinite(run["losses"][0])
    assert "loss" in train_step.line(run)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--work names the folder"),
        (["--work", str(train_step.ROOT / "work")], "lies in the checkout"),
        (["--work", "..", "--settings", "huge"], "invalid choice"),
        (["--work", "..", "--rounds", "0"], "at least 1"),
    ],
)
def test_wrong_arguments(monkeypatch, capsys, flags, message):
    monkeypatch.setattr("sys.argv", ["train_step.py", *flags])
    monkeypatch.chdir(train_step.ROOT)
    with pytest.raises(SystemExit):
        train_step.parse()
    assert message in capsys.readouterr().err


def test_the_result_file_grows_and_old_figures_outlive_a_run_without_time(
    monkeypatch, options, processes, capsys, tmp_path
):
    file = tmp_path / "train_step.json"
    monkeypatch.setattr(train_step, "SETTINGS", {"small": SETTING})
    monkeypatch.setattr(train_step, "measured_ceilings", lambda *_: LIMITS)
    for seconds in ([], ["--seconds", "5"]):
        line = ["--work", str(tmp_path), "--settings", "small", "--device", "cpu", "--result", str(file), *seconds]
        monkeypatch.setattr("sys.argv", ["train_step.py", *line])
        train_step.main()
        found = json.loads(file.read_text())
        assert found["small"]["peers"]["ours"]["ms"] == 102
        assert {"command", "commit", "machine"} == set(found["small"]["made_by"])
    out = capsys.readouterr().out
    assert "| small: qwen2-0.5b, 2 x 16, 16 bit, r 4, dropout 0 | 102 ms, 1.0 GB |" in out
    assert train_step.OUT_OF_TIME in out
