"""Processes that measure and processes that wait: overlap, errors, limits, and that none is left behind."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from contextlib import closing

import pytest

from benchmarks.processes import Ahead, Process
from benchmarks.train_step import ROOT

IMPORTS_BESIDE_A_RUN = """
import json, os, sys
name, shared = sys.argv[1:]
if name == "second":  # ready only once another process measures
    open("overlap", "w").close()
    open("log", "a").write("second imported\\n")
told = json.loads(sys.stdin.readline())
if name == "first":  # done only once another process imports
    open("overlap").read()
open("log", "a").write(f"{name} ran\\n")
print("a word of its own")
print("RESULT " + json.dumps(told))
"""
HOLDS_A_PIPE = """
import os, signal
open_end = open("alive", "w")
os.fork()
signal.pause()
"""


@pytest.fixture
def script(tmp_path):
    """Writes a script and gives its process's maker."""

    def write(text: str):
        file = tmp_path / "script.py"
        file.write_text(text)
        return lambda *flags: Process(file, flags, tmp_path, dict(os.environ))

    return write


def test_what_a_process_says_is_its_result_or_its_error(script):
    start = script("import sys; print('a', file=sys.stderr); sys.exit('the reason')")
    assert start().result(math.inf) == {"error": "the reason"}
    assert script("print('RESULT {\"ms\": 1}')")().result(math.inf) == {"ms": 1}
    assert script("raise SystemExit(3)")().result(9.0) == {"error": "exit code 3"}


def test_more_than_a_pipe_holds_is_said_before_the_job(script):
    start = script("import sys; print('x' * 10**6); sys.stdin.readline(); print('RESULT {}')")
    assert start().result(60.0, "job\n") == {}


def test_the_next_one_imports_while_the_present_one_runs(script, tmp_path):
    """Each of the two goes on only when the other has come so far; the second's job is sent after the first's end."""
    os.mkfifo(tmp_path / "overlap")
    start = script(IMPORTS_BESIDE_A_RUN)
    with closing(Ahead(lambda peer: start(peer, "-"))) as ahead:
        first = ahead.take("first")
        ahead.prepare("second")
        assert first.result(60.0, '{"ms": 1}\n') == {"ms": 1}
        assert ahead.take("second").result(60.0, '{"ms": 2}\n') == {"ms": 2}
    log = (tmp_path / "log").read_text().splitlines()
    assert sorted(log[:2]) == ["first ran", "second imported"] and log[2:] == ["second ran"]


def test_without_one_ahead_the_first_waits_in_vain(script, tmp_path):
    """The control of the test above."""
    os.mkfifo(tmp_path / "overlap")
    assert script(IMPORTS_BESIDE_A_RUN)("first", "-").result(1.0, "{}\n") == {"error": "stopped after 1 s"}


def test_one_that_dies_while_importing_is_an_error_at_its_turn(script):
    start = script('import sys; print(\'RESULT {"error": "ModuleNotFoundError: no unsloth"}\'); sys.exit(1)')
    with closing(Ahead(lambda _: start())) as ahead:
        ahead.prepare("unsloth")
        assert ahead.take("unsloth").result(60.0, "x" * 10**6) == {"error": "ModuleNotFoundError: no unsloth"}


def test_one_waits_for_its_own_peer_alone():
    happened = []

    class Fake:
        def __init__(self, peer):
            self.peer = peer
            happened.append(f"start {peer}")

        def stop(self):
            happened.append(f"stop {self.peer}")

    with closing(Ahead(Fake)) as ahead:
        ahead.prepare("hf")
        ahead.prepare("hf")
        assert ahead.take("hf").peer == "hf"
        ahead.prepare("hf")
        assert ahead.take("ours").peer == "ours"
        ahead.prepare("liger")
        ahead.prepare(None)
        ahead.prepare("unsloth")
    assert happened == [
        "start hf", "start hf", "stop hf", "start ours", "start liger", "stop liger", "start unsloth", "stop unsloth"
    ]  # fmt: skip


@pytest.mark.parametrize("way", ["closed", "timeout"])
def test_no_worker_outlives_its_process(script, tmp_path, way):
    """Reading the pipe ends when the script and its fork, which both hold the other end, are gone."""
    os.mkfifo(tmp_path / "alive")
    start = script(HOLDS_A_PIPE)
    with closing(Ahead(lambda _: start())) as ahead:
        ahead.prepare("hf")
        pipe = (tmp_path / "alive").open()
        if way == "timeout":
            assert ahead.take("hf").result(1.0) == {"error": "stopped after 1 s"}
    with pipe:
        assert pipe.read() == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_measurement_leaves_nothing_behind(tmp_path, number):
    """With SIGTERM as the script train_step.py takes it; both the running and the waiting process hold the pipe."""
    os.mkfifo(tmp_path / "alive")
    (tmp_path / "script.py").write_text(HOLDS_A_PIPE.replace("signal.pause()", "print(end='')\nsignal.pause()"))
    driver = f"""
import os, signal, sys
from contextlib import closing
from pathlib import Path
from benchmarks.processes import Ahead, Process
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
here = Path({str(tmp_path)!r})
with closing(Ahead(lambda _: Process(here / "script.py", [], here, dict(os.environ)))) as ahead:
    running = ahead.take("hf")
    ahead.prepare("ours")
    print("go", flush=True)
    running.result(60.0)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", driver], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with process, (tmp_path / "alive").open() as pipe:
        assert process.stdout and process.stdout.readline() == "go\n"
        process.send_signal(number)
        assert pipe.read() == ""
        assert process.wait(60) != 0
