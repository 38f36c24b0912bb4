"""What the measuring scripts share: our own commands run as a user would, result files that say what made them."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "datasets", "triton", "unsloth",
    "unsloth_zoo", "xformers",
)  # fmt: skip


def run_command(*arguments: str | Path) -> dict[str, Any]:
    """One `qwen2tool` command with --json in a process of its own: its command line, exit code, seconds and JSON."""
    line = [sys.executable, "-m", "qwen2tool", *map(str, arguments)]
    print("$ qwen2tool " + shlex.join(map(str, arguments)), flush=True)
    start = time.perf_counter()
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), check=False)
    seconds = time.perf_counter() - start
    print(
        f"  exit code {done.returncode}, {seconds:.1f} s" + ("" if done.returncode < 1 else f": {done.stderr[-400:]}"),
        flush=True,
    )
    result: dict[str, Any] = {"exit_code": done.returncode, "seconds": round(seconds, 2)}
    if "--json" in arguments and done.stdout.strip().startswith("{"):
        result["report"] = json.loads(done.stdout)
    else:
        result["output"] = done.stdout[-4000:]
    if done.returncode > 1:  # 1 is a finding, and in the report
        result["error"] = done.stderr[-1500:]
    return result


def run_peer(script: Path, *arguments: str | Path) -> dict[str, Any]:
    """A script that prints one line "RESULT {json}", in a process of its own; with its `error` where it ended badly."""
    print(f"$ python {script.name} " + shlex.join(map(str, arguments)), flush=True)
    line = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), check=False)
    found = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")]
    result = json.loads(found[-1].removeprefix("RESULT ")) if found else {}
    failed = {"error": done.stderr[-2000:]} if done.returncode or not found else {}
    return {"exit_code": done.returncode, **result, **failed}


def run_script(script: Path, *arguments: str | Path) -> dict[str, Any]:
    """Another script of ours in a process of its own: its command line, exit code and seconds."""
    print(f"$ python scripts/{script.name} " + shlex.join(map(str, arguments)), flush=True)
    start = time.perf_counter()
    line = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), check=False)
    return {
        "exit_code": done.returncode,
        "seconds": round(time.perf_counter() - start, 1),
        "output": done.stdout[-500:],
        "error": done.stderr[-1500:] if done.returncode else "",
    }


def environment() -> dict[str, str]:
    """The process environment with the checkout importable and the Hub left alone."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def machine() -> dict[str, Any]:
    """Hardware and versions that the figures depend on."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "cpu_threads": torch.get_num_threads()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return found


def commit() -> str:
    """What QWEN2TOOL_COMMIT says (copied files may lie in an older checkout), else the commit of this checkout."""
    line = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    named = os.environ.get("QWEN2TOOL_COMMIT", "")[:12]
    return named or subprocess.run(line, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def write_result(file: Path, command: Sequence[str], parts: dict[str, Any]) -> None:
    """Adds `parts` to a result file, each with the command, commit and machine that made it."""
    found = json.loads(file.read_text()) if file.is_file() else {}
    shown = [word for n, word in enumerate(command) if "--result" not in command[max(0, n - 1) : n + 1]]
    origin = {"command": shlex.join(shown), "commit": commit(), "machine": machine()}
    found |= {name: {"made_by": origin, **_strict(value)} for name, value in parts.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")


def _strict(value: Any) -> Any:
    """NaN and Inf as text: JSON has no word for them, and they are what some runs are about."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value
