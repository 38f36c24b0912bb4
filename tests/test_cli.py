"""The command line as a newcomer meets it: help at once, a version, plain text when piped, JSON where asked for."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen2tool import __version__
from qwen2tool.assets import TINY_QWEN2
from tests.cli_runner import run
from tests.training.common import write_instructions

ROOT = Path(__file__).parent.parent
COMMANDS = ("inspect", "convert", "train", "merge", "verify-equivalence", "push", "routes", "demo")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_version_from_module_and_checkout_script():
    for start in (("-m", "qwen2tool"), ("cli.py",)):
        assert python(*start, "--version").stdout == f"qwen2tool {__version__}\n"


def test_help_names_every_command_and_what_it_is_for():
    text = python("-m", "qwen2tool", "--help").stdout
    assert all(command in text for command in COMMANDS)
    for command in COMMANDS:
        done = python("-m", "qwen2tool", command, "--help")
        assert done.returncode == 0 and "--help" in done.stdout


def test_help_answers_at_once():
    """Under 0.4 s: the median of five, since a busy machine may be slow once."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        python("-m", "qwen2tool", "--help")
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 0.4, seconds


IMPORTED = (
    "import sys; sys.path.insert(0, '.'); from tests.cli_runner import run; "
    "o = run({}); print(o.code, 'torch' in sys.modules)"
)


@pytest.mark.parametrize("arguments", [("--help",), ("train", "--help"), ("inspect", str(TINY_QWEN2), "--values")])
def test_help_and_inspect_import_no_torch(arguments):
    done = python("-c", IMPORTED.format(", ".join(map(repr, arguments))))
    assert done.stdout.split() == ["0", "False"], done.stderr


def test_the_check_for_torch_can_fail():
    done = python("-c", IMPORTED.format(f"'routes', {str(TINY_QWEN2)!r}"))
    assert done.stdout.split() == ["0", "True"], done.stderr


def test_piped_output_is_plain_and_json_is_json():
    plain = python("-m", "qwen2tool", "inspect", str(TINY_QWEN2))
    assert plain.returncode == 0 and "\x1b" not in plain.stdout and "15 of 15" in plain.stdout
    assert json.loads(python("-m", "qwen2tool", "inspect", str(TINY_QWEN2), "--json").stdout)["verdict"] == "qwen2"


def test_a_terminal_gets_colour():
    """The same command on a pseudo-terminal: escape sequences, which the pipe did not get."""
    script = f"import pty, sys; pty.spawn([sys.executable, '-m', 'qwen2tool', 'inspect', {str(TINY_QWEN2)!r}])"
    line, environment = [sys.executable, "-c", script], {"TERM": "xterm-256color", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, check=False
    )
    assert "\x1b[" in done.stdout and "15 of 15" in done.stdout


def test_train_merge_verify_push_in_one_go(base_folder, tmp_path):
    """What training leaves is what merging takes, and the proof of it; every report as JSON."""
    data = write_instructions(tmp_path / "data.jsonl")
    common = ("--model", base_folder, "--data", data, "--rank", "4", "--alpha", "12", "--learning-rate", "0.01")
    trained = run("train", *common, "--output", tmp_path / "run", "--epochs", "3", "--json")
    assert trained.code == 0 and json.loads(trained.out)["steps"] == 3
    merged = run("merge", base_folder, tmp_path / "run" / "adapter", tmp_path / "merged", "--json")
    assert merged.code == 0 and json.loads(merged.out)["merged_tensors"] == 21
    pair = (base_folder, tmp_path / "merged")
    text = ("--data", data)
    with_adapter = run("verify-equivalence", *pair, "--adapter", tmp_path / "run" / "adapter", *text, "--json")
    assert with_adapter.code == 0 and json.loads(with_adapter.out)["verdict"] == "equivalent"
    assert run("verify-equivalence", *pair, *text).code == 1, "the merged model is not its base"
    dry = run("push", tmp_path / "merged", "me/model", "--dry-run")
    assert dry.code == 0 and "9 of 9" in dry.out and "model-00001-of-00002.safetensors" in dry.out
